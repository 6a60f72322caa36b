"""Key-value caches in a device's memory, and the pool that keeps those of finished conversations.

A group that is no longer referred to hands its block back by a weak reference: from whatever thread that happens in, it only leaves the
block in a list, which the next call under the chain's lock takes in. A block that comes from the pool has the addresses that a captured
decode step knows.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.device.base import Device, DeviceArray
from runtime.device.memory import read_array
from runtime.errors import EngineError
from runtime.kv_cache import KVGroup

MAX_IDLE = 2  # blocks of each half that wait for a next conversation


@dataclass(slots=True, eq=False)
class Block:
    """The buffers of one group. `number` tells blocks apart for good; `sound`: no run has left numbers in it that are not finite."""

    number: int
    buffers: dict[str, DeviceArray]
    sound: bool = True

    @property
    def capacity(self) -> int:
        return next(iter(self.buffers.values())).shape[2]


@dataclass(slots=True, eq=False)
class Lease:
    """What a group holds now."""

    block: Block | None


class DeviceCaches:
    """See `runtime.kv_cache.CacheMemory`.

    Args:
        lock: held during every use of the device; it has to be one that a thread may take twice.
        on_free: told of every block before its memory goes.
    """

    def __init__(self, device: Device, lock: AbstractContextManager[Any], on_free: Callable[[Block], None] = lambda _: None) -> None:
        self._device, self._lock, self._on_free = device, lock, on_free
        self._idle: list[Block] = []  # the one that came back last at the end
        self._returned: deque[Lease] = deque()
        self._leases: weakref.WeakKeyDictionary[KVGroup, Lease] = weakref.WeakKeyDictionary()
        self._blocks = 0
        self._closed = False

    def block_of(self, group: KVGroup) -> Block:
        """The block that a group holds."""
        block = self._leases[group].block
        assert block is not None, "a group keeps its block"
        return block

    def allocate(self, group: KVGroup, capacity: int) -> None:
        with self._lock:
            self._check_open()
            self.collect()
            lease = Lease(self._take(group, capacity) or self._new(group, capacity))
            self._leases[group] = lease
            weakref.finalize(group, self._returned.append, lease).atexit = False
            group.buffers = dict(self.block_of(group).buffers)

    def grow(self, group: KVGroup, capacity: int) -> None:
        with self._lock:
            old, new = self.block_of(group), self._new(group, capacity)
            new.sound = old.sound
            for name, buffer in old.buffers.items():
                self._copy(buffer, new.buffers[name], group.length)
            self._leases[group].block = new
            group.buffers = dict(new.buffers)
            self._free(old)

    def copy_rows(self, source: KVGroup, target: KVGroup) -> None:
        with self._lock:
            self.block_of(target).sound = self.block_of(source).sound
            for name, buffer in source.buffers.items():
                self._copy(buffer, target.buffers[name], source.length)

    def read(self, buffer: DeviceArray, rows: int) -> np.ndarray:
        with self._lock:
            self._check_open()
            return read_array(self._device, buffer)[0, :, :rows]

    def collect(self) -> None:
        """Takes in the blocks of groups that are gone; the oldest ones beyond the bound are freed."""
        while self._returned:
            block = self._returned.popleft().block
            if block is None:
                continue
            if not block.sound:
                self._free(block)
                continue
            self._idle.append(block)
            alike = [idle for idle in self._idle if idle.buffers.keys() == block.buffers.keys()]
            if len(alike) > MAX_IDLE:
                self._idle.remove(alike[0])
                self._free(alike[0])

    def free_idle(self) -> None:
        """Frees all that wait for a next conversation."""
        self.collect()
        while self._idle:
            self._free(self._idle.pop())

    def close(self) -> None:
        """Frees every block, those of conversations that are still there too."""
        self.free_idle()
        self._closed = True
        for lease in list(self._leases.values()):
            if lease.block is not None:
                self._free(lease.block)
                lease.block = None

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the model was closed, its caches are gone: load the bundle again")

    def _take(self, group: KVGroup, capacity: int) -> Block | None:
        """An idle block of this group's layers, up to twice as long as needed (none longer where it is fixed); the shortest, last used."""
        longest = capacity if group.fixed else 2 * capacity
        names = set(group.buffer_names)
        fitting = [b for b in self._idle if b.buffers.keys() == names and capacity <= b.capacity <= longest]
        if not fitting:
            return None
        best = min(reversed(fitting), key=lambda block: block.capacity)
        self._idle.remove(best)
        return best

    def _new(self, group: KVGroup, capacity: int) -> Block:
        try:
            return self._allocate(group, capacity)
        except EngineError:  # no memory, or none left beside what waits for a next conversation
            if not self._idle:
                raise
        self.free_idle()
        self._device.synchronize()
        return self._allocate(group, capacity)

    def _allocate(self, group: KVGroup, capacity: int) -> Block:
        self._blocks += 1
        buffers: dict[str, DeviceArray] = {}
        try:
            for name in group.buffer_names:
                array = DeviceArray(0, group.shape(capacity), group.dtype)
                buffers[name] = DeviceArray(self._device.allocate(array.nbytes), array.shape, array.dtype)
        except BaseException:
            for array in buffers.values():
                self._device.free(array.address)
            raise
        return Block(self._blocks, buffers)

    def _free(self, block: Block) -> None:
        self._on_free(block)
        for array in block.buffers.values():
            self._device.free(array.address)

    def _copy(self, source: DeviceArray, target: DeviceArray, rows: int) -> None:
        """Valid rows: head by head, and in one piece where both are equally long."""
        if source.shape == target.shape:
            self._device.copy(target.address, source.address, source.nbytes)
            return
        heads = source.shape[1]
        row_bytes = source.nbytes // (heads * source.shape[2])
        for head in range(heads) if rows else ():
            start, goal = (a.address + head * a.shape[2] * row_bytes for a in (source, target))
            self._device.copy(goal, start, rows * row_bytes)
