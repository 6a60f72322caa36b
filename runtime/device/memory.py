"""Device memory that the chain works in: buffers that grow, and page-locked host memory whose contents go up in one copy.

Knows nothing about graphs. Nothing here waits: who begins a `Stage` anew has synchronized since its last upload.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from runtime.device.base import ITEM_BYTES, Device, DeviceArray
from runtime.token_table import from_bfloat16_bits

ALIGNMENT = 256  # of whatever an engine is handed: what `Device.allocate` gives


def round_up(nbytes: int) -> int:
    """To a whole number of aligned blocks, at least one."""
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


def is_aligned(array: DeviceArray) -> bool:
    return array.address % ALIGNMENT == 0


def reshaped(array: DeviceArray, shape: tuple[int, ...]) -> DeviceArray:
    """The same memory in another shape of the same size."""
    assert math.prod(shape) == math.prod(array.shape), (shape, array.shape)
    return DeviceArray(array.address, shape, array.dtype)


def runs_of(rows: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Stretches of consecutive numbers in `rows` [n] int64 ascending: (index in `rows`, first number, how many)."""
    if not len(rows):
        return
    starts = np.r_[0, np.flatnonzero(np.diff(rows) != 1) + 1]
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
        yield start, int(rows[start]), stop - start


def host_dtype(dtype: str) -> str:
    """numpy's name of the type that holds a manifest's type on the host; bfloat16 is held as its bits."""
    return "uint16" if dtype == "bfloat16" else dtype


def read_array(device: Device, array: DeviceArray) -> np.ndarray:
    """Downloads an array and waits for it; bfloat16 comes as float32."""
    target = np.empty(array.shape, host_dtype(array.dtype))
    device.download(target, array.address)
    device.synchronize()
    return from_bfloat16_bits(target) if array.dtype == "bfloat16" else target


class Scratch:
    """Buffers by name, kept from one use to the next; a name's buffer is replaced by a larger one when it must be."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._held: dict[str, tuple[int, int]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """An array in the buffer `name`; what it holds is that of the last use."""
        needed = round_up(math.prod(shape) * ITEM_BYTES[dtype])
        address, size = self._held.get(name, (0, 0))
        if size < needed:
            if size:
                del self._held[name]
                self._device.free(address)
            address = self._device.allocate(needed)
            self._held[name] = (address, needed)
        return DeviceArray(address, shape, dtype)

    def close(self) -> None:
        while self._held:
            self._device.free(self._held.popitem()[1][0])


class Stage:
    """Host arrays that go to the device together: `begin`, `put` each, `upload` once."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._host = np.zeros(0, np.uint8)
        self._address = self._used = 0

    def begin(self, nbytes: int) -> None:
        """Empties the stage and makes room for arrays that take `nbytes` with their alignment (`round_up` of each)."""
        self._used = 0
        if nbytes > len(self._host):
            self.close()
            self._host = self._device.host_buffer(nbytes)
            self._address = self._device.allocate(nbytes)

    def put(self, array: np.ndarray, dtype: str) -> DeviceArray:
        """Copies an array into the stage; returns where it will be on the device after `upload`."""
        start, stop = self._used, self._used + array.nbytes
        assert stop <= len(self._host), "begin was told too little"
        self._host[start:stop] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._used = start + round_up(array.nbytes)
        return DeviceArray(self._address + start, array.shape, dtype)

    def upload(self) -> None:
        self._device.upload(self._address, self._host[: min(self._used, len(self._host))])

    def close(self) -> None:
        if self._address:
            self._device.free(self._address)
        self._host, self._address = np.zeros(0, np.uint8), 0
