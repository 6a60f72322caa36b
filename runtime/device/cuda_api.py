"""NVIDIA's driver as `cuda.bindings` (package cuda-bindings, 12.x and 13.x) offers it, its error codes turned into EngineError.

The driver's own API alone is used, not the CUDA runtime's, so that a package of CUDA 12.9 can serve the driver of CUDA 12.6 (JetPack 6.2).
The context is the primary one, which engine libraries use too. Knows nothing about streams, memory or engines.
"""

from __future__ import annotations

import importlib
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from runtime.errors import EngineError
from runtime.units import format_bytes

INSTALL: Final = "pip install cuda-bindings (for a driver of CUDA 12, such as JetPack 6's: pip install 'cuda-bindings<13')"
OUT_OF_MEMORY: Final = "CUDA_ERROR_OUT_OF_MEMORY"
LOST: Final = frozenset({
    "CUDA_ERROR_ASSERT", "CUDA_ERROR_CONTAINED", "CUDA_ERROR_CONTEXT_IS_DESTROYED", "CUDA_ERROR_DEVICE_UNAVAILABLE",
    "CUDA_ERROR_ECC_UNCORRECTABLE", "CUDA_ERROR_EXTERNAL_DEVICE", "CUDA_ERROR_HARDWARE_STACK_ERROR", "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION", "CUDA_ERROR_INVALID_ADDRESS_SPACE", "CUDA_ERROR_INVALID_PC", "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT", "CUDA_ERROR_MISALIGNED_ADDRESS", "CUDA_ERROR_NVLINK_UNCORRECTABLE",
})  # fmt: skip
"""After one of these the process's context is gone: every later call fails too."""
NO_DRIVER: Final = (
    "no NVIDIA driver is installed (libcuda cannot be loaded): install the GPU's driver; in a container, start it with --gpus all "
    "(on a Jetson: --runtime nvidia)"
)
ADVICE: Final = {
    "CUDA_ERROR_NO_DEVICE":
        "the NVIDIA driver finds no GPU: look at nvidia-smi and at CUDA_VISIBLE_DEVICES; start a container with --gpus all",
    "CUDA_ERROR_STUB_LIBRARY": "libcuda is a stub, not the driver: take the CUDA toolkit's folder 'stubs' out of LD_LIBRARY_PATH",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver's library and its kernel module differ in version: restart the machine",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "this GPU does not run CUDA's forward-compatible libcuda: take it out of LD_LIBRARY_PATH",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the driver says of one device; `capability` is its compute capability (89 is 8.9), `integrated`: it shares the host's memory."""

    name: str
    capability: int
    total_bytes: int
    integrated: bool


class Driver:
    """The functions of `cuda.bindings.driver` by name. `api` is the module, for its enumerations."""

    def __init__(self, api: Any) -> None:
        self.api = api

    def attempt(self, name: str, *args: Any) -> tuple[str | None, Any]:
        """Calls a function; returns the name of its error (None: it went well) and its result (a tuple where it has several).

        Raises:
            EngineError: the driver is too old to have the function.
        """
        try:
            code, *results = getattr(self.api, name)(*args)
        except RuntimeError as error:  # what the bindings make of a missing library or function
            raise EngineError(f"the NVIDIA driver cannot do {name} ({_line(error)}): update the driver, or {INSTALL}") from error
        if code:
            return str(code.name), None
        return None, results[0] if len(results) == 1 else tuple(results)

    def call(self, name: str, *args: Any) -> Any:
        """Calls a function and returns its result.

        Raises:
            EngineError: it failed; the message says why.
        """
        error, result = self.attempt(name, *args)
        if error is not None:
            raise EngineError(self.explain(name, error))
        return result

    def obtain(self, name: str, nbytes: int, *args: Any) -> int:
        """The address that an allocating function returns.

        Raises:
            EngineError: it failed; where memory is short, the message says how much was asked for and how much is free.
        """
        error, address = self.attempt(name, nbytes, *args)
        if error is None:
            return int(address)
        if error != OUT_OF_MEMORY:
            raise EngineError(self.explain(name, error))
        free, total = self.call("cuMemGetInfo")
        raise EngineError(
            f"out of GPU memory: {format_bytes(nbytes)} were asked for ({name}), {format_bytes(free)} of {format_bytes(total)} are free; "
            "close other programs that use the GPU, or use a smaller capacity or precision"
        )

    def explain(self, name: str, error: str) -> str:
        """The message for an error of a function."""
        if error in ADVICE:
            return f"{ADVICE[error]} ({error})"
        if error == OUT_OF_MEMORY:
            return f"the GPU is out of memory ({name}): close other programs that use it, or use a smaller capacity or precision"
        if error in LOST:
            return f"the GPU stopped working for this process ({name}: {error}, {self._words(error)}): start the program again"
        return f"the NVIDIA driver refused {name}: {error}, {self._words(error)}"

    def version(self) -> str:
        """The newest CUDA version that the driver can run, such as "12.6"."""
        number = int(self.call("cuDriverGetVersion"))
        return f"{number // 1000}.{number % 1000 // 10}"

    def count(self) -> int:
        """How many GPUs there are."""
        return int(self.call("cuDeviceGetCount"))

    def gpu(self, index: int) -> Gpu:
        """One GPU, counted from 0; makes no context on it."""
        device, attributes = self.call("cuDeviceGet", index), self.api.CUdevice_attribute
        major = self.call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = self.call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        integrated = self.call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_INTEGRATED, device)
        name = bytes(self.call("cuDeviceGetName", 256, device)).split(b"\0")[0].decode(errors="replace")
        return Gpu(name, 10 * int(major) + int(minor), int(self.call("cuDeviceTotalMem", device)), bool(integrated))

    def _words(self, error: str) -> str:
        code, text = self.api.cuGetErrorString(getattr(self.api.CUresult, error))
        return "no description" if code or not text else text.decode(errors="replace")


