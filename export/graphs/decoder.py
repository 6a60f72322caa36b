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
| both | `present.{i}.key`, `.value` | as past | float |
| debug | `hidden_states.{i}` leaving layer i; `all_logits` [1, S, vocab] | [1, S, d] | float |

S and C are dynamic. Row r of the new tokens is written into cache slot `past_length` + r and sees slots 0..`past_length` + r, so
padding on the right is harmless. Slots beyond must hold finite numbers (zeros at first). With the same buffer bound as past and
present the write is in place (ScatterND; facts: 0.005 ms against 8.8 ms for a copy of a 67 MB cache).

Islands of fp32 whatever the weights' type: RMSNorm, rotary tables, softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.graphs.builder import GraphBuilder
from export.spec import DecoderSpec
from export.weights import WeightFile
from runtime import names

ReadWeight = Callable[[str], np.ndarray]  # canonical name -> float32 array
MASKED = -1e30  # added to a hidden score: exp() of it is exactly 0 in fp32, and no row is ever all hidden


@dataclass(frozen=True, slots=True)
class HalfSpec:
    """Which layers a half holds, and how it is built.

    `score_states` (pre_ecl) asks for the last layer's queries; `head` (post_ecl) adds the final norm and the language-model
    head; `debug` adds taps; `dtype` is that of weights, activations and cache.
    """

    name: str
    first: int
    stop: int
    score_states: bool = False
    head: bool = False
    debug: bool = False
    dtype: str = "float32"


def pre_ecl(split_layer: int, *, dtype: str = "float32", debug: bool = False) -> HalfSpec:
    return HalfSpec(names.PRE_ECL, 0, split_layer, score_states=True, dtype=dtype, debug=debug)


