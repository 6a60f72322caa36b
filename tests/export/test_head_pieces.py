"""The language-model head in pieces, for engines that cannot allocate what the whole takes: the same logits, and pieces that stay apart."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from export import build
from export.configs import load_model_config, load_target_config
from export.graphs.decoder import HalfSpec, build_decoder_half, post_ecl
from export.memory_plan import HEAD_SCRATCH, MemoryRequest, plan_memory
from export.plan import BuildOptions, make_plan
from export.report import describe_plan
from export.spec import DecoderSpec, head_widths
from export.targets import TargetConfig
from export.weights import WeightFile
from runtime import names
from runtime.engines.onnxruntime import session_options
from runtime.engines.tensorrt_builder import EngineSpec, build_engine
from runtime.engines.tensorrt_log import BuildLog
from runtime.engines.tensorrt_profiles import make_profile
from runtime.errors import UsageError
from runtime.manifest import read_manifest
from runtime.names import REPORT_FILE
from runtime.pipeline import load

ROWS, CAPACITY = 5, 16


def decoder(vocab_size: int, tied: bool = False, width: int = 32) -> DecoderSpec:
    return DecoderSpec(
        layers=2, hidden_size=width, intermediate_size=2 * width, query_heads=4, kv_heads=4, head_size=width // 4, vocab_size=vocab_size,
        rms_norm_eps=1e-5, rope_theta=1e4, max_positions=64, tied_embeddings=tied,
    )  # fmt: skip


def export(folder: Path, spec: DecoderSpec, half: HalfSpec) -> tuple[Path, dict[str, tuple[int, ...]]]:
    """Writes a half with seeded weights; also returns the shapes of the head's tensors."""
    d, m = spec.hidden_size, spec.intermediate_size
    shapes = {"norm": (d,), "gate": (m, d), "up": (m, d), "down": (d, m), "lm_head": (spec.vocab_size, d), "embed": (spec.vocab_size, d)}

    def read(name: str) -> np.ndarray:
        shape = next((shape for part, shape in shapes.items() if part in name), (d, d))
        return np.random.default_rng(sum(name.encode())).standard_normal(shape, dtype=np.float32) * np.float32(d**-0.5)

    path = folder / f"post_ecl.{half.head_pieces}.onnx"
    with WeightFile(path.with_suffix(".bin")) as weights:
        builder = build_decoder_half(spec, half, read, weights, 64)
    builder.save(path)
    graph = onnx.load(path, load_external_data=False).graph
    return path, {t.name: tuple(t.dims) for t in graph.initializer if t.name.startswith(("lm_head", "embed"))}


def logits(path: Path, spec: DecoderSpec, dtype: str) -> list[np.ndarray]:
    """The outputs that are logits, for a seeded input."""
    session = ort.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
    rows = np.random.default_rng(0).standard_normal((1, ROWS, spec.hidden_size)).astype(dtype)
    cache = np.zeros((1, spec.kv_heads, CAPACITY, spec.head_size), dtype)
    feeds = {
        names.HIDDEN_STATES: rows, names.POSITION_IDS: np.arange(ROWS).reshape(1, 1, -1), names.PAST_LENGTH: np.zeros(1, np.int64),
        names.LAST_INDEX: np.array([2]), names.past_key(1): cache, names.past_value(1): cache,
    }  # fmt: skip
    wanted = [o.name for o in session.get_outputs() if "logits" in o.name]
    found: list[np.ndarray] = session.run(wanted, feeds)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("vocab", "tied", "debug"), [(48, False, False), (41, True, True)])
def test_a_head_in_pieces_gives_the_same_logits(dtype: str, vocab: int, tied: bool, debug: bool, tmp_path: Path) -> None:
    spec = decoder(vocab, tied)
    whole, _ = export(tmp_path, spec, post_ecl(1, 2, dtype=dtype, debug=debug))
    expected = logits(whole, spec, dtype)
    assert [array.shape[-1] for array in expected] == [vocab] * (2 if debug else 1)
    for pieces in (2, 3):
        path, shapes = export(tmp_path, spec, post_ecl(1, 2, dtype=dtype, debug=debug, head_pieces=pieces))
        assert sorted(shape[1] for shape in shapes.values()) == sorted(head_widths(vocab, pieces))
        for one, other in zip(expected, logits(path, spec, dtype), strict=True):
            np.testing.assert_array_equal(one, other)


def test_pieces_are_as_equal_as_multiples_of_8_allow() -> None:
    assert head_widths(32064, 2) == (16032, 16032)
    assert head_widths(152064, 3) == (50688,) * 3
    assert head_widths(41, 3) == (16, 16, 9)
    assert head_widths(41, 1) == (41,)
    assert sum(head_widths(151646, 7)) == 151646
    with pytest.raises(UsageError, match="the head cannot be split into 0 pieces; expected 1 or more"):
        post_ecl(1, 2, head_pieces=0)


# ---------------------------------------------------------------- the plan


