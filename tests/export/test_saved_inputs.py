"""Every graph's inputs and outputs for Polygraphy: the very lines that are written run here, and see a wrong weight."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export import verify
from export.build import build_bundle
from export.eager import EagerPrunedLlava
from export.graph_runs import GraphRun, graph_runs
from export.plan import BuildOptions, make_plan
from export.saved_inputs import README_FILE, check_savable, run_profile, save_runs, variables
from runtime import names
from runtime.errors import UsageError
from runtime.pipeline import VisionLanguageModel, load
from runtime.prompt import PromptBuilder
from tests.export.test_staging import tree

RUNS = ("vision", "pre_ecl.prefill", "pre_ecl.decode", "score.4", "score.2", "post_ecl.prefill", "post_ecl.decode")
POLYGRAPHY = (sys.executable, "-c", "import sys; from polygraphy.tools import main; sys.exit(main())")


@pytest.fixture(scope="module")
def saved(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `--save-inputs` writes for the shared bundle, by the command itself."""
    bundle, directory = tmp_path_factory.mktemp("bundle") / "bundle", tmp_path_factory.mktemp("saved") / "inputs"
    shutil.copytree(tiny_bundle, bundle)  # verify.json is written into it
    argv = [str(bundle), "--checkpoint", str(tiny_checkpoint), "--selection-images", "2", "--save-inputs", str(directory)]
    assert verify.main(argv) == 0
    return directory


def lines(saved: Path, runner: str, *runs: str) -> list[str]:
    """The README's lines for some runs with one runner, as they stand there."""
    found = [
        line for line in (saved / README_FILE).read_text().splitlines() if line.startswith("polygraphy run ") and f" {runner} " in line
    ]
    return [line for line in found if any(f" {run}.inputs.json" in line for run in runs)]


