"""The decoder halves `pre_ecl` (layers 0..K-1) and `post_ecl` (layers K..L-1, norm, head).

| half | input | shape | dtype |
|---|---|---|---|
| pre_ecl | `inputs_embeds` | [1, S, d] | float |
| post_ecl | `hidden_states` | [1, S, d] | float |
| both | `position_ids` | [1, 1, S] | int64 |
| both | `past_length` | [1] | int64 |
| post_ecl | `last_index` | [1] | int64 |
| both | `past_key_values.{i}.key`, `.value`, i global | [1, kv_heads, C, d_h] | float |

| half | output | shape | dtype |
|---|---|---|---|
| pre_ecl | `hidden_states` | [1, S, d] | float |
| pre_ecl | `score_states`: queries of layer K-1, unscaled, before rotary | [1, S, H * d_h] | float |
| post_ecl | `logits` of the row `last_index` | [1, vocab] | float32 |
| both | `present.{i}.key`, `.value` | as past; `append`: [1, kv_heads, S, d_h] | float |
| debug | `hidden_states.{i}` leaving layer i; `all_logits` [1, S, vocab] | [1, S, d] | float |

"float" is float32, float16 or bfloat16, the half's `dtype`: weights, activations and cache. S is dynamic, C too unless a `capacity` is
given. Row r of the new tokens is written into cache slot `past_length` + r and sees slots 0..`past_length` + r, so padding on the right
is harmless. Slots beyond must hold finite numbers (zeros at first). The write has three forms, see `export.graphs.kv_write`; with the
same buffer bound as past and present ScatterND writes in place (measured: 0.005 ms against 8.8 ms for a copy of a 67 MB cache).

Islands of fp32 whatever the weights' type: RMSNorm's statistics, the rotary tables and the rotation (fp16 cannot count past 2048), the
mask, softmax, and the logits as they are given out. Residual sums are of the half's type, as in transformers: a checkpoint whose
residual stream leaves fp16's range needs bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.graphs.builder import GraphBuilder
from export.graphs.kv_write import APPEND, IN_PLACE, KVWrite, check_form, make_kv_write, opset_of
from export.spec import DecoderSpec, head_widths
from export.weights import WeightFile
from runtime import names
from runtime.errors import UsageError

ReadWeight = Callable[[str], np.ndarray]  # canonical name -> float32 array
HALF_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class HalfSpec:
    """Which layers a half holds, and how it is built.

    `score_states` (pre_ecl) asks for the last layer's queries; `head` (post_ecl) adds the final norm and the language-model
    head; `debug` adds taps; `dtype` is that of weights, activations and cache; `kv_write` is the form of the cache's write and
    `capacity` its length C in tokens (None: dynamic), see `export.graphs.kv_write`. `head_pieces` is into how many products the
    language-model head is split, by columns of the vocabulary, for engines that cannot allocate what the whole takes to compile.

    Raises:
        UsageError: an unknown dtype or form, a form without the capacity that it needs, or fewer than one piece.
    """

    name: str
    first: int
    stop: int
    score_states: bool = False
    head: bool = False
    debug: bool = False
    dtype: str = "float32"
    kv_write: str = IN_PLACE
    capacity: int | None = None
    head_pieces: int = 1

    def __post_init__(self) -> None:
        if self.head_pieces < 1:
            raise UsageError(f"the head cannot be split into {self.head_pieces} pieces; expected 1 or more")
        if self.dtype not in HALF_DTYPES:
            raise UsageError(f"a decoder half of dtype {self.dtype!r} cannot be built; expected one of {', '.join(HALF_DTYPES)}")
        check_form(self.kv_write, self.capacity)


def pre_ecl(
    split_layer: int, *, dtype: str = "float32", debug: bool = False, kv_write: str = IN_PLACE, capacity: int | None = None
) -> HalfSpec:
    """Layers 0..K-1."""
    return HalfSpec(names.PRE_ECL, 0, split_layer, score_states=True, dtype=dtype, debug=debug, kv_write=kv_write, capacity=capacity)


def post_ecl(
    split_layer: int, layers: int, *, dtype: str = "float32", debug: bool = False, kv_write: str = IN_PLACE, capacity: int | None = None,
    head_pieces: int = 1,
) -> HalfSpec:  # fmt: skip
    """Layers K..L-1, norm and head."""
    return HalfSpec(
        names.POST_ECL, split_layer, layers, head=True, dtype=dtype, debug=debug, kv_write=kv_write, capacity=capacity,
        head_pieces=head_pieces,
    )  # fmt: skip


def build_decoder_half(spec: DecoderSpec, half: HalfSpec, read: ReadWeight, weights: WeightFile, max_positions: int) -> GraphBuilder:
    """Builds one half; weights go to `weights` as they are met.

    Args:
        read: gives a weight by its canonical name, float32.
        max_positions: rows of the rotary tables, the largest position + 1 (the bundle's maximum context).
    """
    return _DecoderHalf(spec, half, read, weights, max_positions).build()


class _DecoderHalf:
    def __init__(self, spec: DecoderSpec, half: HalfSpec, read: ReadWeight, weights: WeightFile, max_positions: int) -> None:
        self.spec, self.half = spec, half
        self._read, self._weights, self._max_positions = read, weights, max_positions
        self.b = GraphBuilder(half.name, opset_of(half.kv_write))
        self.op = self.b.op

    def build(self) -> GraphBuilder:
        b, spec, half = self.b, self.spec, self.half
        first_input = names.INPUTS_EMBEDS if half.score_states else names.HIDDEN_STATES
        hidden = b.input(first_input, half.dtype, (1, "sequence", spec.hidden_size))
        positions = b.input(names.POSITION_IDS, "int64", (1, 1, "sequence"))
        past_length = b.input(names.PAST_LENGTH, "int64", (1,))
        last_index = b.input(names.LAST_INDEX, "int64", (1,)) if half.head else None
        cache_shape = (1, spec.kv_heads, half.capacity or "capacity", spec.head_size)
        present_shape = (1, spec.kv_heads, "sequence", spec.head_size) if half.kv_write == APPEND else cache_shape
        layers = range(half.first, half.stop)
        past = {i: tuple(b.input(name(i), half.dtype, cache_shape) for name in (names.past_key, names.past_value)) for i in layers}
        rotary = self._rotary_tables(positions)
        kv = make_kv_write(half.kv_write, b, hidden, past_length, past[half.first][0], spec.kv_heads)
        presents, queries = [], None
        for i in layers:
            hidden, queries, keys, values = self._layer(i, hidden, rotary, past[i], kv)
            presents += [(keys, names.present_key(i)), (values, names.present_value(i))]
            if half.debug:
                b.output(hidden, names.tap(i), half.dtype, (1, "sequence", spec.hidden_size))
        if half.score_states and queries is not None:
            b.output(hidden, names.HIDDEN_STATES, half.dtype, (1, "sequence", spec.hidden_size))
            b.output(queries, names.SCORE_STATES, half.dtype, (1, "sequence", spec.query_width))
        if last_index is not None:
            self._head(hidden, last_index)
        for value, name in presents:
            b.output(value, name, half.dtype, present_shape)
        return b

    # ------------------------------------------------------------ what all layers share

    def _rotary_tables(self, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        """cos and sin of the new rows, [1, 1, S, d_h / 2] float32, gathered by position from tables."""
        angles = rotary_angles(self.spec, self._max_positions)
        rows = self.op.Squeeze(positions, self.b.constant([0, 1]))
        tables = (self._table("rotary.cos", np.cos(angles)), self._table("rotary.sin", np.sin(angles)))
        cos, sin = (self.op.Unsqueeze(self.op.Gather(table, rows, axis=0), self.b.constant([0, 1])) for table in tables)
        return cos, sin

    def _table(self, name: str, array: np.ndarray) -> ir.Value:
        return self.b.weight(self._weights.add(f"{name}.{self._max_positions}", array.astype(np.float32)))

    # ------------------------------------------------------------ one layer

    def _layer(
        self, i: int, hidden: ir.Value, rotary: tuple[ir.Value, ir.Value], past: tuple[ir.Value, ...], kv: KVWrite
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Returns hidden states, queries before rotary [1, S, H * d_h], and what is given out of keys and values."""
        op, spec, at = self.op, self.spec, f"layers.{i}."
        normed = self._rms_norm(hidden, at + "input_layernorm.weight")
        queries, keys, values = (self._linear(normed, f"{at}self_attn.{p}_proj", spec.qkv_bias) for p in "qkv")
        rotated = self._rotate(self._split_heads(queries, spec.query_heads), *rotary)
        new_keys = self._rotate(self._split_heads(keys, spec.kv_heads), *rotary)
        all_keys, present_keys = kv.write(past[0], new_keys)
        all_values, present_values = kv.write(past[1], self._split_heads(values, spec.kv_heads))
        attended = self._attend(rotated, all_keys, all_values, kv.mask)
        hidden = op.Add(hidden, self._linear(attended, at + "self_attn.o_proj"))
        normed = self._rms_norm(hidden, at + "post_attention_layernorm.weight")
        gate, up = (self._linear(normed, f"{at}mlp.{p}_proj") for p in ("gate", "up"))
        hidden = op.Add(hidden, self._linear(op.Mul(op.Mul(gate, op.Sigmoid(gate)), up), at + "mlp.down_proj"))
        return hidden, queries, present_keys, present_values

    def _rms_norm(self, x: ir.Value, name: str) -> ir.Value:
        op, b = self.op, self.b
        x32 = self._as_single(x)
        square = op.ReduceMean(op.Mul(x32, x32), b.constant([-1]), keepdims=1)
        normed = op.Div(x32, op.Sqrt(op.Add(square, b.constant(self.spec.rms_norm_eps))))
        return op.Mul(self._as_half(normed), self._weight(name))

    def _linear(self, x: ir.Value, name: str, bias: bool = False) -> ir.Value:
        """`x @ W` with W stored [in, out], plus a bias."""
        y = self.op.MatMul(x, self._weight(name + ".weight", transpose=True))
        return self.op.Add(y, self._weight(name + ".bias")) if bias else y

    def _weight(self, name: str, *, transpose: bool = False) -> ir.Value:
        array = self._read(name)
        array = (array.T if transpose else array).astype(self.half.dtype)
        return self.b.weight(self._weights.add(name, array))

    def _split_heads(self, x: ir.Value, heads: int) -> ir.Value:
        """[1, S, heads * d_h] -> [1, heads, S, d_h]."""
        return self.op.Transpose(self.b.reshape(x, (1, -1, heads, self.spec.head_size)), perm=[0, 2, 1, 3])

    def _rotate(self, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        """Rotary embedding of [1, heads, S, d_h], halves paired as in Llama (RoFormer, arXiv 2104.09864)."""
        op, b, half = self.op, self.b, self.spec.head_size // 2
        x32 = self._as_single(x)
        left, right = b.slice(x32, 0, half, -1), b.slice(x32, half, 2 * half, -1)
        turned = (op.Sub(op.Mul(left, cos), op.Mul(right, sin)), op.Add(op.Mul(right, cos), op.Mul(left, sin)))
        return self._as_half(op.Concat(*turned, axis=-1))

    def _attend(self, queries: ir.Value, keys: ir.Value, values: ir.Value, mask: ir.Value) -> ir.Value:
        """[1, H, S, d_h] over keys and values [1, kv_heads, n, d_h], with a mask [1, 1, S, n] -> [1, S, H * d_h].

        The query heads that share a key-value head are stacked as further rows, so that the cache is never repeated.
        """
        op, b, spec = self.op, self.b, self.spec
        group = spec.query_heads // spec.kv_heads
        scaled = op.Mul(queries, self._as_half(b.constant(1 / math.sqrt(spec.head_size))))
        rows = b.reshape(scaled, (1, spec.kv_heads, -1, spec.head_size)) if group > 1 else scaled
        scores = self._as_single(op.MatMul(rows, op.Transpose(keys, perm=[0, 1, 3, 2])))
        if group > 1:
            grouped = op.Concat(b.constant([1, spec.kv_heads, group]), b.size(queries, 2), b.size(keys, 2), axis=0)
            stacked = op.Shape(scores)
            scores = op.Reshape(op.Add(op.Reshape(scores, grouped), op.Unsqueeze(mask, b.constant([2]))), stacked)
        else:
            scores = op.Add(scores, mask)
        out = op.MatMul(self._as_half(op.Softmax(scores, axis=-1)), values)
        out = b.reshape(out, (1, spec.query_heads, -1, spec.head_size)) if group > 1 else out
        return b.reshape(op.Transpose(out, perm=[0, 2, 1, 3]), (1, -1, spec.query_width))

    def _head(self, hidden: ir.Value, last_index: ir.Value) -> None:
        b, spec = self.b, self.spec
        pieces = self._head_weights()
        if self.half.debug:
            rows = self._logits(self._rms_norm(hidden, "norm.weight"), pieces)
            b.output(rows, names.ALL_LOGITS, "float32", (1, "sequence", spec.vocab_size))
        last = b.reshape(self.op.Gather(hidden, last_index, axis=1), (1, spec.hidden_size))
        logits = self._logits(self._rms_norm(last, "norm.weight"), pieces)
        b.output(logits, names.LOGITS, "float32", (1, spec.vocab_size))

    def _head_weights(self) -> list[ir.Value]:
        """The head's matrix [d, vocab], or its pieces by columns."""
        name = "embed_tokens.weight" if self.spec.tied_embeddings else "lm_head.weight"
        if self.half.head_pieces == 1:
            return [self._weight(name, transpose=True)]
        array, pieces, start = self._read(name), [], 0
        for i, width in enumerate(head_widths(self.spec.vocab_size, self.half.head_pieces)):
            piece = array[start : start + width].T.astype(self.half.dtype)
            pieces.append(self.b.weight(self._weights.add(f"{name}.{i + 1}_of_{self.half.head_pieces}", piece)))
            start += width
        return pieces

    def _logits(self, normed: ir.Value, pieces: list[ir.Value]) -> ir.Value:
        """Logits, float32. A piece's input hangs on the piece before, NaN where that is NaN: without it TensorRT merges the pieces again.

        (Seen with TensorRT for RTX 1.7.1, whatever the widths: products of one input become one product over one matrix.)
        """
        op, products = self.op, list[ir.Value]()
        for piece in pieces:
            if products:
                first = self.b.slice(products[-1], 0, 1, -1)
                normed = op.Where(op.IsNaN(first), first, normed)
            products.append(op.MatMul(normed, piece))
        singles = [self._as_single(product) for product in products]
        return singles[0] if len(singles) == 1 else op.Concat(*singles, axis=-1)

    def _as_single(self, x: ir.Value) -> ir.Value:
        return x if self.half.dtype == "float32" else self.b.cast(x, "float32")

    def _as_half(self, x: ir.Value) -> ir.Value:
        return x if self.half.dtype == "float32" else self.b.cast(x, self.half.dtype)


def rotary_angles(spec: DecoderSpec, positions: int) -> np.ndarray:
    """Angles [positions, d_h / 2] float32, rounded as transformers rounds them (fp32 frequency times fp32 position)."""
    exponents = np.arange(0, spec.head_size, 2, dtype=np.float32) / np.float32(spec.head_size)
    frequencies = (1.0 / np.power(np.float32(spec.rope_theta), exponents)).astype(np.float32)
    return np.arange(positions, dtype=np.float32)[:, None] * frequencies[None, :]
