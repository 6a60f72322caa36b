"""The GPU kit without a GPU: the rehearsal runs every piece, what needs a GPU refuses, and nothing passes for a result that is none."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.gpu import __main__ as kit
from benchmarks.gpu import bundles, chart, device, environment, latency, parity, table, transformers
from benchmarks.gpu.latency import Answer, in_turn
from benchmarks.gpu.settings import GPU_BACKENDS, REHEARSAL, RESULTS, Settings
from export.configs import load_model_config
from export.families import find_adapter
from runtime.errors import EngineError
from runtime.manifest import read_manifest
from runtime.pipeline import load
from tests.conftest import ROOT

PIECES = ("environment", "parity-cpu", "bundles", "latency-cpu", "transformers-cpu", "summary")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a rehearsal writes."""
    output = tmp_path_factory.mktemp("gpu") / "out"
    assert kit.main(["--rehearse", "--output", str(output)]) == 0
    return output


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def settings(folder: Path, **changes: Any) -> Settings:
    """Those that the rehearsal had."""
    usual: dict[str, Any] = {"rehearse": True, "runs": 3, "warmup": 1, "new_tokens": 4, "parity_images": 2}
    return Settings(folder, folder / "work", folder, **{**usual, **changes})


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# ---------------------------------------------------------------- the rehearsal


def test_a_rehearsal_writes_every_piece_and_a_summary_marked_as_one(rehearsed: Path) -> None:
    (summary,) = rehearsed.glob("*-gpu-rehearsal.json")
    for path in (*(rehearsed / f"{name}.json" for name in PIECES), summary):
        assert read(path)["note"] == REHEARSAL, path
    assert summary.with_suffix(".md").read_text().startswith(f"**{REHEARSAL}**")
    with Image.open(summary.with_suffix(".png")) as picture:
        assert picture.size == (1375, 572)


def test_the_summary_holds_what_the_pieces_found(rehearsed: Path) -> None:
    (path,) = rehearsed.glob("*-gpu-rehearsal.json")
    found, text = read(path), path.with_suffix(".md").read_text()
    assert found["not_run"] == []
    assert found["left_out"] == {}
    assert found["latency"]["cpu"] == read(rehearsed / "latency-cpu.json")["result"]
    assert set(found["latency"]["cpu"]["times_ms"]) == {"all", "8", "4", "2"}
    assert f"--rehearse --output {rehearsed}" in found["commands"][0]
    for words in ("| post_ecl |", "time to first token", "realised", "transformers, torch.compile / cpu, keep 4", "## Memory", "agrees"):
        assert words in text


