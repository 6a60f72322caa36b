"""`python -m calibration.ecl` from images to a plan: the known layer, resuming, order, and what the files hold."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from calibration import activations, ecl
from calibration.collapse_picture import draw_collapse
from calibration.journal import Journal, Record, fingerprint_of
from export import build
from export.calibration_plan import CalibrationPlan
from runtime.errors import StorageError
from runtime.manifest import read_manifest, sha256_of
from tests.calibration.collapsing import collapsing_checkpoint, write_images
from tests.conftest import ROOT


def arguments(checkpoint: Path, images: Path, output: Path, *more: str) -> list[str]:
    return ["--model", "llava15", "--checkpoint", str(checkpoint), "--images", str(images), "--output", str(output), *more]


def run(*given: Any) -> CalibrationPlan:
    assert ecl.main(arguments(*given)) == 0
    return CalibrationPlan.read(given[2])


def timeless(plan: CalibrationPlan) -> CalibrationPlan:
    return dataclasses.replace(plan, created="")


def numbers(plan: CalibrationPlan) -> dict[str, Any]:
    """The evidence without the images' names."""
    listed = plan.evidence["images"]["list"]
    return {**plan.evidence, "images": [image["sha256"] for image in listed]}


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize(("layer", "rank"), [(0, 1), (1, 2), (3, 3)])
def test_the_layer_that_projects_onto_few_directions_is_found(plain: Path, images: Path, tmp_path: Path, layer: int, rank: int) -> None:
    checkpoint = collapsing_checkpoint(plain, tmp_path / "checkpoint", layer, rank)
    plan = run(checkpoint, images, tmp_path / "plan.json")
    evidence = plan.evidence["collapse"]
    assert plan.split_layer == evidence["layer"] == layer + 1
    assert evidence["drops"][layer] > 0.2
    assert (evidence["image_share"], evidence["resample_share"]) == (1.0, 1.0)
    assert evidence["margin_interval_95"][0] > 0.1


def test_without_the_projection_no_layer_drops_like_that(plain: Path, images: Path, tmp_path: Path) -> None:
    assert max(run(plain, images, tmp_path / "plan.json").evidence["collapse"]["drops"]) < 0.1


def test_a_curve_without_a_lasting_collapse_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = ROOT / "tiny_llava" / "heldout"
    argv = ["--model", "tiny-llava", "--images", str(images), "--limit", "3", "--output", str(tmp_path / "plan.json")]
    assert ecl.main(argv) == 0
    assert re.search(r"is back at its level before the drop at index \d+: a dip, not a lasting collapse", capsys.readouterr().out)


@pytest.mark.parametrize("more", [["--tensor", "query"], ["--tensor", "key"], ["--tensor", "value"], ["--rule", "relative-drop"],
                                  ["--rule", "first-drop", "--threshold", "0.15"], ["--no-row-norm"], ["--no-centre", "--raw"],
                                  ["--dtype", "bfloat16"]])  # fmt: skip
def test_every_tensor_and_rule_finds_a_clear_collapse(collapsing: Path, images: Path, tmp_path: Path, more: list[str]) -> None:
    assert run(collapsing, images, tmp_path / "plan.json", "--limit", "3", *more).split_layer == 3