def post_ecl(split_layer: int, layers: int, *, dtype: str = "float32", debug: bool = False) -> HalfSpec:
    return HalfSpec(names.POST_ECL, split_layer, layers, head=True, dtype=dtype, debug=debug)


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
        self.b = GraphBuilder(half.name)
        self.op = self.b.op

    def build(self) -> GraphBuilder:
        b, spec, half = self.b, self.spec, self.half
        first_input = names.INPUTS_EMBEDS if half.score_states else names.HIDDEN_STATES
        hidden = b.input(first_input, half.dtype, (1, "sequence", spec.hidden_size))
        positions = b.input(names.POSITION_IDS, "int64", (1, 1, "sequence"))
        past_length = b.input(names.PAST_LENGTH, "int64", (1,))
        last_index = b.input(names.LAST_INDEX, "int64", (1,)) if half.head else None
        cache_shape = (1, spec.kv_heads, "capacity", spec.head_size)
        layers = range(half.first, half.stop)
        past = {i: tuple(b.input(name(i), half.dtype, cache_shape) for name in (names.past_key, names.past_value)) for i in layers}
        rotary = self._rotary_tables(positions)
        slots, mask = self._slots_and_mask(hidden, past_length, past[half.first][0])
        presents, queries = [], None
        for i in layers:
            hidden, queries, keys, values = self._layer(i, hidden, rotary, past[i], slots, mask)
            presents += [(keys, names.present_key(i)), (values, names.present_value(i))]
            if half.debug:
                b.output(hidden, names.tap(i), half.dtype, (1, "sequence", spec.hidden_size))
        if half.score_states and queries is not None:
            b.output(hidden, names.HIDDEN_STATES, half.dtype, (1, "sequence", spec.hidden_size))
            b.output(queries, names.SCORE_STATES, half.dtype, (1, "sequence", spec.query_width))
        if last_index is not None:
            self._head(hidden, last_index)
        for value, name in presents:
            b.output(value, name, half.dtype, cache_shape)
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

    def _slots_and_mask(self, hidden: ir.Value, past_length: ir.Value, cache: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Where new rows go: ScatterND indices [1, kv_heads, S, 3]; and what they see: [1, 1, 1, S, C], 0 or MASKED, float32."""
        op, b = self.op, self.b
        slot = op.Add(b.arange(b.size(hidden, 1)), past_length)  # [S]
        visible = op.LessOrEqual(b.arange(b.size(cache, 2)), op.Unsqueeze(slot, b.constant([1])))  # [S, C]
        mask = op.Where(visible, b.constant(0.0), b.constant(MASKED))
        shape = op.Concat(b.constant([1, self.spec.kv_heads]), b.size(hidden, 1), b.constant([1]), axis=0)
        heads = b.constant(np.arange(self.spec.kv_heads).reshape(1, -1, 1, 1))
        parts = [b.constant(np.zeros((1, 1, 1, 1), np.int64)), heads, op.Unsqueeze(slot, b.constant([0, 1, 3]))]
        slots = op.Concat(*(op.Expand(part, shape) for part in parts), axis=-1)
        return slots, op.Unsqueeze(mask, b.constant([0, 1, 2]))

    # ------------------------------------------------------------ one layer

    def _layer(
        self, i: int, hidden: ir.Value, rotary: tuple[ir.Value, ir.Value], past: tuple[ir.Value, ...], slots: ir.Value, mask: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Returns hidden states, queries before rotary [1, S, H * d_h], and the written caches."""
        op, spec, at = self.op, self.spec, f"layers.{i}."
        normed = self._rms_norm(hidden, at + "input_layernorm.weight")
        queries, keys, values = (self._linear(normed, f"{at}self_attn.{p}_proj", spec.qkv_bias) for p in "qkv")
        rotated = self._rotate(self._split_heads(queries, spec.query_heads), *rotary)
        new_keys = self._rotate(self._split_heads(keys, spec.kv_heads), *rotary)
        all_keys = op.ScatterND(past[0], slots, new_keys)
        all_values = op.ScatterND(past[1], slots, self._split_heads(values, spec.kv_heads))
        attended = self._attend(rotated, all_keys, all_values, mask)
        hidden = op.Add(hidden, self._linear(attended, at + "self_attn.o_proj"))
        normed = self._rms_norm(hidden, at + "post_attention_layernorm.weight")
        gate, up = (self._linear(normed, f"{at}mlp.{p}_proj") for p in ("gate", "up"))
        hidden = op.Add(hidden, self._linear(op.Mul(op.Mul(gate, op.Sigmoid(gate)), up), at + "mlp.down_proj"))
        return hidden, queries, all_keys, all_values

    def _rms_norm(self, x: ir.Value, name: str) -> ir.Value:
        op, b = self.op, self.b
        x32 = b.cast(x, "float32")
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
        x32 = b.cast(x, "float32")
        left, right = b.slice(x32, 0, half, -1), b.slice(x32, half, 2 * half, -1)
        turned = (op.Sub(op.Mul(left, cos), op.Mul(right, sin)), op.Add(op.Mul(right, cos), op.Mul(left, sin)))
        return self._as_half(op.Concat(*turned, axis=-1))

    def _attend(self, queries: ir.Value, keys: ir.Value, values: ir.Value, mask: ir.Value) -> ir.Value:
        """[1, H, S, d_h] over caches [1, kv_heads, C, d_h] -> [1, S, H * d_h].

        The query heads that share a key-value head are stacked as further rows, so that the cache is never repeated.
        """
        op, b, spec = self.op, self.b, self.spec
        group = spec.query_heads // spec.kv_heads
        scaled = op.Mul(queries, self._as_half(b.constant(1 / math.sqrt(spec.head_size))))
        rows = b.reshape(scaled, (1, spec.kv_heads, -1, spec.head_size)) if group > 1 else scaled
        scores = b.cast(op.MatMul(rows, op.Transpose(keys, perm=[0, 1, 3, 2])), "float32")
        if group > 1:
            grouped = op.Concat(b.constant([1, spec.kv_heads, group]), b.size(queries, 2), b.size(keys, 2), axis=0)
            stacked = op.Shape(scores)
            scores = op.Reshape(op.Add(op.Reshape(scores, grouped), mask), stacked)
        else:
            scores = op.Add(scores, op.Squeeze(mask, b.constant([2])))
        out = op.MatMul(self._as_half(op.Softmax(scores, axis=-1)), values)
        out = b.reshape(out, (1, spec.query_heads, -1, spec.head_size)) if group > 1 else out
        return b.reshape(op.Transpose(out, perm=[0, 2, 1, 3]), (1, -1, spec.query_width))

    def _head(self, hidden: ir.Value, last_index: ir.Value) -> None:
        b, spec = self.b, self.spec
        head = "embed_tokens.weight" if spec.tied_embeddings else "lm_head.weight"
        if self.half.debug:
            rows = self.op.MatMul(self._rms_norm(hidden, "norm.weight"), self._weight(head, transpose=True))
            b.output(b.cast(rows, "float32"), names.ALL_LOGITS, "float32", (1, "sequence", spec.vocab_size))
        last = b.reshape(self.op.Gather(hidden, last_index, axis=1), (1, spec.hidden_size))
        logits = self.op.MatMul(self._rms_norm(last, "norm.weight"), self._weight(head, transpose=True))
        b.output(b.cast(logits, "float32"), names.LOGITS, "float32", (1, spec.vocab_size))

    def _as_half(self, x: ir.Value) -> ir.Value:
        return x if self.half.dtype == "float32" else self.op.Cast(x, to=int(ir.DataType[_IR_NAMES[self.half.dtype]]))


_IR_NAMES = {"float16": "FLOAT16", "bfloat16": "BFLOAT16"}


def rotary_angles(spec: DecoderSpec, positions: int) -> np.ndarray:
    """Angles [positions, d_h / 2] float32, rounded as transformers rounds them (fp32 frequency times fp32 position)."""
    exponents = np.arange(0, spec.head_size, 2, dtype=np.float32) / np.float32(spec.head_size)
    frequencies = (1.0 / np.power(np.float32(spec.rope_theta), exponents)).astype(np.float32)
    return np.arange(positions, dtype=np.float32)[:, None] * frequencies[None, :]
