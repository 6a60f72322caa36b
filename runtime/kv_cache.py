"""The key-value cache of one group of layers: fixed-size buffers, one length, writes in place.

A conversation has two groups whose lengths differ: `pre` holds every token, `post` holds the kept visual tokens and all text.
Knows nothing about engines; an engine binds `buffers` as they are and rebinds when `generation` changes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import numpy as np

from runtime import names
from runtime.errors import ContextLengthError

ROUND_TO = names.ROUND_TO


class KVGroup:
    """Buffers [1, kv_heads, capacity, head_size] for keys and values of some layers, and how many rows are valid.

    `dtype` is numpy's name of their type, that of the graphs. The group owns its buffers. Rows at and beyond `length` are finite but
    meaningless. Only the pipeline calls `advance`.
    """

    def __init__(self, layers: Iterable[int], kv_heads: int, head_size: int, capacity: int, limit: int, dtype: str = "float32") -> None:
        self.layers = tuple(layers)
        self.length = 0
        self.limit = limit
        self.generation = 0
        capacity = min(round_capacity(capacity), round_capacity(limit))
        shape = (1, kv_heads, capacity, head_size)
        self.buffers = {name: np.zeros(shape, dtype) for i in self.layers for name in (names.past_key(i), names.past_value(i))}

    @property
    def capacity(self) -> int:
        """Rows the buffers hold."""
        return int(next(iter(self.buffers.values())).shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(b.nbytes for b in self.buffers.values())

    def reserve(self, rows: int) -> None:
        """Makes room for `rows` more rows; a growing cache at least doubles.

        Raises:
            ContextLengthError: the group would exceed its limit.
        """
        needed = self.length + rows
        if needed > self.limit:
            raise ContextLengthError(
                f"{needed} tokens exceed the maximum context of {self.limit}: shorten the prompt, or export with a larger --max-context"
            )
        if needed <= self.capacity:
            return
        capacity = min(max(2 * self.capacity, round_capacity(needed)), round_capacity(self.limit))
        for name, old in self.buffers.items():
            new = np.zeros((*old.shape[:2], capacity, old.shape[3]), old.dtype)
            new[:, :, : self.length] = old[:, :, : self.length]
            self.buffers[name] = new
        self.generation += 1

    def advance(self, rows: int) -> None:
        """Counts rows that an engine has just written."""
        self.length += rows

    def truncate(self, length: int) -> None:
        """Forgets the rows from `length` on; nothing is copied or cleared."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} rows to {length}")
        self.length = length

    def clone(self) -> KVGroup:
        """An independent copy of the valid rows, with the same capacity."""
        other = copy.copy(self)
        other.buffers = {name: np.zeros_like(buffer) for name, buffer in self.buffers.items()}
        for name, buffer in self.buffers.items():
            other.buffers[name][:, :, : self.length] = buffer[:, :, : self.length]
        return other

    def layer(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Valid keys and values of a layer (global index), [kv_heads, length, head_size] views."""
        keys, values = self.buffers[names.past_key(i)], self.buffers[names.past_value(i)]
        return keys[0, :, : self.length], values[0, :, : self.length]


def round_capacity(rows: int) -> int:
    """The capacity of a cache that holds `rows` tokens."""
    return -(-rows // ROUND_TO) * ROUND_TO