def test_a_layer_given_by_hand_overrides_and_the_report_says_what_it_overrode(
    collapsing: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = run(collapsing, images, tmp_path / "plan.json", "--split-layer", "6")
    assert plan.split_layer == 6
    assert (plan.evidence["collapse"]["layer"], plan.evidence["collapse"]["split_layer_given"]) == (3, 6)
    out = capsys.readouterr().out
    assert "split K = 6, given by hand; largest-drop would choose 3" in out
    assert "<- largest-drop would choose 3" in out


# ---------------------------------------------------------------- the report


def test_the_table_has_every_layer_and_the_certainty(
    collapsing: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = run(collapsing, images, tmp_path / "plan.json", "--json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("(centred, rows normalised, trace 1); 16 visual tokens, 6 images")
    mean = plan.evidence["collapse"]["mean"]
    assert [line.split()[1] for line in lines[2:11]] == [f"{value:.4f}" for value in mean]
    assert lines[5].endswith("<- split K = 3")
    text = "\n".join(lines)
    for words in ("layer 3 of 1..4, a drop of ", "margin ", " over layer ", "95 % interval [", "chosen by 100.0% of the images",
                  "fp16 is safe: the largest absolute activation is ", "of layer "):  # fmt: skip
        assert words in text
    assert json.loads(lines[-1]) == json.loads(plan.to_json())


def test_one_image_is_told_to_be_one(collapsing: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = run(collapsing, images / "00.png", tmp_path / "plan.json")
    assert plan.evidence["collapse"]["margin_interval_95"] is None
    out = capsys.readouterr().out
    assert "one image: no interval" in out
    assert "95 % interval" not in out


def test_the_picture_is_a_png_of_readme_size_and_the_same_each_time(collapsing: Path, images: Path, tmp_path: Path) -> None:
    run(collapsing, images, tmp_path / "plan.json")
    first = (tmp_path / "plan.png").read_bytes()
    picture = Image.open(io.BytesIO(first))
    assert picture.format == "PNG"
    assert picture.width == 880
    run(collapsing, images, tmp_path / "plan.json")
    assert (tmp_path / "plan.png").read_bytes() == first
    assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib as mpl
    from matplotlib import _pylab_helpers

    from calibration.collapse import CollapseRule, find_collapse

    before = dict(mpl.rcParams)
    draw_collapse(find_collapse([[0.9, 0.5, 0.4]], 4, CollapseRule()), 1, "title")
    assert dict(mpl.rcParams) == before
    assert not _pylab_helpers.Gcf.figs


# ---------------------------------------------------------------- going on, and order


class CountedReader:
    """Counts images, and stops as Ctrl-C does before image `stop`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> None:
        self.images, self.stop = 0, stop
        measure = activations.VisionLanguageReader.measure

        def counted(reader: Any, *given: Any) -> activations.Measurement:
            if self.images == self.stop:
                raise KeyboardInterrupt
            self.images += 1
            return measure(reader, *given)

        monkeypatch.setattr(activations.VisionLanguageReader, "measure", counted)


def test_an_interrupted_run_goes_on_and_gives_the_same_plan(
    collapsing: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = run(collapsing, images, tmp_path / "whole.json")
    output = tmp_path / "part.json"
    with monkeypatch.context() as patched:
        counted = CountedReader(patched, stop=4)
        assert ecl.main(arguments(collapsing, images, output)) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert "interrupted after 4 of 6 images; they are kept in" in error
        assert not output.exists()
        assert counted.images == 4
    journal = tmp_path / "part.images.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])  # killed while it wrote the last line
    with monkeypatch.context() as patched:
        counted = CountedReader(patched)
        resumed = run(collapsing, images, output)
        assert counted.images == 3
    assert timeless(resumed) == timeless(whole)
    assert (tmp_path / "part.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_another_rule_needs_no_model_and_other_settings_measure_anew(
    collapsing: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = CountedReader(monkeypatch)
    run(collapsing, images, tmp_path / "plan.json")
    run(collapsing, images, tmp_path / "plan.json", "--rule", "relative-drop", "--seed", "3")
    assert counted.images == 6
    assert "6 images measured by an earlier run of the same settings" in capsys.readouterr().out
    run(collapsing, images, tmp_path / "plan.json", "--no-centre")
    assert counted.images == 12
    run(collapsing, images, tmp_path / "plan.json")
    assert counted.images == 12
    with (tmp_path / "questions.txt").open("w") as file:
        file.write("what is this?\n\n")
    run(collapsing, images, tmp_path / "plan.json", "--prompts", str(tmp_path / "questions.txt"))
    assert counted.images == 18


def test_other_weights_measure_anew(collapsing: Path, plain: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = CountedReader(monkeypatch)
    one, other = (run(checkpoint, images, tmp_path / "plan.json") for checkpoint in (collapsing, plain))
    assert counted.images == 12
    assert one.source.revision != other.source.revision


def test_names_and_order_of_files_change_no_number(collapsing: Path, images: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed"
    (renamed / "deeper").mkdir(parents=True)
    for index, path in enumerate(sorted(images.iterdir(), reverse=True)):
        shutil.copy(path, renamed / ("deeper" if index % 2 else "") / f"{index}.PNG")
    (tmp_path / "questions.txt").write_text("what is this?\nread row 2.\nhow many digits?\n")
    prompts = ("--prompts", str(tmp_path / "questions.txt"))
    one, other = run(collapsing, images, tmp_path / "a.json", *prompts), run(collapsing, renamed, tmp_path / "b.json", *prompts)
    assert numbers(one) == numbers(other)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_sample_depends_on_the_seed_alone(collapsing: Path, images: Path, tmp_path: Path) -> None:
    def names(seed: str, output: str) -> set[str]:
        plan = run(collapsing, images, tmp_path / output, "--limit", "3", "--seed", seed)
        return {image["name"] for image in plan.evidence["images"]["list"]}

    assert names("1", "a.json") == names("1", "b.json")
    assert len(names("1", "a.json")) == 3
    assert len({frozenset(names(str(seed), "a.json")) for seed in range(5)}) > 1


def test_pictures_that_an_earlier_run_drew_are_not_images(collapsing: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 2)
    for _ in range(2):
        assert run(collapsing, folder, folder / "plan.json").evidence["images"]["used"] == 2


def test_the_journal_passes_over_what_is_not_its_own(tmp_path: Path) -> None:
    record = Record("key", "image", "name", 4, (0.5, 0.25), {"hidden": (1.0, 2.0)})
    path, own = tmp_path / "a.jsonl", fingerprint_of({"a": 1})
    with Journal(path, own) as journal:
        journal.append(record)
    good = path.read_bytes()
    for junk in (
        b"{",
        b"[]",
        b"null",
        b'{"fingerprint": 3}',
        b"\xff\xfe",
        good.replace(b"0.25", b"NaN").replace(b'"key"', b'"k"', 1),
        good[:-20],
    ):
        path.write_bytes(good + junk)
        with Journal(path, own) as journal:
            assert (len(journal), journal.get("key")) == (1, record)
            journal.append(dataclasses.replace(record, key="other"))
        with Journal(path, own) as journal:
            assert len(journal) == 2
    with Journal(path, fingerprint_of({"a": 2})) as journal:
        assert len(journal) == 0


def test_a_full_disk_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record("key", "image", "name", 4, (0.5,), {"hidden": (1.0,)})
    with Journal(tmp_path / "a.jsonl", "f") as journal:
        journal.append(record)

        def full(data: bytes) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(journal, "_write", full)
        with pytest.raises(StorageError, match=r"cannot write .*a\.jsonl: No space left on device; free some space .* is kept"):
            journal.append(dataclasses.replace(record, key="other"))
    with Journal(tmp_path / "a.jsonl", "f") as journal:
        assert journal.get("key") == record


# ---------------------------------------------------------------- into a build


def test_the_shipped_model_goes_from_images_to_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = ROOT / "tiny_llava" / "heldout"
    plan_file = tmp_path / "plan.json"
    assert ecl.main(["--model", "tiny-llava", "--images", str(images), "--limit", "4", "--output", str(plan_file)]) == 0
    plan = CalibrationPlan.read(plan_file)
    assert len(plan.evidence["collapse"]["mean"]) == 13
    assert build.main(["--model", "tiny-llava", "--plan", str(plan_file), "--output", str(tmp_path / "b"), "--keep", "8", "--json"]) == 0
    assert read_manifest(tmp_path / "b").split_layer == plan.split_layer
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["plan"] == {"file": "plan.json", "sha256": sha256_of(plan_file)}
    assert "split: plan.json; budgets: --keep; score: configs/models/tiny-llava.toml" in captured.err
