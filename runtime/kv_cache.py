"""The key-value cache of one group of layers: fixed-size buffers, one length, writes in place.

A conversation has two groups whose lengths differ: `pre` holds every token, `post` holds the kept visual tokens and all text.
Knows nothing about engines; an engine binds `buffers` as they are and rebinds when `generation` changes. Where the buffers are is a
`CacheMemory`'s matter: numpy arrays here, addresses in `runtime.device.cache`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from runtime import names
from runtime.errors import ContextLengthError

ROUND_TO = names.ROUND_TO


class CacheMemory(Protocol):
    """Where groups keep their buffers, each [1, kv_heads, capacity, head_size]; every buffer has `shape` and `nbytes`."""

    def allocate(self, group: KVGroup, capacity: int) -> None:
        """Gives a group `buffers` of at least `capacity` rows, finite throughout."""
        ...

    def grow(self, group: KVGroup, capacity: int) -> None:
        """Replaces a group's buffers by longer ones that hold its valid rows."""
        ...

    def copy_rows(self, source: KVGroup, target: KVGroup) -> None:
        """Copies the valid rows of a group into another one of the same capacity."""
        ...

    def read(self, buffer: Any, rows: int) -> np.ndarray:
        """The first rows of a buffer on the host, [kv_heads, rows, head_size]."""
        ...


class HostMemory:
    """Buffers are numpy arrays."""

    def allocate(self, group: KVGroup, capacity: int) -> None:
        group.buffers = {name: np.zeros(group.shape(capacity), group.dtype) for name in group.buffer_names}

    def grow(self, group: KVGroup, capacity: int) -> None:
        for name, old in group.buffers.items():  # one after the other: no second copy of them all
            new = np.zeros(group.shape(capacity), group.dtype)
            new[:, :, : group.length] = old[:, :, : group.length]
            group.buffers[name] = new

    def copy_rows(self, source: KVGroup, target: KVGroup) -> None:
        for name, buffer in source.buffers.items():
            target.buffers[name][:, :, : source.length] = buffer[:, :, : source.length]

    def read(self, buffer: np.ndarray, rows: int) -> np.ndarray:
        return buffer[0, :, :rows]


class KVGroup:
    """Buffers [1, kv_heads, capacity, head_size] for keys and values of some layers, and how many rows are valid.

    `dtype` is the manifest's name of their type, that of the graphs. The group owns its buffers, in `memory` (host memory where left out).
    Rows at and beyond `length` are finite but meaningless. With `fixed`, the capacity is that and stays. Only the pipeline calls `advance`.
    """

    def __init__(
        self, layers: Iterable[int], kv_heads: int, head_size: int, capacity: int, limit: int, dtype: str = "float32",
        memory: CacheMemory | None = None, fixed: int | None = None,
    ) -> None:  # fmt: skip
        self.layers = tuple(layers)
        self.length = 0
        self.limit, self._remedy = limit, "export with a larger --max-context"
        if fixed is not None and fixed < limit:
            self.limit, self._remedy = fixed, "compile with a larger --capacity"
        self.generation = 0
        self.kv_heads, self.head_size, self.dtype, self.fixed = kv_heads, head_size, dtype, fixed
        self.buffers: dict[str, Any] = {}
        self._memory = memory or HostMemory()
        self._memory.allocate(self, fixed or min(round_capacity(capacity), round_capacity(limit)))

    @property
    def buffer_names(self) -> tuple[str, ...]:
        return tuple(name for i in self.layers for name in (names.past_key(i), names.past_value(i)))

    def shape(self, capacity: int) -> tuple[int, int, int, int]:
        """Of every buffer, for a capacity."""
        return (1, self.kv_heads, capacity, self.head_size)

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
            raise ContextLengthError(f"{needed} tokens exceed the maximum context of {self.limit}: shorten the prompt, or {self._remedy}")
        if needed <= self.capacity:
            return
        self._memory.grow(self, min(max(2 * self.capacity, round_capacity(needed)), round_capacity(self.limit)))
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
        self._memory.allocate(other, self.capacity)
        self._memory.copy_rows(self, other)
        return other

    def layer(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Valid keys and values of a layer (global index), [kv_heads, length, head_size] on the host (views where the cache is there)."""
        keys, values = (self._memory.read(self.buffers[name(i)], self.length) for name in (names.past_key, names.past_value))
        return keys, values


def round_capacity(rows: int) -> int:
    """The capacity of a cache that holds `rows` tokens."""
    return -(-rows // ROUND_TO) * ROUND_TO
