"""New rows into a key-value cache at a position that stands in device memory, for engines whose graphs return the new rows alone.

One kernel, in three widths of its unit of copying (16, 4 or 2 bytes), compiled for the device by NVRTC when it is first needed: the rows
are moved as they are, so that fp16, bf16 and fp32 are alike. Knows nothing about layers.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from typing import Any, Final

from runtime.device.base import ITEM_BYTES, DeviceArray
from runtime.device.cuda_api import Driver
from runtime.errors import EngineError

UNITS: Final = (16, 4, 2)
THREADS: Final = 256  # of one block
MAX_UNITS: Final = 1 << 31
INSTALL: Final = "pip install nvidia-cuda-nvrtc-cu12 (CUDA 13: nvidia-cuda-nvrtc; on a Jetson: apt-get install cuda-nvrtc-12-6)"
# A thread moves one unit. Rows that would leave the cache are dropped, so that a wrong position never writes elsewhere.
SOURCE: Final = r"""
#define SCATTER(NAME, UNIT)                                                                                          \
    extern "C" __global__ void NAME(UNIT* cache, const UNIT* rows, const long long* past_length, unsigned int count, \
                                    unsigned int capacity, unsigned int width, unsigned int total)                   \
    {                                                                                                                \
        const unsigned int i = blockIdx.x * blockDim.x + threadIdx.x;                                                \
        if (i >= total) return;                                                                                      \
        const unsigned int row = i / width, head = row / count;                                                      \
        const long long slot = *past_length + (row - head * count);                                                  \
        if (slot < 0 || slot >= capacity) return;                                                                    \
        cache[((long long)head * capacity + slot) * width + i % width] = rows[i];                                    \
    }
SCATTER(scatter_16, uint4)
SCATTER(scatter_4, unsigned int)
SCATTER(scatter_2, unsigned short)
"""
_ARGUMENTS: Final = (*(ctypes.c_void_p,) * 3, *(ctypes.c_uint,) * 4)


class Scatter:
    """The kernel, loaded into the current context.

    Raises:
        EngineError: NVRTC is missing, or does not know the device.
    """

    def __init__(self, driver: Driver, capability: int) -> None:
        self._driver = driver
        image = compile_for(_load_nvrtc(), capability)
        relaxed = driver.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        mode = driver.call("cuThreadExchangeStreamCaptureMode", relaxed)  # loading is not part of what may be recorded just now
        try:
            self._module = driver.call("cuModuleLoadData", image)
            self._kernels = {unit: driver.call("cuModuleGetFunction", self._module, b"scatter_%d" % unit) for unit in UNITS}
        finally:
            driver.call("cuThreadExchangeStreamCaptureMode", mode)

    def enqueue(self, cache: DeviceArray, rows: DeviceArray, past_length: DeviceArray, stream: Any) -> None:
        """As `Device.scatter_rows`.

        Raises:
            ValueError: the arrays do not belong together.
        """
        _check(cache, rows, past_length)
        row_bytes = rows.shape[3] * ITEM_BYTES[rows.dtype]
        unit = next(unit for unit in UNITS if not (cache.address | rows.address | row_bytes) % unit)
        total = rows.nbytes // unit
        if total >= MAX_UNITS:
            raise ValueError(f"rows of shape {rows.shape} are more than one launch moves ({MAX_UNITS} units of {unit} bytes)")
        if not total:
            return
        values = (cache.address, rows.address, past_length.address, rows.shape[2], cache.shape[2], row_bytes // unit, total)
        grid, block = (-(-total // THREADS), 1, 1), (THREADS, 1, 1)
        self._driver.call("cuLaunchKernel", self._kernels[unit], *grid, *block, 0, stream, (values, _ARGUMENTS), 0)

    def unload(self) -> None:
        """Gives the kernel back; nothing that was enqueued uses it any more."""
        self._driver.attempt("cuModuleUnload", self._module)


def _check(cache: DeviceArray, rows: DeviceArray, past_length: DeviceArray) -> None:
    fits = (
        len(cache.shape) == len(rows.shape) == 4
        and (cache.shape[0], rows.shape[0]) == (1, 1)
        and (cache.shape[1], cache.shape[3], cache.dtype) == (rows.shape[1], rows.shape[3], rows.dtype)
    )
    if not fits or ITEM_BYTES[rows.dtype] not in (2, 4) or (past_length.shape, past_length.dtype) != ((1,), "int64"):
        raise ValueError(
            f"cannot put rows {rows.shape} {rows.dtype} into a cache {cache.shape} {cache.dtype} at {past_length.shape} "
            f"{past_length.dtype}: expected [1, heads, S, d_h] and [1, heads, C, d_h] of one type of 2 or 4 bytes, and int64 [1]"
        )


def _load_nvrtc() -> Any:
    """The module `cuda.bindings.nvrtc`, its library found.

    Raises:
        EngineError: it is not.
    """
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["?"])[0][:160]
        raise EngineError(
            f"this bundle's caches are written by a kernel that NVRTC compiles, and NVRTC is missing: {INSTALL} [{reason}]"
        ) from error
    return nvrtc


@functools.cache
def compile_for(nvrtc: Any, capability: int) -> bytes:
    """The kernel's machine code for a compute capability (89 is 8.9); compiled once in a process.

    Raises:
        EngineError: this NVRTC does not know the capability, or refuses the source.
    """
    version = ".".join(map(str, _call(nvrtc, "nvrtcVersion")))
    known = _call(nvrtc, "nvrtcGetSupportedArchs")[0]
    if capability not in known:
        raise EngineError(
            f"NVRTC {version} compiles for SM{min(known)} to SM{max(known)}, this GPU is SM{capability}: install a newer one, {INSTALL}"
        )
    (program,) = _call(nvrtc, "nvrtcCreateProgram", SOURCE.encode(), b"scatter.cu", 0, None, None)
    try:
        options = [b"--gpu-architecture=sm_%d" % capability]
        code = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
        if code:
            log = bytearray(_call(nvrtc, "nvrtcGetProgramLogSize", program)[0])
            text = bytes(log)
            _call(nvrtc, "nvrtcGetProgramLog", program, text)  # writes into it
            raise EngineError(
                f"NVRTC {version} cannot compile the cache's kernel: {text.decode(errors='replace').strip()[:300]}; report this"
            )
        image = bytes(_call(nvrtc, "nvrtcGetCUBINSize", program)[0])
        _call(nvrtc, "nvrtcGetCUBIN", program, image)  # writes into it, as the bindings want it
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return image


def _call(nvrtc: Any, name: str, *args: Any) -> tuple[Any, ...]:
    code, *results = getattr(nvrtc, name)(*args)
    if code:
        raise EngineError(f"NVRTC refused {name}: {code.name}; install it again, {INSTALL}")
    return tuple(results)