def test_a_finished_piece_is_passed_over_unless_asked_for_again(rehearsed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (rehearsed / "latency-cpu.json").read_bytes()
    assert kit.main(["--rehearse", "--output", str(rehearsed), "--part", "latency"]) == 0
    assert "latency-cpu: done on " in capfd.readouterr().out
    assert (rehearsed / "latency-cpu.json").read_bytes() == before
    assert kit.main(["--rehearse", "--output", str(rehearsed), "--part", "latency-cpu", "--again"]) == 0
    assert (rehearsed / "latency-cpu.json").read_bytes() != before


def test_pieces_whose_bundle_is_gone_are_not_taken_as_done(rehearsed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    shutil.copytree(rehearsed, output)
    shutil.rmtree(output / "work" / "rehearsal")
    assert kit.main(["--rehearse", "--output", str(output), "--part", "latency", "--again"]) == 2
    assert "latency-cpu needs bundles, which has not run, or whose files are gone" in capfd.readouterr().err
    assert kit.main(["--rehearse", "--output", str(output), "--part", "bundles"]) == 0
    assert read_manifest(output / "work" / "rehearsal").budgets == (8, 4, 2)


@pytest.mark.parametrize(("options", "message"), [
    (("--runs", "5"), "was made with runs 3: give the same options"),
    (("--part", "nothing"), "unknown --part 'nothing': there are environment, parity, bundles, latency, transformers, summary"),
    (("--runs", "2"), "--runs is 2: give 3 or more"),
    (("--seconds", "0"), "--seconds is 0.0: give more than 0"),
    (("--results", str(RESULTS / "mine")), "a rehearsal is no result and does not write into"),
])  # fmt: skip
def test_what_cannot_be_run_is_refused(rehearsed: Path, options: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert kit.main(["--rehearse", "--output", str(rehearsed), *options]) == 2
    assert message in capfd.readouterr().err


def test_results_of_two_devices_are_not_mixed(rehearsed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    shutil.copytree(rehearsed, output)
    path = output / "latency-cpu.json"
    path.write_text(json.dumps({**read(path), "device": "NVIDIA Something"}))
    assert kit.main(["--rehearse", "--output", str(output)]) == 2
    assert "holds results of NVIDIA Something, this is CPU: choose another --output" in capfd.readouterr().err


def test_a_rehearsal_without_a_folder_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert kit.main(["--rehearse"]) == 2
    assert "name a folder for its files with --output" in capfd.readouterr().err


# ---------------------------------------------------------------- without a GPU, and with one that nvidia-smi tells of


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("part", ["environment", "parity", "bundles", "latency", "transformers", "summary"])
def test_every_part_refuses_without_a_gpu(part: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert kit.main(["--output", str(output), "--part", part]) == 2
    assert "error: no NVIDIA GPU: nvidia-smi is not on the PATH; run this on a machine with one" in capfd.readouterr().err
    assert not output.exists()


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    script = folder / "nvidia-smi"
    script.write_text(
        f"#!/bin/sh\ncase \"$*\" in *query*) echo '{answer}';; *) echo '| Driver Version: 580.1  CUDA Version: 13.0 |';; esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_the_device_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "NVIDIA H100 80GB HBM3, 580.159.04, 9.0, 81559")
    gpu = device.find_gpu(0)
    assert gpu == device.Gpu("NVIDIA H100 80GB HBM3", "580.159.04", "13.0", 90, 81559 << 20)
    assert gpu.slug == "nvidia-h100-80gb-hbm3"
    fake_nvidia_smi(tmp_path, monkeypatch, "No devices were found")
    with pytest.raises(EngineError, match="nvidia-smi answered 'No devices were found' about GPU 3"):
        device.find_gpu(3)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU, on which backends may run")
def test_a_machine_where_no_backend_runs_gets_reasons_and_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU, but for the GPU: what runs for real is told apart from a rehearsal, and nothing is measured or invented."""
    fake_nvidia_smi(tmp_path, monkeypatch, "NVIDIA H100 80GB HBM3, 580.159.04, 9.0, 81559")
    output, results = tmp_path / "out", tmp_path / "results"
    options = ["--output", str(output), "--results", str(results)]
    assert kit.main([*options, "--part", "environment", "--part", "parity"]) == 0
    found = read(output / "environment.json")
    assert "note" not in found
    assert found["device"] == "NVIDIA H100 80GB HBM3"
    assert found["result"]["gpu"]["capability"] == 90
    for backend in GPU_BACKENDS:
        tried = found["result"]["backends"][backend]
        assert tried["runs"] is False
        assert len(tried["reason"]) > 20
        assert read(output / f"parity-{backend}.json")["result"]["skipped"] == tried["reason"]
    assert kit.main([*options, "--part", "latency"]) == 2
    assert "latency-cuda needs bundles, which has not run" in capfd.readouterr().err
    assert kit.main([*options, "--part", "summary"]) == 2
    assert "holds no latency of any backend" in capfd.readouterr().err
    assert not results.exists()


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU, on which they run")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_backend_that_cannot_run_is_told_with_its_reason(backend: str, rehearsed: Path) -> None:
    found = environment._in_child([str(rehearsed / "work" / "tiny-llava-fp32"), backend, "0"])
    assert found["runs"] is False
    assert len(found["reason"]) > 20


def test_a_process_that_dies_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)  # nothing to import there
    monkeypatch.delenv("PYTHONPATH", raising=False)
    found = environment._in_child(["bundle", "cpu", "0"])
    assert not found["runs"]
    assert found["reason"].startswith(("its process ended with status 1", "bundle is not a directory"))


def test_engines_of_tensorrt_for_rtx_are_for_the_device_or_the_oldest_it_knows() -> None:
    assert bundles.rtx_capabilities(89) == (89,)
    assert bundles.rtx_capabilities(90) == (80,)
    with pytest.raises(EngineError, match="the device is SM75: use ONNX Runtime CUDA"):
        bundles.rtx_capabilities(75)


# ---------------------------------------------------------------- figures


def test_contenders_take_turns_in_being_first_and_stop_in_time(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []

    def contender(name: str) -> Callable[[int], str]:
        def call(number: int) -> str:
            calls.append((name, number))
            return name

        return call

    rounds = in_turn([contender("a"), contender("b"), contender("c")], settings(tmp_path, runs=3, warmup=1))
    assert rounds == [("a", "b", "c")] * 3
    assert [name for name, _ in calls[::3]] == ["a", "b", "c", "a"]
    assert len(in_turn([contender("a")], settings(tmp_path, runs=1000, seconds=1e-9))) == 3


def test_ratios_are_times_of_keeping_all_over_the_budgets(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    dense = [Answer(1, 2, 0, 3, 0, 9 + i, 20, 3, 4, 40) for i in range(4)]
    pruned = [Answer(1, 2, 0, 3, 1, 2 + i / 3, 10, 2, 2, 20) for i in range(4)]
    found = latency.compare(manifest, {None: dense, 4: pruned}, 32)["4"]
    assert found["decoder"]["median"] == pytest.approx(np.median([(12 + i) / (6 + i / 3) for i in range(4)]))
    assert found["realised"]["median"] == pytest.approx(found["decoder"]["median"] / found["flops_ratio"])
    assert found["score_share"]["median"] == pytest.approx(np.median([1 / (12 + i) for i in range(4)]))
    assert (found["first_token"]["median"], found["per_token"]["median"], found["total"]["median"]) == (2, 2, 2)


def test_a_backend_that_answers_otherwise_does_not_agree(rehearsed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, wrong = rehearsed / "work" / "tiny-llava-fp32", tmp_path / "wrong"
    images = parity.heldout_images(2)
    assert parity.compare(good, "cpu", 0, images)["agrees"]
    shutil.copytree(good, wrong)
    path = wrong / "weights.fp32.bin"
    (np.fromfile(path, np.float32) * np.float32(1.01)).tofile(path)
    monkeypatch.setattr(device, "open_model", lambda bundle, backend, _: load(bundle if backend == "cpu" else wrong, check_hashes=False))
    found = parity.compare(good, "cuda", 0, images)
    assert not found["agrees"]
    assert found["largest_logits_error"] > found["tolerance"]


def test_a_piece_that_differs_gives_exit_status_1(rehearsed: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(rehearsed, output)
    found = read(output / "parity-cpu.json")
    found["result"]["agrees"] = False
    (output / "parity-cpu.json").write_text(json.dumps(found))
    assert kit.main(["--rehearse", "--output", str(output), "--part", "parity"]) == 1


def test_transformers_is_timed_on_what_it_computes_without_a_cache(rehearsed: Path) -> None:
    import torch

    rehearsal = settings(rehearsed, new_tokens=6)
    subject = latency.Subject.of(load(rehearsal.bundle), 6)
    baseline = transformers.Baseline.make(rehearsal, subject)
    for number in (0, 1):  # the static cache is used again
        ids, pixels = baseline._prompt(number)
        tokens = torch.from_numpy(ids)[None]
        for _ in range(6):
            logits = baseline.model(input_ids=tokens, pixel_values=torch.from_numpy(pixels), use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        expected = tuple(tokens[0, len(ids) :].tolist())
        assert baseline.eager(number).tokens == expected
        assert baseline.compiled(number).tokens == expected


def test_transformers_gets_the_geometry_of_the_models_config() -> None:
    spec = load_model_config("llava15").spec
    assert spec is not None
    assert find_adapter("llava15").describe(transformers.llava_config(spec).to_dict()) == spec


def test_the_document_names_the_device_its_versions_and_what_is_missing(rehearsed: Path) -> None:
    (path,) = rehearsed.glob("*-gpu-rehearsal.json")
    found = read(path)
    del found["note"]
    found["gpu"] = {"name": "NVIDIA Test", "driver": "1.2", "cuda": "13.0", "capability": 89, "memory_bytes": 8 << 30}
    found["device"] = "NVIDIA Test"
    found["latency"] = {"cuda": found["latency"]["cpu"], "tensorrt": found["latency"]["cpu"]}
    found["backends"]["tensorrt_rtx"] = {"runs": True, "reason": None, "engine_capabilities": [80]}
    found["engines"] = {"tensorrt": {"engines": [{}, {}], "seconds": 61.0, "weights_ratio": 1.01}}
    found["left_out"], found["not_run"] = {"latency-tensorrt_rtx": "it did not answer"}, ["transformers-tensorrt"]
    text = table.describe(found, "picture.png")
    for words in (
        "# NVIDIA Test, 20", "compute capability 8.9, 8.6 GB; driver 1.2, CUDA up to 13.0", "## cuda: one image", "## tensorrt: one image",
        "| tensorrt_rtx | yes, with engines for SM80 |", "Engines of tensorrt: 2 in 61 s, 1.010 times the bundle's weights.",
        "- latency-tensorrt_rtx left out: it did not answer", "- transformers-tensorrt: not run",
    ):  # fmt: skip
        assert words in text
    assert REHEARSAL not in text
    picture = io.BytesIO()
    chart.draw(found, picture)
    assert picture.getvalue().startswith(b"\x89PNG")


# ---------------------------------------------------------------- wheels


def test_wheels_are_cut_into_parts_and_joined(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, parts, joined = (tmp_path / name for name in ("wheels", "wheels-parts", "joined"))
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a-1.whl", 2500), ("b-2.whl", 10), ("empty.whl", 0)):
        (folder / name).write_bytes(rng.bytes(size))
    assert kit.main(["wheels", str(folder), "--part-size", "1KB"]) == 0
    assert "3 parts in" in capfd.readouterr().out
    sizes = [sum(f.stat().st_size for f in part.iterdir()) for part in sorted(p for p in parts.iterdir() if p.is_dir())]
    assert sizes == [1000, 1000, 510]
    assert kit.main(["wheels", str(parts), "--join", "--output", str(joined)]) == 0
    assert {p.name: p.read_bytes() for p in joined.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(("damage", "message"), [
    (lambda parts: (parts / "001" / "a.whl").write_bytes(b"x" * 1000), "a.whl differs from what was cut: copy the parts again"),
    (lambda parts: (parts / "001" / "a.whl").unlink(), "001/a.whl: No such file or directory; copy the parts again"),
    (lambda parts: (parts / "wheels.json").unlink(), "holds no wheels.json that can be read"),
])  # fmt: skip
def test_parts_that_are_not_whole_are_refused(tmp_path: Path, damage: Any, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a.whl").write_bytes(bytes(2500))
    assert kit.main(["wheels", str(tmp_path / "wheels"), "--part-size", "1KB", "--output", str(tmp_path / "parts")]) == 0
    damage(tmp_path / "parts")
    assert kit.main(["wheels", str(tmp_path / "parts"), "--join", "--output", str(tmp_path / "joined")]) == 2
    assert message in capfd.readouterr().err


def test_the_kits_lines_in_its_readme_are_understood(capfd: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    lines = [
        line.split("#")[0].split() for line in text.splitlines() if line.startswith("python -m benchmarks.gpu") and "wheels" not in line
    ]
    assert len(lines) > 5
    for line in lines:
        kit.build_parser().parse_args(line[3:])