def load_driver() -> Driver:
    """The driver, initialised.

    Raises:
        EngineError: the package cuda-bindings, the driver or every GPU is missing; the message says what to do.
    """
    try:
        driver = Driver(importlib.import_module("cuda.bindings.driver"))
    except ModuleNotFoundError as error:
        raise EngineError(f"running on a GPU needs the package cuda-bindings, which is not installed: {INSTALL}") from error
    except (ImportError, OSError) as error:
        raise EngineError(f"the package cuda-bindings cannot be loaded ({_line(error)}): install it again, {INSTALL}") from error
    try:
        (code,) = driver.api.cuInit(0)
    except RuntimeError as error:
        raise EngineError(f"{NO_DRIVER} [{_line(error)}]") from error
    if code:
        raise EngineError(driver.explain("cuInit", str(code.name)))
    return driver


class PrimaryContext:
    """A device's primary context: retained while this object lives, and current within its `with` block, in any thread.

    What is given to `discard` is destroyed at the next `empty`, which is called where nothing that was enqueued can still use it.
    """

    def __init__(self, driver: Driver, index: int) -> None:
        self.driver = driver
        self.open = True
        device = driver.call("cuDeviceGet", index)
        self._handle = driver.call("cuDevicePrimaryCtxRetain", device)
        self._discarded: deque[tuple[str, Any]] = deque()
        weakref.finalize(self, driver.attempt, "cuDevicePrimaryCtxRelease", device).atexit = False  # the process's end does it too

    def __enter__(self) -> PrimaryContext:
        self.driver.call("cuCtxPushCurrent", self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.call("cuCtxPopCurrent")

    def discard(self, function: str, handle: Any) -> None:
        """Puts something aside to be destroyed with `function`; may be called by the garbage collector, in any thread, at any time."""
        self._discarded.append((function, handle))
        if not self.open:
            with self:
                self.empty()

    def empty(self) -> None:
        """Destroys what was discarded; the context is current."""
        while self._discarded:
            self.driver.attempt(*self._discarded.popleft())


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
