"""`python -m calibration.budget` from questions to a plan: rules, resuming, order, and what the files hold; then into a build."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from calibration import agreement, budget, ecl
from calibration.budget_picture import draw_budget
from calibration.cost import prefill_flops
from calibration.subject import Subject
from export import build
from export.calibration_plan import CalibrationPlan
from runtime.manifest import read_manifest, sha256_of
from tests.calibration.asking import figure, measured, write_questions
from tests.calibration.collapsing import write_images
from tests.conftest import ROOT

SMALL = ("--splits", "2,5", "--keep", "12,4", "--modes", "trace")


def arguments(checkpoint: Path, questions: Path, output: Path, *more: str) -> list[str]:
    return ["--model", "llava15", "--checkpoint", str(checkpoint), "--questions", str(questions), "--output", str(output), *more]


def evidence(capsys: pytest.CaptureFixture[str], *given: Any) -> dict[str, Any]:
    """Runs the command and gives the last line's object."""
    capsys.readouterr()
    assert budget.main([*arguments(*given), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.fixture
def questions(images: Path, tmp_path: Path) -> Path:
    return write_questions(tmp_path / "questions.json", sorted(images.glob("*.png")))


# ---------------------------------------------------------------- the report


def test_without_a_rule_only_the_report_is_made(plain: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(tmp_path.iterdir())
    assert budget.main(arguments(plain, questions, tmp_path / "plan.json", *SMALL)) == 0
    out = capsys.readouterr().out
    assert set(tmp_path.iterdir()) - before == {tmp_path / "plan.budget.jsonl"}
    assert "6 images, 18 questions (18 with a label)" in out
    assert "no rule was given, so nothing is chosen and no plan is written: add --min-agreement" in out
    assert "nothing was written; measurements, from which another run goes on:" in out
    table = [line.split() for line in out.splitlines() if re.match(r"(trace|random|uniform) +\d", line)]
    assert len(table) == 3 * 2 * 2
    assert [float(row[4]) for row in table] == sorted(float(row[4]) for row in table)
    assert all(row[-1] == "control" for row in table if row[0] != "trace")
    assert any(row[-1] == "*" for row in table if row[0] == "trace")


def test_the_evidence_holds_every_setting_with_cost_and_intervals(
    plain: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evidence(capsys, plain, questions, tmp_path / "plan.json", *SMALL)
    assert found["plan"] is None
    table = found["budget"]["table"]
    assert {(row["setting"]["mode"], row["control"]) for row in table} == {("trace", False), ("random", True), ("uniform", True)}
    for row in table:
        split, keep = row["setting"]["split_layer"], row["setting"]["keep"]
        assert row["average_keep"] == (split * 16 + (8 - split) * keep) / 8
        assert row["kv_bytes"] == 2 * 2 * 16 * 4 * (split * 16 + (8 - split) * keep)
        assert row["flops_share_visual"] < row["flops_share"] < 1
        assert row["first_token"] is None
        for name in ("kl", "agreement", "unchanged", "accuracy"):
            low, high = row[name]["interval"]
            assert low <= row[name]["mean"] <= high
    settings = found["budget"]["settings"]
    assert settings["questions"] == {"file": "questions.json", "sha256": sha256_of(questions)}
    assert found["budget"]["measured"]["images"] == 6


def test_one_image_has_no_interval_and_is_told_to_be_one(
    plain: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_questions(tmp_path / "q.json", [images / "00.png"], labelled=False)
    argv = arguments(plain, file, tmp_path / "plan.json", *SMALL, "--min-agreement", "1", "--auto-budgets", "2,8")
    assert budget.main(argv) == 0
    out = capsys.readouterr().out
    assert "one image: there are no intervals" in out
    assert "--min-agreement 1, by the mean, for want of an interval: trace, split 2, keep 2" in out
    assert "3 questions (0 with a label)" in out
    assert "accuracy" not in out
    plan = CalibrationPlan.read(tmp_path / "plan.json")
    assert (plan.budgets, plan.auto_keep) == ((2, 8), None)
    assert all(row["agreement"]["interval"] is None for row in plan.evidence["budget"]["table"])


# ---------------------------------------------------------------- the choice and the plan


def test_a_rule_writes_plan_and_picture(plain: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "plan.json"
    found = evidence(capsys, plain, questions, output, *SMALL, "--avg-keep", "9")
    plan = CalibrationPlan.read(output)
    chosen = found["budget"]["chosen"]
    fitting = [row for row in found["budget"]["table"] if row["average_keep"] <= 9 and not row["control"]]
    assert chosen == max(fitting, key=lambda row: (row["agreement"]["mean"], -row["flops_share"]))["setting"]
    assert (plan.split_layer, plan.budgets, plan.score_mode, plan.auto_keep) == (chosen["split_layer"], (chosen["keep"],), "trace", None)
    assert plan.evidence["budget"] == found["budget"]
    assert found["budget"]["rule"] == {"min_agreement": None, "max_ttft_ms": None, "avg_keep": 9.0}
    (row,) = (row for row in found["budget"]["table"] if row["setting"] == chosen)
    assert [one["control"] for one in row["compared"]] == ["random", "uniform"]
    assert (tmp_path / "plan.budget.png").read_bytes().startswith(b"\x89PNG")


def test_a_control_is_chosen_only_where_it_is_named(
    plain: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evidence(
        capsys, plain, questions, tmp_path / "a.json", "--splits", "2", "--keep", "4", "--modes", "uniform", "--avg-keep", "16"
    )
    assert found["budget"]["chosen"]["mode"] == "uniform"
    assert [[one["control"] for one in row["compared"]] for row in found["budget"]["table"] if not row["control"]] == [["random"]]


def test_a_limit_of_milliseconds_is_kept_by_measured_and_estimated_times(
    plain: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = Subject.open("llava15", str(plain)).spec
    dense = prefill_flops(spec.decoder, visual_tokens=16, keep=16, split_layer=2, text_tokens=13)
    medians = {"pre_ecl": {"median_ms": 4.0}, "post_ecl": {"median_ms": 6.0}}
    subject = {
        "model": "llava15", "layers": 8, "visual_tokens": 16, "score_mode": "trace", "split_layer": 2, "keep": 4, "text_tokens": 13,
        "target": "cpu", "precision": "fp32",
    }  # fmt: skip
    profile = {
        "subject": subject, "machine": {"cpu": "x", "engine_threads": 2}, "pruned": {"first_token": {"median_ms": 20.0}, "stages": medians},
        "dense": {"first_token": {"median_ms": 30.0}},
        "comparison": {"flops_dense": dense + 2 * spec.decoder.hidden_size * spec.decoder.vocab_size},
    }  # fmt: skip
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    more = (*SMALL, "--profile", str(tmp_path / "profile.json"), "--max-ttft-ms", "20.5")
    found = evidence(capsys, plain, questions, tmp_path / "plan.json", *more)["budget"]
    times = {(row["setting"]["mode"], row["setting"]["split_layer"], row["setting"]["keep"]): row["first_token"] for row in found["table"]}
    assert times["trace", 2, 4] == {"ms": 20.0, "measured": True}
    assert not times["random", 2, 4]["measured"]
    assert times["trace", 2, 12]["ms"] > 20.5
    assert times["trace", 5, 4]["ms"] > 20.5
    assert found["chosen"] == {"mode": "trace", "split_layer": 2, "keep": 4}
    assert budget.main(arguments(plain, questions, tmp_path / "plan.json", *more)) == 0
    out = capsys.readouterr().out
    assert "--max-ttft-ms 20.5, 20.00 ms measured: trace, split 2, keep 4" in out
    assert re.search(r"^random .* ~20\.00 ", out, re.MULTILINE)


def test_a_plan_is_carried_on_with_its_evidence_and_split(
    collapsing: Path, images: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.json"
    argv = ["--model", "llava15", "--checkpoint", str(collapsing), "--images", str(images), "--output", str(output)]
    assert ecl.main(argv) == 0
    old = CalibrationPlan.read(output)
    more = ["--plan", str(output), "--modes", "trace", "--keep", "4", "--avg-keep", "16"]
    argv = ["--model", "llava15", "--checkpoint", str(collapsing), "--questions", str(questions), *more]
    assert budget.main(argv) == 0
    plan = CalibrationPlan.read(output)
    assert (plan.split_layer, plan.budgets, plan.score_mode) == (old.split_layer, (4,), "trace") == (3, (4,), "trace")
    assert {name: plan.evidence[name] for name in old.evidence} == old.evidence
    capsys.readouterr()
    assert budget.main([*argv, "--splits", "2", "--output", str(tmp_path / "other.json")]) == 0
    assert "the plan's split was 3; it is 2 now" in capsys.readouterr().out
    assert CalibrationPlan.read(output) == plan


def test_budgets_per_image_are_all_in_the_plan(plain: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--splits", "2", "--modes", "trace", "--keep", "12", "--avg-keep", "16", "--auto-budgets", "4,12,7")
    found = evidence(capsys, plain, questions, tmp_path / "plan.json", *more)["budget"]
    plan = CalibrationPlan.read(tmp_path / "plan.json")
    assert plan.budgets is not None
    assert plan.budgets[0] == found["chosen"]["keep"]
    assert set(plan.budgets) == {4, 7, 12}
    thresholds = found["per_image"]["thresholds"]
    assert found["per_image"]["budgets"] == [4, 7, 12]
    assert all(4 <= row["tokens"] <= 12 and sum(row["shares"]) == pytest.approx(1) for row in thresholds)
    picked = found["per_image"]["chosen"]
    assert plan.auto_keep == (None if picked is None else picked["threshold"])


def test_the_picture_shows_tables_with_and_without_labels_and_intervals() -> None:
    rows = [
        measured(mode, split, keep, keep / 20 + split / 10, figure(0.8 + keep / 100, [None, 0.02][split - 1]), control=mode == "random")
        for mode in ("trace", "random") for split in (1, 2) for keep in (4, 8)
    ]  # fmt: skip
    heights = []
    for chosen, unpruned in ((None, None), (rows[0], None), (rows[0], 0.9)):
        picture = Image.open(io.BytesIO(draw_budget(rows, chosen, "title", unpruned)))
        heights.append(picture.height)
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20
    assert heights[0] == heights[1] < heights[2]  # a second panel for accuracy


# ---------------------------------------------------------------- streaming


def test_names_order_and_copies_change_nothing(plain: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def numbers(paths: Sequence[Path], name: str) -> Any:
        found = evidence(capsys, plain, write_questions(tmp_path / name, paths), tmp_path / f"p{name}", *SMALL, "--avg-keep", "9")["budget"]
        return found["table"], found["chosen"], [image["sha256"] for image in found["images"]["list"]], found["images"]["repeated"]

    paths = sorted(images.glob("*.png"))
    straight = numbers(paths, "a.json")
    renamed = []
    for number, path in enumerate(reversed(paths)):
        renamed.append(tmp_path / f"{number}.png")
        shutil.copy(path, renamed[-1])
    shutil.copy(paths[0], tmp_path / "copy.png")
    other = numbers([*renamed, tmp_path / "copy.png"], "b.json")
    assert other[:3] == straight[:3]
    assert (straight[3], other[3]) == ([], ["copy.png"])


def test_an_interrupted_run_goes_on_and_gives_the_same(
    plain: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evidence(capsys, plain, questions, tmp_path / "whole.json", *SMALL)["budget"]
    measure = agreement.AgreementReader.measure
    calls: list[int] = []

    def stopping(self: Any, *given: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return measure(self, *given)

    monkeypatch.setattr(agreement.AgreementReader, "measure", stopping)
    assert budget.main(arguments(plain, questions, tmp_path / "plan.json", *SMALL)) == 2
    assert re.search(r"interrupted after 2 of 6 images; they are kept in .*plan\.budget\.jsonl", capsys.readouterr().err)

    def counting(self: Any, *given: Any) -> Any:
        calls.append(1)
        return measure(self, *given)

    monkeypatch.setattr(agreement.AgreementReader, "measure", counting)
    resumed = evidence(capsys, plain, questions, tmp_path / "plan.json", *SMALL)["budget"]
    assert len(calls) == 6
    assert resumed == whole
    again = evidence(capsys, plain, questions, tmp_path / "plan.json", *SMALL, "--avg-keep", "9", "--seed", "1")["budget"]
    assert len(calls) == 6  # another rule or seed needs no model
    assert again["table"] != whole["table"]
    assert budget.main(arguments(plain, questions, tmp_path / "plan.json", *SMALL)) == 0
    assert "6 images from an earlier run" in capsys.readouterr().out


def test_other_labels_are_measured_anew(plain: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_questions(tmp_path / "q.json", [images / "00.png", images / "01.png"])
    labelled = evidence(capsys, plain, file, tmp_path / "plan.json", *SMALL)["budget"]
    write_questions(file, [images / "00.png", images / "01.png"], labelled=False)
    own = evidence(capsys, plain, file, tmp_path / "plan.json", *SMALL)["budget"]
    assert (labelled["measured"]["labelled"], own["measured"]["labelled"]) == (6, 0)
    assert own["measured"]["positions"] != labelled["measured"]["positions"]


def test_a_sample_depends_on_the_seed_alone(plain: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def names(seed: int, output: str) -> set[str]:
        more = (*SMALL, "--limit", "3", "--seed", str(seed))
        return {image["sha256"] for image in evidence(capsys, plain, questions, tmp_path / output, *more)["budget"]["images"]["list"]}

    assert names(1, "a.json") == names(1, "b.json")
    assert len(names(1, "a.json")) == 3
    assert len({frozenset(names(seed, "a.json")) for seed in range(4)}) > 1


def test_another_type_of_the_model_gives_numbers_close_by(
    plain: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_questions(tmp_path / "q.json", [write_images(tmp_path / "i", 2) / "00.png", images / "01.png"], labelled=False, each=1)
    rows = [evidence(capsys, plain, file, tmp_path / "plan.json", *SMALL, "--dtype", dtype)["budget"] for dtype in ("float32", "bfloat16")]
    assert rows[0]["table"] != rows[1]["table"]
    assert rows[0]["measured"]["questions"] == rows[1]["measured"]["questions"] == 2


# ---------------------------------------------------------------- into a build


def test_the_shipped_model_goes_from_questions_to_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, output = ROOT / "tiny_llava" / "calibration" / "questions.json", tmp_path / "plan.json"
    argv = ["--model", "tiny-llava", "--questions", str(questions), "--output", str(output), "--modes", "trace", "--splits", "6"]
    assert budget.main([*argv, "--keep", "32,16", "--limit", "3", "--avg-keep", "50", "--auto-budgets", "8,24"]) == 0
    plan = CalibrationPlan.read(output)
    assert plan.budgets is not None
    assert "the unpruned model gives the label of " in capsys.readouterr().out
    assert build.main(["--model", "tiny-llava", "--plan", str(output), "--output", str(tmp_path / "b"), "--json"]) == 0
    manifest = read_manifest(tmp_path / "b")
    assert (manifest.split_layer, manifest.budgets, manifest.score_mode) == (6, plan.budgets, "trace")
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["plan"] == {"file": "plan.json", "sha256": sha256_of(output)}
    assert "split: plan.json; budgets: plan.json; score: plan.json" in captured.err
