"""The four graphs at LLaVA-1.5-7B's widths become engines for RTX cards: sizes, fused attention, and memory as planned. Needs no GPU.

One layer in each half and in the vision tower, random weights: what is wide is as wide as in the real model (d = 4096, 32 heads of 128, a
vocabulary of 32,064, 576 visual tokens), and nothing depends on the depth but weights and caches.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from pathlib import Path

import numpy as np
import pytest

from export.configs import load_model_config, load_target_config
from export.families import find_adapter
from export.graphs.builder import GraphBuilder
from export.graphs.clip import build_clip_vision
from export.graphs.decoder import build_decoder_half, post_ecl, pre_ecl
from export.graphs.score import ScoreSpec, build_score
from export.memory_plan import MemoryRequest, plan_memory
from export.spec import ModelSpec
from export.weights import WeightFile
from runtime.engine_files import CompileOptions, build_graph
from runtime.engine_memory import measured_plan, off
from runtime.engines.tensorrt_builder import BuiltEngine
from runtime.manifest import FileInfo, GraphInfo, Manifest, read_manifest
from runtime.memory_plan import ACTIVATIONS, MemoryPlan

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed: pip install tensorrt-rtx-cu13"
)
CAPABILITIES = (80, 86, 89, 120)
CONTEXT, KEEP, DTYPE = 2048, 166, "float16"
MAX_MEMORY_BYTES = 8e9  # measured: 2.2e9
MAX_SECONDS = 120  # measured: 38 s on two cores of an AMD EPYC, shared


def one_layer_each() -> ModelSpec:
    spec = load_model_config("llava15").spec
    assert spec is not None
    decoder, vision = dataclasses.replace(spec.decoder, layers=2), dataclasses.replace(spec.vision, layers=1)
    return dataclasses.replace(spec, decoder=decoder, vision=vision)


def export(spec: ModelSpec, folder: Path) -> dict[str, GraphBuilder]:
    """Writes the graphs of the target `rtx`, with random weights of the real shapes."""
    shapes, rng = find_adapter(spec.family).shapes(spec), np.random.default_rng(0)

    def read(name: str) -> np.ndarray:
        return rng.standard_normal(shapes[name], dtype=np.float32) * np.float32(0.02)

    target, d = load_target_config("rtx"), spec.decoder
    form = {"dtype": DTYPE, "kv_write": target.kv_write, "capacity": CONTEXT}
    score = ScoreSpec(
        heads=d.query_heads, head_size=d.head_size, hidden_size=d.hidden_size, position_rows=1, keep=KEEP, mode="trace",
        grid_width=spec.vision.grid, visual_tokens=None, dtype=DTYPE,
    )  # fmt: skip
    with WeightFile(folder / "weights.fp16.bin") as file:
        graphs = {"vision": build_clip_vision(spec.vision, read, file, DTYPE)}
        for half in (pre_ecl(1, **form), post_ecl(1, 2, **form)):  # type: ignore[arg-type]
            graphs[half.name] = build_decoder_half(d, half, read, file, CONTEXT)
    graphs[f"score.{KEEP}"] = build_score(score)
    for name, builder in graphs.items():
        builder.save(folder / f"{name}.onnx")
    return graphs


def manifest_of(spec: ModelSpec, graphs: dict[str, GraphBuilder], folder: Path, other: Manifest) -> Manifest:
    """A manifest for these graphs, after another bundle's."""
    d = spec.decoder
    geometry = dataclasses.replace(
        other.geometry, layers=d.layers, hidden_size=d.hidden_size, query_heads=d.query_heads, kv_heads=d.kv_heads, head_size=d.head_size,
        vocab_size=d.vocab_size, visual_tokens=spec.vision.visual_tokens,
    )  # fmt: skip
    files = {path.name: FileInfo(path.stat().st_size, "") for path in folder.iterdir()} | {other.embedding: FileInfo(1, "")}
    listed = {name: GraphInfo(f"{name}.onnx", builder.inputs, builder.outputs) for name, builder in graphs.items()}
    return dataclasses.replace(
        other, schema_version=3, geometry=geometry, split_layer=1, budgets=(KEEP,), max_context=CONTEXT, graphs=listed, files=files,
        precision="fp16", kv_write="tensor_scatter", engine="tensorrt_rtx", memory=None, flops={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryPlan, dict[str, BuiltEngine], int, float]:
    """The plan, the engines, the weight file's bytes, and the seconds that it all took."""
    folder, spec, began = tmp_path_factory.mktemp("wide"), one_layer_each(), time.perf_counter()
    graphs = export(spec, folder)
    manifest = manifest_of(spec, graphs, folder, read_manifest(tiny_bundle))
    engines = {}
    for graph in manifest.graphs:
        engines[graph] = build_graph(folder, manifest, graph, CompileOptions("tensorrt_rtx", CAPABILITIES))
        (folder / engines[graph].info.file).unlink()
    weights = (folder / "weights.fp16.bin").stat().st_size
    (folder / "weights.fp16.bin").unlink()
    plan = plan_memory(MemoryRequest(spec, load_target_config("rtx"), "fp16", 1, KEEP, CONTEXT))
    return plan, engines, weights, time.perf_counter() - began


def test_all_four_graphs_build_in_little_time_and_memory(built: tuple[MemoryPlan, dict[str, BuiltEngine], int, float]) -> None:
    _, engines, _, seconds = built
    assert list(engines) == ["vision", "pre_ecl", "post_ecl", f"score.{KEEP}"]
    assert {engine.info.capabilities for engine in engines.values()} == {CAPABILITIES}
    assert max(engine.info.peak_rss_bytes or 0 for engine in engines.values()) < MAX_MEMORY_BYTES
    assert seconds < MAX_SECONDS


def test_weights_are_held_once_and_attention_is_fused(built: tuple[MemoryPlan, dict[str, BuiltEngine], int, float]) -> None:
    _, engines, weights, _ = built
    assert 0.99 < sum(engine.info.weights_bytes or 0 for engine in engines.values()) / weights < 1.05  # measured: 1.000
    assert sum(engine.file.bytes for engine in engines.values()) / weights < 1.05  # measured: 1.02
    kernels = {name: engine.info.attention_kernels for name, engine in engines.items()}
    assert kernels == {"vision": (1,), "pre_ecl": (1, 1, 1), "post_ecl": (1, 1, 1), f"score.{KEEP}": (0,)}


def test_the_memory_plan_is_what_the_log_says(built: tuple[MemoryPlan, dict[str, BuiltEngine], int, float]) -> None:
    """Every row within 10 % or 8 MB, and the whole within 5 %.

    But for the halves' activations, which with one layer are 0.87 of what is planned: from two layers on they are within 10 %
    (`test_activations_are_within_10_percent_of_what_was_logged_at_7b_widths`).
    """
    plan, engines, _, _ = built
    measured = measured_plan(plan, list(engines.values()))
    assert len(measured.measured) == 8
    halves = {ACTIVATIONS.format("pre_ecl"), ACTIVATIONS.format("post_ecl")}
    assert {item.name: (item.planned_bytes, item.bytes) for item in measured.measured if off(item) and item.name not in halves} == {}
    for name in halves:
        assert 0.8 < measured.bytes_of(name) / plan.bytes_of(name) <= 1, name
    assert measured.total_bytes == pytest.approx(plan.total_bytes, rel=0.05)