def status(line: str, saved: Path, bundle: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a line in a child process as a shell would: the variable filled in, quotes removed."""
    words = shlex.split(line)
    command = [*POLYGRAPHY, *(word.replace("$BUNDLE", variables(bundle)["BUNDLE"]) for word in words[1:]), *more]
    env = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", **environment}
    return subprocess.run(command, cwd=saved, env=env, check=False, capture_output=True, text=True, timeout=300)


def runs_of(bundle: Path, checkpoint: Path, **files_from: Path) -> tuple[VisionLanguageModel, dict[str, GraphRun]]:
    model = load(bundle)
    reference = EagerPrunedLlava(checkpoint, model.manifest.split_layer, None, model.manifest.score_mode)
    prompt = verify._prompt(model, verify.synthetic_images(1, 56))
    found = graph_runs(files_from.get("graphs", bundle), model.manifest, prompt, reference)
    return model, {run.name: run for run in found}


def changed_weights(bundle: Path, copy: Path) -> Path:
    """A copy of a bundle whose weights are a few percent too large."""
    shutil.copytree(bundle, copy)
    path = copy / "weights.fp32.bin"
    (np.fromfile(path, np.float32) * np.float32(1.03)).tofile(path)
    return copy


# ---------------------------------------------------------------- the lines


def test_the_lines_run_here_and_pass(saved: Path, tiny_bundle: Path) -> None:
    found = lines(saved, "--onnxrt", *RUNS)
    assert len(found) == len(RUNS)
    for line in found:
        done = status(line, saved, tiny_bundle)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "All outputs matched" in done.stdout


def test_a_changed_weight_makes_the_lines_fail(saved: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    wrong = changed_weights(tiny_bundle, tmp_path / "wrong")
    for line in lines(saved, "--onnxrt", "vision", "post_ecl.decode"):
        done = status(line, saved, wrong)
        assert done.returncode != 0
        assert "Mismatched outputs" in done.stdout


def test_tensorrt_lines_are_understood_by_polygraphy(saved: Path, tiny_bundle: Path) -> None:
    """Without a GPU the most that can be asked: what script Polygraphy makes of them, for both libraries."""
    for run, rtx, library in (("pre_ecl.prefill", "1", "tensorrt_rtx"), ("post_ecl.decode", "0", "tensorrt")):
        (line,) = lines(saved, "--trt", run)
        done = status(line, saved, tiny_bundle, "--gen-script", "-", POLYGRAPHY_USE_TENSORRT_RTX=rtx)
        assert done.returncode == 0, done.stderr
        assert f"mod.lazy_import('{library}>" in done.stdout
        assert "Profile().add(" in done.stdout
        assert "strongly_typed=True" in done.stdout
        assert f"RunResults.load_streaming('{run}.outputs.json'" in done.stdout


def test_tensorrt_for_rtx_builds_an_engine_from_every_line_without_tf32(saved: Path, tiny_bundle: Path) -> None:
    """Building needs no GPU; running does, and without one that is where a line ends."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    found = lines(saved, "--trt", *RUNS)
    assert len(found) == len(RUNS)
    for line in found:
        done = status(line, saved, tiny_bundle, POLYGRAPHY_USE_TENSORRT_RTX="1")
        assert "Finished engine building" in done.stdout, done.stdout + done.stderr
        (flags,) = (text.split("|")[1].strip() for text in done.stdout.splitlines() if text.strip().startswith("Flags "))
        assert flags == "[STRONGLY_TYPED]"
        assert done.returncode == 0 or "Could not deserialize engine" in done.stderr


# ---------------------------------------------------------------- what is saved


def test_runs_are_those_of_the_chain(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    model, runs = runs_of(tiny_bundle, tiny_checkpoint)
    prompt = verify._prompt(model, verify.synthetic_images(1, 56))
    conversation, logits = model.chain.prefill(
        prompt.ids.input_ids, prompt.ids.visual_mask, prompt.pixel_values, keep=4, image_seed=prompt.image_seed
    )
    np.testing.assert_array_equal(runs["score.4"].outputs[names.KEPT_INDICES], conversation.kept_indices)
    np.testing.assert_allclose(runs["post_ecl.prefill"].actual[names.LOGITS][0], logits, rtol=0, atol=1e-5)
    after = model.chain.decode(conversation, int(logits.argmax()))
    np.testing.assert_allclose(runs["post_ecl.decode"].actual[names.LOGITS][0], after, rtol=0, atol=1e-5)


def test_expected_outputs_do_not_come_from_the_graphs(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Graphs with wrong weights give wrong outputs here, and the comparison on this machine says so."""
    wrong = changed_weights(tiny_bundle, tmp_path / "wrong")
    model, runs = runs_of(tiny_bundle, tiny_checkpoint, graphs=wrong)
    failed = {s.name for s in save_runs(tmp_path / "saved", wrong, model.manifest, runs.values()) if not s.passed}
    assert failed == {"vision", "pre_ecl.prefill", "pre_ecl.decode", "post_ecl.prefill", "post_ecl.decode"}


def test_saved_shapes_lie_within_the_profile_they_are_run_with(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    model, runs = runs_of(tiny_bundle, tiny_checkpoint)
    assert tuple(runs) == RUNS
    for run in runs.values():
        profile = run_profile(model.manifest, run)
        assert profile is not None
        for name, shape in profile.shapes.items():
            found = run.inputs[name].shape
            assert all(a <= b <= c for a, b, c in zip(shape.minimum, found, shape.maximum, strict=True)), (run.name, name)


def test_debug_outputs_and_a_random_score_are_saved_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions("llava15", checkpoint=str(tiny_checkpoint), keep=(4,), split_layer=2, debug=True, score_mode="random")
    build_bundle(make_plan(options), tmp_path / "bundle")
    model, runs = runs_of(tmp_path / "bundle", tiny_checkpoint)
    assert {names.tap(0), names.tap(1)} <= set(runs["pre_ecl.decode"].outputs)
    assert {names.tap(2), names.tap(3), names.ALL_LOGITS} <= set(runs["post_ecl.prefill"].outputs)
    assert names.IMAGE_SEED in runs["score.4"].inputs
    assert all(s.passed for s in save_runs(tmp_path / "saved", tmp_path / "bundle", model.manifest, runs.values()))


@pytest.mark.parametrize("form", ["append", "tensor_scatter"])
def test_other_forms_of_the_caches_write_are_saved_as_they_are(form: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """`append` gives new rows alone, and what comes next is given them in the cache; `tensor_scatter` has a fixed capacity."""
    plan = make_plan(BuildOptions("llava15", checkpoint=str(tiny_checkpoint), keep=(4,), split_layer=2, max_context=128))
    manifest = build_bundle(replace(plan, target=replace(plan.target, kv_write=form)), tmp_path / "bundle")
    builder = PromptBuilder(tmp_path / "bundle", manifest)
    prompt = builder.build(verify.QUESTION, verify.synthetic_images(1, 56))
    runs = list(graph_runs(tmp_path / "bundle", manifest, prompt, EagerPrunedLlava(tiny_checkpoint, 2, None, "trace")))
    shapes = {run.name: run.outputs["present.3.key"].shape[2] for run in runs if run.graph == names.POST_ECL}
    rows = len(prompt.ids.input_ids) - 12
    assert shapes == ({"post_ecl.prefill": rows, "post_ecl.decode": 1} if form == "append" else dict.fromkeys(shapes, 128))
    assert all(s.passed for s in save_runs(tmp_path / "saved", tmp_path / "bundle", manifest, runs))


# ---------------------------------------------------------------- the directory


def test_an_earlier_directory_of_its_kind_is_replaced_and_a_foreign_one_left_alone(saved: Path, tiny_bundle: Path, tmp_path: Path,
                                                                                   capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    ours, foreign = tmp_path / "ours", tmp_path / "foreign"
    shutil.copytree(saved, ours)
    save_runs(ours, tiny_bundle, load(tiny_bundle).manifest, ())
    assert json.loads((ours / "saved.json").read_text())["runs"] == []
    assert sorted(path.name for path in ours.iterdir()) == ["README.txt", "no_tf32.py", "saved.json"]
    shutil.copytree(saved, foreign)
    (foreign / "notes.txt").write_text("mine")
    before = tree(foreign)
    assert verify.main([str(tiny_bundle), "--save-inputs", str(foreign)]) == 2
    assert "holds notes.txt, which is not of the directory of saved inputs" in (told := capfd.readouterr().err)
    assert told.rstrip().endswith("choose another --save-inputs")
    assert tree(foreign) == before


def test_a_failure_leaves_no_directory(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, runs = runs_of(tiny_bundle, tiny_checkpoint)

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_runs(tmp_path / "saved", tiny_bundle, model.manifest, runs.values(), stop)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_inside_the_bundle_is_refused(tiny_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(tiny_bundle), "--save-inputs", str(tiny_bundle / "inputs")]) == 2
    assert "is inside the bundle" in capfd.readouterr().err


def test_bfloat16_is_refused(tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = BuildOptions("llava15", checkpoint=str(tiny_checkpoint), target="jetson-orin", precision="bf16", keep=(4,), split_layer=2)
    manifest = build_bundle(make_plan(options), tmp_path / "bundle")
    with pytest.raises(UsageError, match="cannot write bfloat16: numpy, which Polygraphy's files hold, has no such type"):
        check_savable(manifest)
    assert verify.main([str(tmp_path / "bundle"), "--save-inputs", str(tmp_path / "saved")]) == 2
    assert "export the same checkpoint with --precision fp32 or fp16" in capfd.readouterr().err
    assert not (tmp_path / "saved").exists()