def request(vocab_size: int, target: str = "jetson-orin-nano-8gb") -> MemoryRequest:
    spec = load_model_config("llava15").spec
    assert spec is not None
    spec = dataclasses.replace(spec, decoder=dataclasses.replace(spec.decoder, vocab_size=vocab_size))
    return MemoryRequest(spec, load_target_config(target), "fp16", 2, 166, 2048)


def test_as_few_pieces_as_the_allocation_allows() -> None:
    """Scratch of 1.73 times a piece: a head of 622 MB failed on an Orin Nano, where 996 MB is the most at once."""
    for vocab, expected in ((32064, 1), (70_000, 1), (76_000, 2), (152_064, 3), (256_000, 4)):
        asked = request(vocab)
        plan = plan_memory(asked)
        assert (asked.head_pieces, plan.head_pieces) == (expected, expected), vocab
        assert plan.max_allocation_bytes is not None
        assert plan.largest_allocation_bytes <= plan.max_allocation_bytes
        if expected > 1:
            assert HEAD_SCRATCH * asked.head_piece_bytes(expected - 1) > plan.max_allocation_bytes
    assert request(256_000, "jetson-agx-orin-32gb").head_pieces == 1, "no limit is known there"


def small(target: TargetConfig) -> TargetConfig:
    """The target with so little at once that tiny heads are split."""
    return dataclasses.replace(target, max_allocation_bytes=15_000)


def test_a_build_splits_the_head_and_says_so(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions(
        "llava15", "jetson-orin-nano-8gb,jetson-agx-orin-32gb", checkpoint=str(tiny_checkpoint), keep=(4,), split_layer=2
    )
    plan = make_plan(options)
    plan = dataclasses.replace(plan, target=small(plan.target))
    pieces = plan.head_pieces
    assert pieces > 1
    assert [one.head_pieces for one in plan.each()] == [pieces, pieces], "the other target has the same weights"
    manifest = build.build_bundle(plan, tmp_path / "b")
    assert manifest.memory is not None
    assert read_manifest(tmp_path / "b").memory == manifest.memory
    assert manifest.memory.head_pieces == pieces
    graph = onnx.load(tmp_path / "b" / "post_ecl.onnx", load_external_data=False).graph
    assert len([t for t in graph.initializer if t.name.startswith("lm_head")]) == pieces
    assert json.loads((tmp_path / "b" / REPORT_FILE).read_text())["targets"]["jetson-orin-nano-8gb"]["head_pieces"] == pieces
    assert re.search(rf"language-model head\s+{pieces} pieces  so that compiling it allocates less at once", describe_plan(plan, tmp_path))
    whole = build.build_bundle(make_plan(dataclasses.replace(options, target="jetson-agx-orin-32gb")), tmp_path / "whole")
    assert whole.flops == manifest.flops
    one, other = (load(tmp_path / name).generate("hello", max_new_tokens=8).token_ids for name in ("b", "whole"))
    assert list(one) == list(other)


# ---------------------------------------------------------------- TensorRT for RTX


class Heads(BuildLog):
    """Counts the products with a matrix [d, width]."""

    def __init__(self, width: int, pieces: tuple[int, ...]) -> None:
        super().__init__()
        self._pattern = re.compile(rf"Dimensions: \[(?:1,)?{width},({'|'.join(map(str, sorted({*pieces, sum(pieces)})))})\]")
        self.widths: list[int] = []

    def read(self, severity: int, message: str) -> None:
        super().read(severity, message)
        for line in message.splitlines():
            constants = line.partition("Constants: [")[2].partition("]), Outputs")[0].partition("], Outputs")[0]
            if "_myl0_" in line and (found := self._pattern.search(constants)):
                self.widths.append(int(found[1]))


def test_tensorrt_does_not_merge_the_pieces_again(tmp_path: Path) -> None:
    """Without the dependence of a piece on the one before it does: the log then shows one product with all columns."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux and Windows on x86-64 only")
    spec = decoder(1200, width=256)
    for pieces in (1, 3):
        half = post_ecl(1, 2, dtype="float16", kv_write="append", head_pieces=pieces)
        path, _ = export(tmp_path, spec, half)
        with WeightFile(tmp_path / f"again.{pieces}.bin") as unused:
            tables = build_decoder_half(spec, half, lambda name: np.zeros(_shape(spec, name), np.float32), unused, 64).inputs
        profile = make_profile("post_ecl", tables, "prefill", {"sequence": (1, 16, 64), "capacity": (CAPACITY,) * 3})
        log = Heads(256, head_widths(1200, pieces))
        build_engine(EngineSpec("post_ecl", str(path), str(tmp_path / "e.engine"), "tensorrt_rtx", (86,), (profile,)), log)
        assert log.widths == list(head_widths(1200, pieces))


def _shape(spec: DecoderSpec, name: str) -> tuple[int, ...]:
    d, m = spec.hidden_size, spec.intermediate_size
    shapes = {"norm": (d,), "gate": (m, d), "up": (m, d), "down": (d, m), "lm_head": (spec.vocab_size, d)}
    return next((shape for part, shape in shapes.items() if part in name), (d, d))
