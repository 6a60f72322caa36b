"""How new keys and values reach the cache, and what the new rows see of it: three forms of the same step, one for each kind of engine.

| form | nodes | `present.*` | for |
|---|---|---|---|
| `in_place` | ScatterND-18 | the whole cache [1, kv_heads, C, d_h] | ONNX Runtime; TensorRT where C is fixed by the profile |
| `tensor_scatter` | TensorScatter-24, C static | the whole cache | TensorRT for RTX, TensorRT 10.16 and later |
| `append` | Concat(past, new) | the new rows alone [1, kv_heads, S, d_h] | TensorRT 10.3; the caller puts the rows at `past_length` |

All of them give the same hidden states: a new row r sees the past rows 0..`past_length` - 1 and the new rows 0..r. With `append` the
past's slots from `past_length` on are hidden and the new rows lie behind slot C - 1; a masked slot adds an exact zero, so only the order
of the sum differs. Knows nothing about layers.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
import onnx_ir as ir

from export.graphs.builder import OPSET, GraphBuilder
from runtime.errors import UsageError
from runtime.names import APPEND, IN_PLACE, KV_WRITES, TENSOR_SCATTER

__all__ = ["APPEND", "IN_PLACE", "KV_WRITES", "TENSOR_SCATTER", "KVWrite", "check_form", "make_kv_write", "opset_of"]
TENSOR_SCATTER_OPSET: Final = 24
MASKED: Final = -1e30  # added to a hidden score: exp() of it is exactly 0 in fp32, and no row is ever all hidden


class KVWrite(Protocol):
    """One form, for all layers of one half."""

    mask: ir.Value
    """Added to the scores, float32 [1, 1, S, what attention runs over]: 0, or `MASKED` for what a row must not see."""

    def write(self, past: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Takes a cache [1, kv_heads, C, d_h] and new rows [1, kv_heads, S, d_h]: what attention runs over, and what is `present`."""


def opset_of(form: str) -> int:
    """The opset a graph with this form needs."""
    return TENSOR_SCATTER_OPSET if form == TENSOR_SCATTER else OPSET


def check_form(form: str, capacity: int | None) -> None:
    """Raises UsageError where a form is unknown, or needs a static capacity and has none."""
    if form not in KV_WRITES:
        raise UsageError(f"unknown form of the cache's write {form!r}; expected one of {', '.join(KV_WRITES)}")
    if form == TENSOR_SCATTER and capacity is None:
        raise UsageError(
            "the cache write tensor_scatter needs a static capacity (TensorRT refuses a dynamic one): give capacity, in tokens"
        )
    if capacity is not None and capacity < 1:
        raise UsageError(f"the cache's capacity is {capacity} tokens, expected 1 or more")


def make_kv_write(form: str, b: GraphBuilder, rows: ir.Value, past_length: ir.Value, cache: ir.Value, kv_heads: int) -> KVWrite:
    """Adds the nodes that all layers share.

    Args:
        rows: what the new rows come from, [1, S, ...].
        past_length: int64 [1].
        cache: any layer's past [1, kv_heads, C, d_h].
    """
    if form == APPEND:
        return _Append(b, rows, past_length, cache)
    if form == TENSOR_SCATTER:
        return _TensorScatter(b, rows, past_length, cache)
    return _InPlace(b, rows, past_length, cache, kv_heads)


def _mask(b: GraphBuilder, visible: ir.Value) -> ir.Value:
    """bool [S, n] -> float32 [1, 1, S, n]."""
    return b.op.Unsqueeze(b.op.Where(visible, b.constant(0.0), b.constant(MASKED)), b.constant([0, 1]))


def _slots(b: GraphBuilder, rows: ir.Value, past_length: ir.Value) -> ir.Value:
    """The cache slot of each new row, int64 [S]."""
    return b.op.Add(b.arange(b.size(rows, 1)), past_length)


def _visible(b: GraphBuilder, slots: ir.Value, cache: ir.Value) -> ir.Value:
    """Which slots of the written cache each row sees: bool [S, C]."""
    return b.op.LessOrEqual(b.arange(b.size(cache, 2)), b.op.Unsqueeze(slots, b.constant([1])))


class _InPlace:
    def __init__(self, b: GraphBuilder, rows: ir.Value, past_length: ir.Value, cache: ir.Value, kv_heads: int) -> None:
        self._b = b
        slots = _slots(b, rows, past_length)
        self.mask = _mask(b, _visible(b, slots, cache))
        self._indices = self._scatter_indices(slots, rows, kv_heads)

    def _scatter_indices(self, slots: ir.Value, rows: ir.Value, kv_heads: int) -> ir.Value:
        """int64 [1, kv_heads, S, 3]: batch, head and slot of every new row."""
        op, b = self._b.op, self._b
        shape = op.Concat(b.constant([1, kv_heads]), b.size(rows, 1), b.constant([1]), axis=0)
        heads = b.constant(np.arange(kv_heads).reshape(1, -1, 1, 1))
        parts = [b.constant(np.zeros((1, 1, 1, 1), np.int64)), heads, op.Unsqueeze(slots, b.constant([0, 1, 3]))]
        return op.Concat(*(op.Expand(part, shape) for part in parts), axis=-1)

    def write(self, past: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        written = self._b.op.ScatterND(past, self._indices, new)
        return written, written


class _TensorScatter:
    def __init__(self, b: GraphBuilder, rows: ir.Value, past_length: ir.Value, cache: ir.Value) -> None:
        self._b, self._past_length = b, past_length
        self.mask = _mask(b, _visible(b, _slots(b, rows, past_length), cache))

    def write(self, past: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        written = self._b.op.TensorScatter(past, new, self._past_length, axis=2, mode="linear")
        return written, written


class _Append:
    def __init__(self, b: GraphBuilder, rows: ir.Value, past_length: ir.Value, cache: ir.Value) -> None:
        self._b, op = b, b.op
        index = b.arange(b.size(rows, 1))  # [S]
        column = op.Unsqueeze(index, b.constant([1]))
        old = op.Expand(op.Less(b.arange(b.size(cache, 2)), past_length), op.Concat(b.size(rows, 1), b.size(cache, 2), axis=0))
        self.mask = _mask(b, op.Concat(old, op.LessOrEqual(index, column), axis=1))

    def write(self, past: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        return self._b.op.Concat(past, new, axis=2), new
