"""Whatever is given to `calibration.budget`: one clear line, exit code 2, and no plan changed; or a bad image told and passed over."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from calibration import budget, ecl
from export.calibration_plan import CalibrationPlan
from tests.calibration.asking import write_questions
from tests.calibration.collapsing import write_images
from tests.calibration.test_budget import SMALL, arguments, evidence
from tests.conftest import ROOT
from tests.site import said, tree


@pytest.fixture
def questions(images: Path, tmp_path: Path) -> Path:
    return write_questions(tmp_path / "questions.json", sorted(images.glob("*.png"))[:2])


def refused(argv: list[str], message: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tree(folder)
    capfd.readouterr()
    assert budget.main(argv) == 2
    error = "\n".join(line for line in capfd.readouterr().err.splitlines() if line.strip() and "%|" not in line)
    assert re.search(message, said(error, "python -m calibration.budget").error), error
    after = tree(folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert not {name for name in changed if not name.endswith(".budget.jsonl")}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "gpt"], "unknown model 'gpt'"),
        (["--limit", "0"], "--limit is 0, expected at least 1 image"),
        (["--seed", "-1"], "--seed is -1, expected 0 or more"),
        (["--splits", "0"], "--splits holds 0, the decoder has 8 layers: split before layer 1 to 7"),
        (["--splits", "2,8"], "--splits holds 8, the decoder has 8 layers"),
        (["--splits", "a"], "argument --splits: 'a' is not a list of whole numbers"),
        (["--keep", "17"], "--keep 17 is out of range: an image has 16 visual tokens, keep 1 to 16"),
        (["--keep", "0"], "--keep 0 is out of range"),
        (["--keep", ""], "argument --keep: '' is not a list of whole numbers"),
        (["--modes", "tracer"], "unknown score mode 'tracer', expected one of trace, row"),
        (["--auto-budgets", "4,17", "--avg-keep", "9"], "--auto-budgets holds 17, an image has 16 visual tokens"),
        (["--auto-budgets", "4,4", "--avg-keep", "9"], "--auto-budgets holds 4 alone: give at least two"),
        (["--auto-budgets", "4,8"], "--auto-budgets needs a rule for mode and split"),
        (["--max-ttft-ms", "5"], r"--max-ttft-ms needs --profile: a profile\.json of python -m runtime\.profile"),
        (["--min-agreement", "90", "--avg-keep", "9"], "argument --avg-keep: not allowed with argument --min-agreement"),
        (["--min-agreement", "0"], "--min-agreement is 0, expected percent, above 0 and up to 100"),
        (["--avg-keep", "nan"], "--avg-keep is nan, expected a number above 0"),
        (
            ["--avg-keep", "2"],
            r"no setting meets --avg-keep 2; nearest: trace, split 2, keep 4 \(average 7\.00 visual tokens\): allow more",
        ),
        (["--questions", "none.json"], r"cannot read none\.json: No such file or directory"),
        (["--images", "nowhere"], "--images nowhere is not a directory: name the folder that the questions' images are in"),
        (["--images", "."], r"none of 2 images can be used; the first: .*00\.png"),
        (["--plan", "none.json"], r"there is no plan none\.json: check the path"),
        (["--profile", "none.json"], r"cannot read --profile none\.json: No such file or directory"),
        (["--profile", "questions.json"], r"questions\.json is not a profile .*: give a profile\.json"),
        (["--output", "plan.txt"], r"--output plan\.txt does not end in \.json"),
        (["--output", "questions.json"], r"questions\.json exists and is not a plan .*; it is left alone"),
        (["--checkpoint", "missing"], "there is no directory missing: name a Hugging Face checkpoint"),
    ],
)
def test_what_cannot_be_used_is_told(
    plain: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], more: list[str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    named = images if "--images" in more else None
    rows = [Path(path.name) if named else path for path in sorted(images.glob("*.png"))[:2]]
    write_questions(Path("questions.json"), rows)
    refused(arguments(plain, Path("questions.json"), Path("plan.json"), *SMALL, *more), message, tmp_path, capfd)


def test_a_file_without_questions_is_told(plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "q.json").write_text("[]")
    refused(arguments(plain, tmp_path / "q.json", tmp_path / "plan.json"), r"q\.json holds no questions: write a list", tmp_path, capfd)


def test_a_rule_that_nothing_meets_leaves_the_plan_and_still_shows_the_table(
    plain: Path, questions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.json"
    assert budget.main(arguments(plain, questions, output, *SMALL, "--avg-keep", "9")) == 0
    refused(arguments(plain, questions, output, *SMALL, "--avg-keep", "1"), "no setting meets --avg-keep 1; nearest: ", tmp_path, capfd)
    assert budget.main(arguments(plain, questions, output, *SMALL, "--avg-keep", "1")) == 2
    out = capfd.readouterr().out
    assert len(re.findall(r"^trace +\d", out, re.MULTILINE)) == 4
    assert "plan:" not in out


def test_bad_images_among_good_ones_are_counted_and_listed(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_images(tmp_path / "images", 3)
    good = sorted(folder.glob("*.png"))
    clean = evidence(capsys, plain, write_questions(tmp_path / "a.json", good), tmp_path / "pa.json", *SMALL)["budget"]
    (folder / "broken.png").write_bytes(good[0].read_bytes()[:90])
    (folder / "empty.png").write_bytes(b"")
    bad = [folder / name for name in ("missing.png", "broken.png", "empty.png")]
    file = write_questions(tmp_path / "b.json", [Path("images") / path.name for path in [*bad, *good]])
    found = evidence(capsys, plain, file, tmp_path / "pb.json", *SMALL)["budget"]
    assert found["table"] == clean["table"]
    assert [one["name"] for one in found["images"]["skipped"]] == [f"images/{name}.png" for name in ("broken", "empty", "missing")]
    assert budget.main(arguments(plain, file, tmp_path / "pb.json", *SMALL)) == 0
    out = capsys.readouterr().out
    assert re.search(r"3 images skipped:\n  .*broken\.png .* is damaged or cut short", out), out
    assert re.search(r"  cannot read .*missing\.png: No such file or directory", out), out
    limited = evidence(capsys, plain, file, tmp_path / "pc.json", *SMALL, "--limit", "3")["budget"]
    assert len(limited["images"]["list"]) == 3


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("layers.4.mlp.down_proj.weight", r"image \S+\.png, layer 4: what it gives holds NaN or infinity: check the checkpoint's weights"),
        ("layers.7.mlp.down_proj.weight", r"image \S+\.png, layer 7, or the head after it: the unpruned logits hold NaN or infinity"),
        ("multi_modal_projector.linear_2.weight", r"image \S+\.png, the embeddings hold NaN or infinity"),
    ],
)
def test_what_is_not_finite_names_image_and_layer(
    plain: Path, questions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], tensor: str, message: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(plain, checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    (name,) = (n for n in tensors if n.endswith(tensor) and "vision" not in n)
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    refused(arguments(checkpoint, questions, tmp_path / "plan.json", *SMALL), message, tmp_path, capfd)


def test_a_profile_of_another_model_is_refused(plain: Path, questions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    times = {"first_token": {"median_ms": 5.0}, "stages": {"pre_ecl": {"median_ms": 1.0}, "post_ecl": {"median_ms": 1.0}}}
    subject = {
        "model": "tiny-llava", "layers": 12, "visual_tokens": 64, "score_mode": "trace", "split_layer": 6, "keep": 16, "text_tokens": 30,
        "target": "cpu", "precision": "fp32",
    }  # fmt: skip
    profile = {"subject": subject, "machine": {"cpu": "x", "engine_threads": 2}, "pruned": times, "dense": times}
    (tmp_path / "p.json").write_text(json.dumps(profile | {"comparison": {"flops_dense": 1e9}}))
    argv = arguments(plain, questions, tmp_path / "plan.json", *SMALL, "--profile", str(tmp_path / "p.json"), "--max-ttft-ms", "5")
    refused(argv, r"p\.json is a profile of tiny-llava \(12 layers, 64 visual tokens\), this is llava15 \(8 layers", tmp_path, capfd)


def test_a_plan_of_other_weights_and_one_that_would_lose_evidence_are_refused(
    plain: Path, collapsing: Path, images: Path, questions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.json"
    assert (
        ecl.main(["--model", "llava15", "--checkpoint", str(collapsing), "--images", str(images / "00.png"), "--output", str(output)]) == 0
    )
    argv = arguments(plain, questions, tmp_path / "new.json", *SMALL, "--plan", str(output))
    refused(argv, "the plan is for the weights of checkpoint .*: calibrate again", tmp_path, capfd)
    argv = arguments(collapsing, questions, output, *SMALL, "--avg-keep", "9")
    refused(argv, r"plan\.json holds another calibration's evidence, which would be lost; .*: carry it on with --plan", tmp_path, capfd)
    CalibrationPlan.read(output)


def test_a_plan_with_budgets_alone_is_replaced(plain: Path, questions: Path, tmp_path: Path) -> None:
    for average, keep in (("16", 12), ("7", 4)):
        assert (
            budget.main(arguments(plain, questions, tmp_path / "plan.json", "--splits", "2", "--keep", str(keep), "--avg-keep", average))
            == 0
        )
    plan = CalibrationPlan.read(tmp_path / "plan.json")
    assert plan.budgets == (4,)
    assert dataclasses.replace(plan, budgets=None).split_layer == 2


def test_two_runs_do_not_write_the_same_plan(plain: Path, questions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with FileLock(tmp_path / ".plan.json.lock"):
        message = r"another run is writing .*plan\.json: wait for it, or choose another"
        refused(arguments(plain, questions, tmp_path / "plan.json", *SMALL), message, tmp_path, capfd)


def test_a_journal_of_another_shape_is_passed_over(
    plain: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.json"
    whole = evidence(capsys, plain, questions, output, *SMALL)["budget"]
    journal = tmp_path / "plan.budget.jsonl"
    first, second = journal.read_bytes().splitlines(keepends=True)
    raw = json.loads(first)
    raw["found"]["kl"].pop()
    journal.write_bytes(json.dumps(raw).encode() + b"\n{\nnull\n" + second.replace(b'"agreeing": [', b'"agreeing": [null, '))
    assert evidence(capsys, plain, questions, output, *SMALL)["budget"] == whole
    assert len(journal.read_bytes().splitlines()) == 6


def test_help_is_instant_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom calibration.budget import main\nassert main(['--help']) == 0\n"
        "print({'torch', 'transformers', 'matplotlib', 'numpy', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_a_placeholder_in_a_question_is_told(plain: Path, questions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    raw = json.loads(questions.read_text())
    raw["questions"][0]["question"] = "<image>\nwhat is it?"
    questions.write_text(json.dumps(raw))
    message = r"processor cannot take the question '<image>.*: leave <image> out of it"
    refused(arguments(plain, questions, tmp_path / "plan.json", *SMALL), message, tmp_path, capfd)


def test_budgets_per_image_below_the_chosen_one_are_refused(
    plain: Path, questions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = ("--splits", "2", "--modes", "trace", "--keep", "15", "--avg-keep", "16", "--auto-budgets", "1,2")
    message = r"the rule chose keep 15, --auto-budgets end at 2: add 15 to them"
    refused(arguments(plain, questions, tmp_path / "plan.json", *more), message, tmp_path, capfd)
