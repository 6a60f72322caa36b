"""A CUDA device: memory, one stream, and recordings of what was enqueued on it (CUDA graphs).

Memory comes from cuMemAlloc, not from the stream-ordered pool: there are few allocations, all before the work; the address has to outlive
what is recorded (a pool's address taken during a recording belongs to the recording, while cuMemAlloc refuses there); and a Jetson need not
have pools. On a Jetson, device and page-locked memory are the same DRAM: copies between them cost bandwidth and nothing is shared.
Knows nothing about engines.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.device.base import Device, DeviceArray
from runtime.device.cuda_api import Gpu, PrimaryContext, load_driver
from runtime.device.scatter import Scatter
from runtime.errors import EngineError


class CudaDevice(Device):
    """One GPU, counted from 0. May be used from several threads, by one at a time; `current` is for libraries that work on it.

    Raises:
        EngineError: cuda-bindings, the driver or this GPU is missing; the message says what to do.
    """

    def __init__(self, index: int = 0) -> None:
        self._driver = driver = load_driver()
        count = driver.count()
        if not 0 <= index < count:
            raise EngineError(f"there is no GPU {index}: the driver finds {count}, counted from 0; see nvidia-smi")
        self._gpu: Gpu = driver.gpu(index)
        self.driver_version: str = driver.version()
        self._context = PrimaryContext(driver, index)
        self._allocated: set[int] = set()
        self._before_close: list[Callable[[], None]] = []
        self._scatter: Scatter | None = None
        with self._context:
            self._stream: Any = driver.call("cuStreamCreate", driver.api.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
        self.stream = int(self._stream)

    @property
    def name(self) -> str:
        """Such as "NVIDIA GeForce RTX 4070"."""
        return self._gpu.name

    @property
    def capability(self) -> int:
        """Compute capability: 89 for 8.9."""
        return self._gpu.capability

    @property
    def total_bytes(self) -> int:
        """The device's memory; a Jetson's is the system's."""
        return self._gpu.total_bytes

    def current(self) -> PrimaryContext:
        """Within its `with` block this device is the calling thread's current one, for this API and for CUDA's runtime.

        Raises:
            EngineError: the device is closed.
        """
        if not self._context.open:
            raise EngineError("the device is closed: load the bundle again")
        return self._context

    def before_close(self, function: Callable[[], None]) -> None:
        """Has `function` called when the device is closed, the last one first, while its memory is still there."""
        self._before_close.append(function)

    def allocate(self, nbytes: int) -> int:
        with self.current():
            address = self._driver.obtain("cuMemAlloc", max(nbytes, 1))
            self._allocated.add(address)
            self._driver.call("cuMemsetD8Async", address, 0, max(nbytes, 1), self._stream)
        return address

    def free(self, address: int) -> None:
        if address not in self._allocated:
            raise ValueError(f"{address:#x} is no address of this device's `allocate`, or was freed before")
        with self.current():
            self._driver.call("cuStreamSynchronize", self._stream)  # what was enqueued may use it
            self._allocated.discard(address)
            self._driver.call("cuMemFree", address)

    def host_buffer(self, nbytes: int) -> np.ndarray:
        if not nbytes:
            return np.zeros(0, np.uint8)
        with self.current():
            pointer = self._driver.obtain("cuMemHostAlloc", nbytes, self._driver.api.CU_MEMHOSTALLOC_PORTABLE)
        ctypes.memset(pointer, 0, nbytes)
        block = (ctypes.c_uint8 * nbytes).from_address(pointer)  # the array keeps it alive
        weakref.finalize(block, self._context.discard, "cuMemFreeHost", pointer).atexit = False
        return np.frombuffer(memoryview(block), np.uint8)

    def upload(self, address: int, source: np.ndarray) -> None:
        with self.current():
            self._driver.call("cuMemcpyHtoDAsync", address, _pointer(source), source.nbytes, self._stream)

    def download(self, target: np.ndarray, address: int) -> None:
        if not target.flags.writeable:
            raise ValueError("cannot download into a read-only array")
        with self.current():
            self._driver.call("cuMemcpyDtoHAsync", _pointer(target), address, target.nbytes, self._stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        with self.current():
            self._driver.call("cuMemcpyDtoDAsync", target, source, nbytes, self._stream)

    def scatter_rows(self, cache: DeviceArray, rows: DeviceArray, past_length: DeviceArray) -> None:
        with self.current():
            if self._scatter is None:
                self._scatter = Scatter(self._driver, self._gpu.capability)
            self._scatter.enqueue(cache, rows, past_length, self._stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        api = self._driver.api
        with self.current():
            self._driver.call("cuStreamBeginCapture", self._stream, api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            try:
                work()
            except BaseException:
                error, graph = self._driver.attempt("cuStreamEndCapture", self._stream)
                if error is None:
                    self._driver.attempt("cuGraphDestroy", graph)
                raise
            graph = self._driver.call("cuStreamEndCapture", self._stream)
            try:
                return _Recording(self, self._driver.call("cuGraphInstantiate", graph, 0))
            finally:
                self._driver.call("cuGraphDestroy", graph)

    def replay(self, executable: Any) -> None:
        """Enqueues an instantiated graph."""
        with self.current():
            self._driver.call("cuGraphLaunch", executable, self._stream)

    def synchronize(self) -> None:
        with self.current():
            self._driver.call("cuStreamSynchronize", self._stream)
            self._context.empty()  # nothing uses it any more

    def memory(self) -> tuple[int, int]:
        """Free and total bytes as the driver counts them; on a Jetson, what the system could give back (file caches) is not free to it."""
        with self.current():
            free, total = self._driver.call("cuMemGetInfo")
        return int(free), int(total)

    def close(self) -> None:
        """Frees what is left; page-locked arrays stay usable. A second call does nothing."""
        if not self._context.open:
            return
        for function in reversed(self._before_close):
            function()
        self._before_close.clear()
        with self._context:
            self._driver.attempt("cuStreamSynchronize", self._stream)  # on a lost device everything fails, and is gone anyway
            self._context.empty()
            if self._scatter is not None:
                self._scatter.unload()
            for address in self._allocated:
                self._driver.attempt("cuMemFree", address)
            self._driver.attempt("cuStreamDestroy", self._stream)
        self._allocated.clear()
        self._context.open = False


class _Recording:
    """What was captured, to be enqueued again; freed with this object, or with the device."""

    def __init__(self, device: CudaDevice, executable: Any) -> None:
        self._device, self._executable = device, executable
        weakref.finalize(self, device.current().discard, "cuGraphExecDestroy", executable).atexit = False

    def __call__(self) -> None:
        self._device.replay(self._executable)


def _pointer(array: np.ndarray) -> int:
    """The address of a C-contiguous array."""
    if not array.flags.c_contiguous:
        raise ValueError(f"an array of shape {array.shape} is not C-contiguous: copy it first")
    return int(array.__array_interface__["data"][0])
