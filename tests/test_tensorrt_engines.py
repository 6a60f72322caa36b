"""Real engines of TensorRT for RTX, which builds them without a GPU: all graphs, all forms of the cache's write, weights held once."""

from __future__ import annotations

import dataclasses
import importlib.util
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.build import build_bundle
from export.graphs.decoder import build_decoder_half, pre_ecl
from export.graphs.kv_write import KV_WRITES, TENSOR_SCATTER
from export.plan import BuildOptions, make_plan
from export.spec import DecoderSpec
from export.weights import WeightFile
from runtime.compile import MAX_WEIGHTS_RATIO, weights_ratio
from runtime.engine_files import CompileOptions, compile_bundle
from runtime.engines.tensorrt_builder import BuiltEngine, EngineSpec
from runtime.engines.tensorrt_process import build_in_child
from runtime.engines.tensorrt_profiles import make_profile
from runtime.errors import EngineError
from runtime.manifest import check_files, read_manifest
from runtime.pipeline import load

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed: pip install tensorrt-rtx-cu13"
)
RTX = "tensorrt_rtx"
CAPABILITIES = (80, 86, 89, 120)
LAYERS = 6  # of each half of tiny-llava
DECODE = (1, 1, 8)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, BuiltEngine]]:
    """tiny-llava in fp16 with two budgets, and the engines of its graphs."""
    folder = tmp_path_factory.mktemp("engines") / "bundle"
    build_bundle(
        dataclasses.replace(make_plan(BuildOptions("tiny-llava", keep=(16, 8), split_layer=6, score_mode="trace")), precision="fp16"),
        folder,
    )
    engines = compile_bundle(folder, CompileOptions(RTX, CAPABILITIES))
    return folder, {engine.info.graph: engine for engine in engines}


def test_all_graphs_of_the_shipped_model_build_for_four_generations(compiled: tuple[Path, dict[str, BuiltEngine]]) -> None:
    folder, engines = compiled
    assert list(engines) == ["vision", "pre_ecl", "post_ecl", "score.16", "score.8"]
    manifest = read_manifest(folder)
    assert manifest.engines == tuple(engine.info for engine in engines.values())
    check_files(folder, manifest)
    for engine in engines.values():
        assert engine.info.capabilities == CAPABILITIES
        assert len(engine.info.activation_bytes) == len(engine.info.profiles)
        assert 1e6 < max(engine.info.activation_bytes) < 20e6  # measured: 8.3 to 10.4 MB
        assert engine.info.peak_rss_bytes is None or engine.info.peak_rss_bytes < 1e9  # measured: 0.33 to 0.39 GB
    assert load(folder).generate("hello", max_new_tokens=2).text is not None


def test_attention_is_fused_in_prefill_append_and_decode(compiled: tuple[Path, dict[str, BuiltEngine]]) -> None:
    """By the layers' names in the build log; the score has no attention."""
    _, engines = compiled
    assert engines["vision"].info.attention_kernels == (4,)
    for half in ("pre_ecl", "post_ecl"):
        assert [profile.name for profile in engines[half].info.profiles] == ["prefill", "append", "decode"]
        assert engines[half].info.attention_kernels == (LAYERS,) * 3
    assert engines["score.16"].info.attention_kernels == (0,)


def test_weights_are_held_once(compiled: tuple[Path, dict[str, BuiltEngine]]) -> None:
    folder, engines = compiled
    ratio = weights_ratio(read_manifest(folder), list(engines.values()))
    assert ratio is not None
    assert 0.99 < ratio <= MAX_WEIGHTS_RATIO  # measured: 1.004


# ---------------------------------------------------------------- one layer, of any width


