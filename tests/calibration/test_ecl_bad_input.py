"""Whatever is given to `calibration.ecl`: one clear line, exit code 2, and no file changed; or a bad image told and passed over."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file

from calibration import ecl
from export.calibration_plan import CalibrationPlan
from tests.calibration.collapsing import write_images
from tests.calibration.test_ecl import arguments, run
from tests.conftest import ROOT
from tests.site import said, tree


def refused(argv: list[str], message: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tree(folder)
    capfd.readouterr()
    assert ecl.main(argv) == 2
    error = "\n".join(line for line in capfd.readouterr().err.splitlines() if line.strip() and "%|" not in line)
    assert re.search(message, said(error, "python -m calibration.ecl").error), error
    after = tree(folder)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} <= {"plan.images.jsonl"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "gpt"], "unknown model 'gpt'"),
        (["--limit", "0"], "--limit is 0, expected at least 1 image"),
        (["--seed", "-1"], "--seed is -1, expected 0 or more"),
        (["--split-layer", "0"], "--split-layer 0 is out of range: the decoder has 8 layers"),
        (["--split-layer", "8"], "--split-layer 8 is out of range"),
        (["--rule", "first-drop"], "--rule first-drop needs --threshold"),
        (["--threshold", "0.1"], "--rule largest-drop takes no --threshold"),
        (["--rule", "first-drop", "--threshold", "0.9"], r"no layer of 1\.\.4 drops by more than --threshold 0\.9"),
        (["--matrix", "heads"], "hidden states have no heads: take --tensor query, key or value"),
        (["--matrix", "heads", "--tensor", "value"], r"is 0 for every token with 2 head\(s\): centred over its heads"),
        (["--tensor", "mlp"], "argument --tensor: invalid choice: 'mlp'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice"),
        (["--output", "plan.txt"], r"--output plan\.txt does not end in \.json"),
        (["--output", "nowhere/plan.json"], "there is no directory nowhere, make it first"),
        (["--prompts", "missing.txt"], r"--prompts missing\.txt cannot be read \(No such file or directory\)"),
        (["--images", "missing"], "there is no directory missing: name one that holds images"),
        (["--checkpoint", "missing"], "there is no directory missing: name a Hugging Face checkpoint"),
    ],
)
def test_an_option_that_cannot_be_used_is_told(
    collapsing: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], more: list[str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    refused(arguments(collapsing, images, Path("plan.json"), "--limit", "2", *more), message, tmp_path, capfd)


def test_a_directory_without_images_and_one_of_broken_ones_are_told_apart(
    collapsing: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "notes.txt").write_text("none")
    argv = arguments(collapsing, folder, tmp_path / "plan.json")
    refused(argv, r"images holds no images \(\.png, ", tmp_path, capfd)
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "b.jpg").write_bytes(b"")
    refused(argv, r"none of 2 images can be used; the first: .*a\.png is not an image of a known format", tmp_path, capfd)


def test_bad_images_among_good_ones_are_counted_and_listed(collapsing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_images(tmp_path / "images", 3)
    clean = run(collapsing, folder, tmp_path / "clean.json")
    (folder / "broken.png").write_bytes((folder / "00.png").read_bytes()[:90])
    (folder / "empty.webp").write_bytes(b"")
    Image.new("RGB", (1, 900)).save(folder / "narrow.png")
    shutil.copy(folder / "01.png", folder / "same.png")
    capsys.readouterr()
    plan = run(collapsing, folder, tmp_path / "plan.json")
    assert plan.evidence["collapse"] == clean.evidence["collapse"]
    images = plan.evidence["images"]
    assert (images["used"], images["repeated"]) == (3, ["same.png"])
    assert [entry["name"] for entry in images["skipped"]] == ["broken.png", "empty.webp", "narrow.png"]
    out = capsys.readouterr().out
    assert "1 file counted once with an identical one: same.png" in out
    assert "3 files skipped:\n" in out
    assert "narrow.png is too narrow (1 x 900): crop it first" in out
    assert run(collapsing, folder, tmp_path / "plan.json", "--limit", "3").evidence["images"]["used"] == 3


def test_an_activation_that_is_not_finite_names_layer_and_image_and_keeps_the_rest(
    plain: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(plain, checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    (name,) = (n for n in tensors if n.endswith("layers.4.mlp.down_proj.weight") and "vision" not in n)
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    message = r"image 00\.png, layer 5: hidden states hold NaN or infinity in float32: check the checkpoint's weights"
    refused(arguments(checkpoint, images, tmp_path / "plan.json"), message, tmp_path, capfd)


def test_fp16_overflow_says_to_take_another_type(plain: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(plain, checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    (name,) = (n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight") and "vision" not in n)
    tensors[name] *= 3e4
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    message = r"image 00\.png, layer 1: MLP intermediates hold NaN or infinity in float16: take --dtype bfloat16 or float32"
    refused(arguments(checkpoint, images, tmp_path / "plan.json", "--dtype", "float16"), message, tmp_path, capfd)
    audit = run(checkpoint, images, tmp_path / "plan.json", "--limit", "2").evidence["audit"]
    assert (audit["fits_fp16"], audit["tensor"], audit["layer"]) == (False, "mlp", 1)
    assert re.match(r"bf16 is needed: the largest absolute activation is \S+ \(MLP intermediate of layer 1\)", audit["summary"])


def test_a_model_without_vision_is_refused(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=8)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    message = "the checkpoint is not of family llava15: its config.json has model_type 'llama'"
    refused(arguments(tmp_path / "llama", images, tmp_path / "plan.json"), message, tmp_path, capfd)


def test_a_full_disk_leaves_an_earlier_plan_and_says_so(
    collapsing: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run(collapsing, images, tmp_path / "plan.json")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    refused(arguments(collapsing, images, tmp_path / "plan.json"), r"cannot write .*plan\.json: No space left on device", tmp_path, capfd)


def test_two_runs_do_not_write_the_same_plan(collapsing: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "plan.json"
    with FileLock(tmp_path / ".plan.json.lock"):
        refused(
            arguments(collapsing, images, output), r"another run is writing .*plan\.json: wait for it, or choose another", tmp_path, capfd
        )
    assert run(collapsing, images, output, "--limit", "1").split_layer == 3


def test_what_is_not_a_plan_and_a_plan_with_budgets_are_left_alone(
    collapsing: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.json"
    output.write_text('{"my": "notes"}')
    refused(arguments(collapsing, images, output), r"plan\.json exists and is not a plan .*; it is left alone", tmp_path, capfd)
    output.unlink()
    plan = run(collapsing, images, output, "--limit", "1")
    raw: dict[str, Any] = json.loads(plan.to_json())
    output.write_text(json.dumps(raw | {"budgets": [4]}))
    refused(arguments(collapsing, images, output), "holds calibrated budgets, which a new split layer would make void", tmp_path, capfd)
    assert CalibrationPlan.read(output).budgets == (4,)


def test_prompts_that_are_no_text_or_empty_are_refused(
    collapsing: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    for data, message in ((b"\xff\xfe\xff", "is not UTF-8 text"), (b" \n\n", "holds no prompt: write one a line")):
        file.write_bytes(data)
        refused(arguments(collapsing, images, tmp_path / "plan.json", "--prompts", str(file)), message, tmp_path, capfd)


def test_a_placeholder_in_a_prompt_is_told(collapsing: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("<image> what is it?\n")
    message = r"processor cannot take the question '<image> what is it\?' .*: leave <image> out of it"
    refused(arguments(collapsing, images, tmp_path / "plan.json", "--prompts", str(file)), message, tmp_path, capfd)


def test_a_library_that_is_missing_is_named_with_its_extra(
    collapsing: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("calibration.layer_search", "calibration.collapse_picture"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    message = r"matplotlib\.axes is not installed: pip install 'entropy-prune\[export,calibration\]'"
    refused(arguments(collapsing, images, tmp_path / "plan.json"), message, tmp_path, capfd)


def test_help_is_instant_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom calibration.ecl import main\nassert main(['--help']) == 0\n"
        "print({'torch', 'transformers', 'matplotlib', 'numpy', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
