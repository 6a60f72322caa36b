"""tiny-llava for RTX cards with two budgets, from the command line: engines of all graphs, manifest, plan and refusals. Needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest

from export import build
from runtime.engine_memory import off
from runtime.manifest import Manifest, check_files, read_manifest
from runtime.memory_plan import ACTIVATIONS, BESIDE, WEIGHTS
from runtime.names import REPORT_FILE

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed: pip install tensorrt-rtx-cu13"
)
GRAPHS = ["vision", "pre_ecl", "post_ecl", "score.16", "score.8"]
COMMAND = ["--model", "tiny-llava", "--keep", "16,8", "--target"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The bundle, and the seconds that its build took."""
    output, began = tmp_path_factory.mktemp("tiny") / "bundle", time.perf_counter()
    assert build.main([*COMMAND, "rtx", "--output", str(output)]) == 0
    return output, time.perf_counter() - began


@pytest.fixture
def manifest(bundle: tuple[Path, float]) -> Manifest:
    return read_manifest(bundle[0])


def test_one_command_ends_with_engines_of_all_graphs(bundle: tuple[Path, float], manifest: Manifest) -> None:
    check_files(bundle[0], manifest)
    assert (manifest.target, manifest.engine, manifest.precision, manifest.kv_write) == ("rtx", "tensorrt_rtx", "fp16", "tensor_scatter")
    assert list(manifest.graphs) == [engine.graph for engine in manifest.engines] == GRAPHS
    assert {engine.capabilities for engine in manifest.engines} == {(80, 86, 89, 120)}
    assert bundle[1] < 120  # measured: 11 s


def test_both_budgets_share_one_post_ecl_engine_and_its_prefill_profile(manifest: Manifest) -> None:
    """Measured to be smaller than a profile for each: `python -m benchmarks.budget_profiles`."""
    (post,) = [engine for engine in manifest.engines if engine.graph == "post_ecl"]
    assert [profile.name for profile in post.profiles] == ["prefill", "append", "decode"]
    rows = post.profiles[0].shapes["hidden_states"]
    assert (rows.minimum[1], rows.optimum[1], rows.maximum[1]) == (8, 16 + 64, 64 + 256), "from the smallest budget to all of an image"
    assert not [name for name in post.profiles[0].shapes if name.startswith("past")], "the caches have one length"


def test_plan_and_log_agree_and_the_manifest_holds_both(manifest: Manifest) -> None:
    memory = manifest.memory
    assert memory is not None
    stages = ("vision", "pre_ecl", "post_ecl")
    names = {*(WEIGHTS.format(s) for s in stages), *(ACTIVATIONS.format(s) for s in (*stages, "score")), BESIDE}
    assert {item.name for item in memory.measured} == names
    assert {item.name: (item.planned_bytes, item.bytes) for item in memory.measured if off(item)} == {}
    assert memory.fits is True


def test_the_report_says_what_the_target_got(bundle: tuple[Path, float]) -> None:
    told = json.loads((bundle[0] / REPORT_FILE).read_text(encoding="utf-8"))["targets"]["rtx"]
    assert (told["precision"], told["kv_write"], told["head_pieces"]) == ("fp16", "tensor_scatter", 1)


def test_a_card_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert build.main([*COMMAND, "rtx-30", "--device-memory", "1GB", "--output", str(tmp_path / "b")]) == 2
    err = capfd.readouterr().err
    assert "and rtx-30 has 0.54 GB for it (1 GiB less 0.5 GiB for the system): " in err
    assert "nothing of this model fits: choose a device with more memory" in err
    assert list(tmp_path.iterdir()) == []
