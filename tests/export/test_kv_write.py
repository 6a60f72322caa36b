"""The three forms of the cache's write give the same hidden states and the same cache, on ONNX Runtime, prefill to decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from export.graphs.decoder import HalfSpec, build_decoder_half, post_ecl, pre_ecl
from export.graphs.kv_write import APPEND, IN_PLACE, KV_WRITES, TENSOR_SCATTER
from export.parity import relative_error
from export.spec import DecoderSpec
from export.weights import WeightFile
from runtime import names
from runtime.engines.onnxruntime import session_options
from runtime.errors import UsageError

CAPACITY = 16
PIECES = (5, 3, 1, 1, 2)  # new rows of each step: prefill, append, decode, decode, append
TOLERANCE = {"float32": 1e-5, "float16": 5e-3}  # measured: 4e-07, 9e-04


def decoder(kv_heads: int = 4) -> DecoderSpec:
    return DecoderSpec(
        layers=3, hidden_size=32, intermediate_size=48, query_heads=4, kv_heads=kv_heads, head_size=8, vocab_size=40, rms_norm_eps=1e-5,
        rope_theta=1e4, max_positions=64,
    )  # fmt: skip


def read(spec: DecoderSpec) -> Any:
    """Seeded weights by canonical name."""
    h, i = spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"norm": (h,)}
    shapes |= {"q_proj": (spec.query_width, h), "k_proj": (spec.kv_width, h), "v_proj": (spec.kv_width, h), "o_proj": (h, spec.query_width)}
    shapes |= {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i), "lm_head": (spec.vocab_size, h)}

    def weight(name: str) -> np.ndarray:
        shape = next(shape for part, shape in shapes.items() if part in name)
        noise = np.random.default_rng(sum(name.encode())).standard_normal(shape).astype(np.float32)
        return noise * np.float32(1.4 / np.sqrt(shape[-1])) if len(shape) > 1 else 1 + np.float32(0.1) * noise

    return weight


def build(folder: Path, spec: DecoderSpec, half: HalfSpec) -> Path:
    path = folder / f"{half.name}.{half.kv_write}.{half.dtype}.onnx"
    with WeightFile(path.with_suffix(".bin")) as weights:
        build_decoder_half(spec, half, read(spec), weights, 64).save(path)
    return path


class Run:
    """A half on ONNX Runtime, with its caches; slots that hold nothing yet are filled with sevens."""

    def __init__(self, path: Path, half: HalfSpec, spec: DecoderSpec) -> None:
        self.session = ort.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
        self.half, self.length = half, 0
        shape = (1, spec.kv_heads, CAPACITY, spec.head_size)
        self.caches = {i.name: np.full(shape, 7, half.dtype) for i in self.session.get_inputs() if i.name.startswith(names.PAST)}

    def step(self, rows: np.ndarray, past_length: int | None = None) -> np.ndarray:
        """Runs new rows [S, d]; returns the hidden states or logits."""
        count = len(rows)
        feeds = {
            self.session.get_inputs()[0].name: rows[None].astype(self.half.dtype),
            names.POSITION_IDS: np.arange(self.length, self.length + count).reshape(1, 1, -1),
            names.PAST_LENGTH: np.array([self.length if past_length is None else past_length]),
            **self.caches,
        }
        if self.half.head:
            feeds[names.LAST_INDEX] = np.array([count - 1])
        results = dict(zip([o.name for o in self.session.get_outputs()], self.session.run(None, feeds), strict=True))
        for name, cache in self.caches.items():
            present = results[names.PRESENT + name.removeprefix(names.PAST)]
            if self.half.kv_write == APPEND:
                assert present.shape[2] == count
                cache[:, :, self.length : self.length + count] = present
            else:
                self.caches[name] = present
        self.length += count
        return np.asarray(results[names.LOGITS if self.half.head else names.HIDDEN_STATES])


def rows_of(spec: DecoderSpec) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.standard_normal((count, spec.hidden_size)).astype(np.float32) for count in PIECES]


def half_of(side: str, form: str, dtype: str) -> HalfSpec:
    capacity = CAPACITY if form == TENSOR_SCATTER else None
    if side == names.PRE_ECL:
        return pre_ecl(2, dtype=dtype, kv_write=form, capacity=capacity)
    return post_ecl(2, 3, dtype=dtype, kv_write=form, capacity=capacity)


@pytest.mark.parametrize("form", [TENSOR_SCATTER, APPEND])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("side", "kv_heads"), [(names.PRE_ECL, 4), (names.PRE_ECL, 2), (names.POST_ECL, 1)])
def test_every_form_equals_the_write_in_place(form: str, dtype: str, side: str, kv_heads: int, tmp_path: Path) -> None:
    spec = decoder(kv_heads)
    one, other = (Run(build(tmp_path, spec, h), h, spec) for h in (half_of(side, f, d) for f, d in ((IN_PLACE, "float32"), (form, dtype))))
    for rows in rows_of(spec):
        assert relative_error(other.step(rows), one.step(rows)) <= TOLERANCE[dtype]
    for name, cache in one.caches.items():
        assert relative_error(other.caches[name][:, :, : one.length], cache[:, :, : one.length]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("form", KV_WRITES)
def test_a_wrong_length_of_the_past_is_seen(form: str, tmp_path: Path) -> None:
    spec = decoder()
    half = half_of(names.PRE_ECL, form, "float32")
    path = build(tmp_path, spec, half)
    right, wrong = Run(path, half, spec), Run(path, half, spec)
    first, second = rows_of(spec)[:2]
    assert relative_error(wrong.step(first), right.step(first)) == 0
    assert relative_error(wrong.step(second, past_length=4), right.step(second)) > 1e-2


@pytest.mark.parametrize("form", KV_WRITES)
def test_padding_on_the_right_changes_no_row_before_it(form: str, tmp_path: Path) -> None:
    spec = decoder()
    half = half_of(names.PRE_ECL, form, "float32")
    path = build(tmp_path, spec, half)
    plain, padded = Run(path, half, spec), Run(path, half, spec)
    rows = rows_of(spec)[0]
    expected = plain.step(rows)
    found = padded.step(np.concatenate([rows, np.full((3, spec.hidden_size), 9, np.float32)]))
    assert relative_error(found[:, : len(rows)], expected) <= TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("form", "opset", "operator"), [(IN_PLACE, 20, "ScatterND"), (TENSOR_SCATTER, 24, "TensorScatter"), (APPEND, 20, None)]
)
def test_graphs_ask_for_no_newer_opset_than_their_form_needs(form: str, opset: int, operator: str | None, tmp_path: Path) -> None:
    model = onnx.load(build(tmp_path, decoder(), half_of(names.PRE_ECL, form, "float16")), load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    writers = {"ScatterND", "TensorScatter"} & {node.op_type for node in model.graph.node}
    assert writers == ({operator} if operator else set())
    assert model.ir_version == (12 if opset == 24 else 10)


def test_forms_and_types_are_checked() -> None:
    with pytest.raises(UsageError, match="unknown form of the cache's write 'copy'; expected one of in_place, tensor_scatter, append"):
        pre_ecl(2, kv_write="copy")
    with pytest.raises(UsageError, match=r"tensor_scatter needs a static capacity .*: give capacity"):
        pre_ecl(2, kv_write=TENSOR_SCATTER)
    with pytest.raises(UsageError, match="capacity is 0 tokens, expected 1 or more"):
        pre_ecl(2, capacity=0)
    with pytest.raises(UsageError, match="dtype 'float64' cannot be built; expected one of float32, float16, bfloat16"):
        post_ecl(2, 3, dtype="float64")