def one_layer(folder: Path, width: int, decode: tuple[int, int, int] = DECODE, **settings: Any) -> tuple[BuiltEngine, int]:
    """Builds the engine of one random layer; also returns its weights' bytes."""
    spec = DecoderSpec(
        layers=2, hidden_size=width, intermediate_size=width * 11 // 4, query_heads=width // 64, kv_heads=width // 64, head_size=64,
        vocab_size=64, rms_norm_eps=1e-5, rope_theta=1e4, max_positions=512,
    )  # fmt: skip
    wide = {"gate": (width * 11 // 4, width), "up": (width * 11 // 4, width), "down": (width, width * 11 // 4)}
    rng = np.random.default_rng(0)

    def read(name: str) -> np.ndarray:
        if "norm" in name:
            return np.ones(width, np.float32)
        shape = next((shape for part, shape in wide.items() if f"{part}_proj" in name), (width, width))
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(width**-0.5)

    folder.mkdir(exist_ok=True)
    half = pre_ecl(1, **{"dtype": "float16", **settings})
    with WeightFile(folder / "weights.bin") as weights:
        builder = build_decoder_half(spec, half, read, weights, 512)
        size = weights.info().bytes
    builder.save(folder / "pre_ecl.onnx")
    sizes = {"prefill": (64, 128, 192), "decode": decode}
    profiles = tuple(make_profile("pre_ecl", builder.inputs, n, {"sequence": r, "capacity": (256,) * 3}) for n, r in sizes.items())
    job = EngineSpec("pre_ecl", str(folder / "pre_ecl.onnx"), str(folder / "pre_ecl.engine"), RTX, (86,), profiles)
    return build_in_child(job), size


@pytest.mark.parametrize(
    ("decode", "least", "most"), [(DECODE, 0.95, 1.05), ((1, 1, 1), 1.9, 2.1)], ids=["1 to 8 tokens", "control: 1 token"]
)
def test_an_engine_grows_as_its_weights_do(decode: tuple[int, int, int], least: float, most: float, tmp_path: Path) -> None:
    """Engine bytes over weight bytes, from the difference of two widths: kernels and tables, a few MB in each engine, drop out.

    A decode profile that is fixed at one token is the control: it holds the weights twice.
    """
    (small, small_weights), (large, large_weights) = (one_layer(tmp_path / str(width), width, decode) for width in (512, 1024))
    ratio = (large.file.bytes - small.file.bytes) / (large_weights - small_weights)
    assert least <= ratio <= most
    assert large.info.weights_bytes is not None
    assert least <= large.info.weights_bytes / large_weights <= most


@pytest.mark.parametrize("form", KV_WRITES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_form_of_the_caches_write_builds_with_fused_attention(form: str, dtype: str, tmp_path: Path) -> None:
    capacity = 256 if form == TENSOR_SCATTER else None
    built, _ = one_layer(tmp_path, 256, dtype=dtype, kv_write=form, capacity=capacity)
    assert built.info.attention_kernels == (1, 1)


def test_fp32_attention_is_not_counted_as_fused(tmp_path: Path) -> None:
    """The control of the test above: the library has no fused kernel for fp32."""
    built, _ = one_layer(tmp_path, 256, dtype="float32")
    assert built.info.attention_kernels == (0, 0)


def test_the_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (one_layer(tmp_path / str(i), 256)[0] for i in range(2))
    assert first.file == second.file


# ---------------------------------------------------------------- errors


def test_an_operator_that_is_not_supported_is_named_with_its_node(tmp_path: Path) -> None:
    node = onnx.helper.make_node("NonZero", ["x"], ["y"], name="where_to")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4, 4])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, None)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]), opset_imports=[onnx.helper.make_opsetid("", 20)])
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(EngineError, match=r"cannot build odd: the operator NonZero of node 0 \(where_to\) is not supported: .*export"):
        build_in_child(EngineSpec("odd", str(tmp_path / "odd.onnx"), str(tmp_path / "odd.engine"), RTX, (86,)))
    (tmp_path / "odd.onnx").write_bytes(b"hello world")
    with pytest.raises(EngineError, match=r"odd: odd\.onnx holds no graph that tensorrt_rtx can read"):
        build_in_child(EngineSpec("odd", str(tmp_path / "odd.onnx"), str(tmp_path / "odd.engine"), RTX, (86,)))
    assert {path.name for path in tmp_path.iterdir()} == {"odd.onnx"}


def test_a_build_that_is_killed_is_told_and_leaves_the_bundle_as_it_was(
    compiled: tuple[Path, dict[str, BuiltEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills the builder two thirds of a second into the build of `pre_ecl`, which takes several."""
    folder, _ = compiled
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    start = subprocess.Popen

    def started(*args: Any, **kwargs: Any) -> Any:
        child = start(*args, **kwargs)
        if "pre_ecl" in building:
            threading.Timer(0.66, child.send_signal, (signal.SIGKILL,)).start()
        return child

    building: list[str] = []
    monkeypatch.setattr("runtime.engines.tensorrt_process.subprocess.Popen", started)
    with pytest.raises(EngineError, match=r"the builder of pre_ecl was killed .*: most likely the system ran out of memory"):
        compile_bundle(folder, CompileOptions(RTX, (86,)), lambda graph, built: building.append(graph))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    check_files(folder, read_manifest(folder))
