"""The contracts between the chain, a device and the engines that run on it. Knows nothing about CUDA or any engine library.

Everything is enqueued on one stream, in order; nothing waits but `Device.synchronize`. Arrays are addresses with a shape: whoever
allocated the memory keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

ITEM_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A C-contiguous array in device memory; `dtype` is the manifest's name of its type."""

    address: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def rows(self, start: int, stop: int) -> DeviceArray:
        """The rows `start` to `stop` of an array [S, d] or [1, S, d]: the same memory, at an offset.

        Raises:
            ValueError: the array has another form, or fewer rows.
        """
        leading, axis = self.shape[:-2], len(self.shape) - 2
        if axis < 0 or math.prod(leading) != 1 or not 0 <= start <= stop <= self.shape[axis]:
            raise ValueError(f"cannot take rows {start} to {stop} of an array of shape {self.shape}")
        offset = start * self.shape[-1] * ITEM_BYTES[self.dtype]
        return DeviceArray(self.address + offset, (*leading, stop - start, self.shape[-1]), self.dtype)


class Device(Protocol):
    """Memory and one stream of one device.

    Every method may raise EngineError: the device is lost, or out of memory (the message says how much was asked for).
    """

    stream: int
    """The stream's handle, for engines."""

    def allocate(self, nbytes: int) -> int:
        """The address of new memory, all zeros, aligned to 256 bytes."""
        ...

    def free(self, address: int) -> None:
        """Gives memory of `allocate` back, after what was enqueued before."""
        ...

    def host_buffer(self, nbytes: int) -> np.ndarray:
        """uint8 [nbytes] of page-locked host memory, zeros; it lives as long as the array."""
        ...

    def upload(self, address: int, source: np.ndarray) -> None:
        """Copies a C-contiguous host array to the device; `source` must live and stay unchanged until `synchronize`."""
        ...

    def download(self, target: np.ndarray, address: int) -> None:
        """Copies device memory into a C-contiguous host array; it is there after `synchronize`."""
        ...

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copies within the device."""
        ...

    def scatter_rows(self, cache: DeviceArray, rows: DeviceArray, past_length: DeviceArray) -> None:
        """Puts rows [1, heads, S, d_h] into a cache [1, heads, C, d_h] at slot `past_length` [1] int64, read on the device when it runs."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records what `work` enqueues, running none of it; the returned function enqueues it all, addresses and shapes as recorded."""
        ...

    def synchronize(self) -> None:
        """Waits for everything that was enqueued."""
        ...

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device's memory."""
        ...

    def close(self) -> None:
        """Frees what is left; the device cannot be used afterwards."""
        ...


class DeviceEngine(Protocol):
    """One graph of a bundle, ready to run on a device.

    Attributes:
        name: the graph's.
        capacity: the length C of the caches that it takes; None for any.
        max_rows: new rows S (`score`: visual tokens N) that it takes at once; None for any.
        row_ranges: numbers of new rows that it takes (from, to), where there are gaps between them; empty: all up to `max_rows`.
        uncapturable: why its runs cannot be captured; None where they can.
    """

    name: str
    capacity: int | None
    max_rows: int | None
    row_ranges: tuple[tuple[int, int], ...] = ()
    uncapturable: str | None = None

    def enqueue(self, arrays: Mapping[str, DeviceArray]) -> None:
        """Enqueues one run on the device's stream.

        Args:
            arrays: every input and output of the graph by name, of its concrete shape. A cache's past and present may share an address:
                the write is then in place.

        Raises:
            EngineError: the engine refuses the shapes, or the run.
        """
        ...
