"""All four graphs at LLaVA-1.5-7B's real widths become engines here: d = 4096, 32 heads of 128, 32,064 words, 576 visual tokens, C = 2048.

One layer in each half, and two of the vision tower's: depth changes how large engines are, not whether they can be built.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export.configs import load_model_config
from export.families import find_adapter
from export.graphs.builder import GraphBuilder
from export.graphs.clip import build_clip_vision
from export.graphs.decoder import HalfSpec, ReadWeight, build_decoder_half, post_ecl, pre_ecl
from export.graphs.kv_write import TENSOR_SCATTER
from export.graphs.score import ScoreSpec, build_score
from export.spec import DecoderSpec
from export.weights import WeightFile
from runtime import names
from runtime.engines.tensorrt_builder import BuiltEngine, EngineSpec
from runtime.engines.tensorrt_process import build_in_child
from runtime.engines.tensorrt_profiles import make_profile

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed: pip install tensorrt-rtx-cu13"
)
CAPACITY, KEEP, TEXT, DTYPE = 2048, 166, 256, "float16"
CAPABILITIES = (80, 86, 89, 120)
Build = Callable[[WeightFile], GraphBuilder]


def engine(folder: Path, graph: str, build: Build, rows: dict[str, tuple[int, int, int]], dimension: str) -> tuple[BuiltEngine, int]:
    """Exports a graph and builds its engine for four generations; also returns its weights' bytes."""
    folder = folder / graph
    folder.mkdir()
    with WeightFile(folder / "weights.bin") as weights:
        builder = build(weights)
        size = weights.info().bytes
    builder.save(folder / f"{graph}.onnx")
    sizes = {name: {dimension: r, "capacity": (CAPACITY,) * 3} for name, r in rows.items()}
    profiles = tuple(make_profile(graph, builder.inputs, name, given) for name, given in sizes.items())
    return build_in_child(
        EngineSpec(
            graph, str(folder / f"{graph}.onnx"), str(folder / f"{graph}.engine"), "tensorrt_rtx", CAPABILITIES, profiles,
            tf32=graph != names.SCORE,
        )
    ), size  # fmt: skip


def _half(decoder: DecoderSpec, half: HalfSpec, read: ReadWeight, weights: WeightFile) -> GraphBuilder:
    return build_decoder_half(decoder, half, read, weights, CAPACITY)


def test_all_four_graphs_build_at_llava_7bs_widths(tmp_path: Path) -> None:
    spec = load_model_config("llava15").spec
    assert spec is not None
    assert (spec.decoder.hidden_size, spec.decoder.query_heads, spec.decoder.head_size) == (4096, 32, 128)
    decoder, vision = dataclasses.replace(spec.decoder, layers=2), dataclasses.replace(spec.vision, layers=2)
    shapes, random = find_adapter(spec.family).shapes(dataclasses.replace(spec, decoder=decoder, vision=vision)), np.random.default_rng(0)
    block = random.standard_normal(1 << 20, dtype=np.float32) * np.float32(0.02)
    n = vision.visual_tokens

    def read(name: str) -> np.ndarray:
        return np.resize(block, shapes[name])

    halves = (
        (pre_ecl(1, dtype=DTYPE, kv_write=TENSOR_SCATTER, capacity=CAPACITY), n),
        (post_ecl(1, 2, dtype=DTYPE, kv_write=TENSOR_SCATTER, capacity=CAPACITY), KEEP),
    )
    for half, least in halves:
        rows = {"prefill": (least, least + 64, n + TEXT), "append": (1, 64, TEXT), "decode": (1, 1, 8)}
        build = functools.partial(_half, decoder, half, read)
        built, weights = engine(tmp_path, half.name, build, rows, "sequence")
        assert built.info.attention_kernels == (1, 1, 1), "fused in prefill, append and decode"
        assert built.file.bytes <= 1.05 * weights, "held once"
        assert max(built.info.activation_bytes) < 100e6  # measured: 79 MB
        assert built.info.peak_rss_bytes is None or built.info.peak_rss_bytes < 3e9  # measured: 2.2 GB
    built, weights = engine(
        tmp_path, names.VISION, lambda file: build_clip_vision(vision, read, file, DTYPE), {"image": (1, 1, 1)}, "images"
    )
    assert built.info.attention_kernels == (2,)
    score = ScoreSpec(
        heads=decoder.query_heads, head_size=decoder.head_size, hidden_size=decoder.hidden_size, position_rows=1, keep=KEEP, mode="trace",
        grid_width=vision.grid, visual_tokens=None, dtype=DTYPE,
    )  # fmt: skip
    built, _ = engine(tmp_path, names.SCORE, lambda _: build_score(score), {"image": (KEEP, n, n)}, "N")
    assert max(built.info.activation_bytes) < 40e6  # measured: 22 MB
