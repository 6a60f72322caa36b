"""A GPU without a GPU: `cuda.bindings` limited to the names that the real package has, whose device memory is host memory.

Work is put off until something waits for the stream, as on a GPU: who reads too early, or changes a source too soon, gets other bytes.
Kernels are compiled by the machine's own C++ compiler and run thread after thread.
"""

from __future__ import annotations

import ctypes
import functools
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GUARD = 64  # bytes after each allocation that nothing may write
SHIM = """
#include <cstddef>
struct Index { unsigned int x, y, z; };
static Index blockIdx, blockDim, threadIdx;
struct uint4 { unsigned int x, y, z, w; };
#define __global__
%s
#define RUN(NAME, UNIT) extern "C" void run_##NAME(unsigned int grid, unsigned int block, UNIT* cache, const UNIT* rows, \\
    const long long* past, unsigned int count, unsigned int capacity, unsigned int width, unsigned int total) { \\
    blockDim.x = block; \\
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) \\
        for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x) NAME(cache, rows, past, count, capacity, width, total); }
RUN(scatter_16, uint4)
RUN(scatter_4, unsigned int)
RUN(scatter_2, unsigned short)
"""


def recorded() -> dict[str, dict[str, Any]]:
    """Names of each version of cuda-bindings."""
    raw = json.loads(Path(__file__).with_name("cuda_names.json").read_text(encoding="utf-8"))
    return {key: value for key, value in raw.items() if key != "about"}


class FakeGpu:
    """The device and its driver. `capturing` holds what is recorded just now; `calls` counts the driver's functions."""

    def __init__(self, version: str = "13.5.0", **facts: Any) -> None:
        self.names = recorded()[version]
        self.facts: dict[str, Any] = {
            "name": b"Fake GPU",
            "major": 8,
            "minor": 9,
            "total": 1 << 30,
            "count": 1,
            "cuda": 12060,
            "integrated": 0,
        } | facts
        self.memory: dict[int, tuple[Any, int]] = {}
        self.host: dict[int, Any] = {}
        self.pending: list[Callable[[], object]] = []
        self.capturing: list[Callable[[], object]] | None = None
        self.calls: dict[str, int] = {}
        self.contexts = threading.local()
        self.retained = 0
        self.failing: dict[str, str] = {}  # function -> error
        self.graphs: dict[int, list[Callable[[], object]]] = {}
        self.enumerations: dict[str, Any] = {name: IntEnum(name, members) for name, members in self.names["enumerations"].items()}

    # ---------------------------------------------------------------- for fakes of engine libraries

    def enqueue(self, work: Callable[[], object]) -> None:
        """What any library does with the stream."""
        (self.pending if self.capturing is None else self.capturing).append(work)

    def run(self) -> None:
        """Runs what was enqueued, and looks whether anything wrote beyond its memory."""
        while self.pending:
            self.pending.pop(0)()
        for address, (block, nbytes) in self.memory.items():
            start = address - ctypes.addressof(block)
            assert bytes(block[start + nbytes : start + nbytes + GUARD]) == b"\xa5" * GUARD, "something wrote beyond an allocation"

    @property
    def current(self) -> bool:
        """Whether a context is current in this thread."""
        return bool(getattr(self.contexts, "stack", []))

    def view(self, address: int, nbytes: int) -> Any:
        """Device memory as ctypes bytes; fails where it is not within one allocation."""
        for start, (_, size) in self.memory.items():
            if start <= address and address + nbytes <= start + size:
                return (ctypes.c_uint8 * nbytes).from_address(address)
        raise AssertionError(f"{address:#x} + {nbytes} is no memory of the device")

    # ---------------------------------------------------------------- the modules

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts the fake package in the place of the real one."""
        import sys

        driver, nvrtc = self.module("driver", _Driver(self)), self.module("nvrtc", _Nvrtc(self))
        package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
        package.__path__, bindings.__path__ = [], []
        modules = {"cuda": package, "cuda.bindings": bindings, "cuda.bindings.driver": driver, "cuda.bindings.nvrtc": nvrtc}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    def module(self, name: str, behaviour: object) -> ModuleType:
        """A module with the functions of `behaviour` that the recorded one has too."""
        module = ModuleType(f"cuda.bindings.{name}")
        for function in dir(behaviour):
            if function in self.names[name]:
                module.__dict__[function] = self._wrapped(function, getattr(behaviour, function))
        prefix = {"driver": "CU", "nvrtc": "nvrtc"}[name]
        module.__dict__.update({key: kind for key, kind in self.enumerations.items() if key.startswith(prefix)})
        module.__dict__["CU_MEMHOSTALLOC_PORTABLE"] = 1
        return module

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        context_free = ("cuInit", "cuDriver", "cuDevice", "cuCtxP", "cuGetError", "cuThread", "nvrtc")
        codes = self.enumerations["nvrtcResult" if name.startswith("nvrtc") else "CUresult"]

        @functools.wraps(function)
        def call(*args: Any) -> tuple[Any, ...]:
            self.calls[name] = self.calls.get(name, 0) + 1
            error = self.failing.get(name)
            if error is None and not name.startswith(context_free) and not self.current:
                error = "CUDA_ERROR_INVALID_CONTEXT"
            result = _Failure(error) if error else function(*args)
            if isinstance(result, _Failure):
                return codes[result.name], *([None] * result.results)
            return (codes(0), *(result if isinstance(result, tuple) else () if result is None else (result,)))

        return call


class _Failure:
    def __init__(self, name: str, results: int = 1) -> None:
        self.name, self.results = name, results


class _Handle:
    """An opaque object that is an int too, as the bindings' handles are."""

    count = 4096

    def __init__(self) -> None:
        _Handle.count += 8
        self.value = _Handle.count

    def __int__(self) -> int:
        return self.value


class _Driver:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.stream = _Handle()

    def cuInit(self, flags: int) -> Any:
        return None if self.gpu.facts["count"] else _Failure("CUDA_ERROR_NO_DEVICE", 0)

    def cuDriverGetVersion(self) -> int:
        return int(self.gpu.facts["cuda"])

    def cuDeviceGetCount(self) -> int:
        return int(self.gpu.facts["count"])

    def cuDeviceGet(self, index: int) -> Any:
        return index if index < self.gpu.facts["count"] else _Failure("CUDA_ERROR_INVALID_DEVICE")

    def cuDeviceGetName(self, length: int, device: int) -> bytes:
        return bytes(self.gpu.facts["name"].ljust(length, b"\0"))

    def cuDeviceGetAttribute(self, attribute: Any, device: int) -> int:
        key = {"MAJOR": "major", "MINOR": "minor", "TED": "integrated"}
        return int(next(self.gpu.facts[fact] for end, fact in key.items() if attribute.name.endswith(end)))

    def cuDeviceTotalMem(self, device: int) -> int:
        return int(self.gpu.facts["total"])

    def cuDevicePrimaryCtxRetain(self, device: int) -> Any:
        self.gpu.retained += 1
        return _Handle()

    def cuDevicePrimaryCtxRelease(self, device: int) -> None:
        self.gpu.retained -= 1

    def cuCtxPushCurrent(self, context: Any) -> None:
        self.gpu.contexts.__dict__.setdefault("stack", []).append(context)

    def cuCtxPopCurrent(self) -> Any:
        return self.gpu.contexts.stack.pop()

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> Any:
        previous, self.mode = getattr(self, "mode", mode.__class__(0)), mode
        return previous

    def cuGetErrorString(self, code: Any) -> bytes:
        return f"words for {int(code)}".encode()

    def cuStreamCreate(self, flags: int) -> Any:
        assert flags == 1, "not a non-blocking stream"
        return self.stream

    def cuStreamDestroy(self, stream: Any) -> None:
        assert stream is self.stream

    def cuStreamSynchronize(self, stream: Any) -> Any:
        if self.gpu.capturing is not None:
            return _Failure("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", 0)
        self.gpu.run()
        return None

    def cuMemAlloc(self, nbytes: int) -> Any:
        if self.gpu.capturing is not None:
            return _Failure("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        if sum(size for _, size in self.gpu.memory.values()) + nbytes > self.gpu.facts["total"]:
            return _Failure("CUDA_ERROR_OUT_OF_MEMORY")
        block = (ctypes.c_uint8 * (nbytes + 256 + GUARD))()
        ctypes.memset(block, 0xA5, len(block))
        address = -(-ctypes.addressof(block) // 256) * 256
        self.gpu.memory[address] = (block, nbytes)
        return address

    def cuMemFree(self, address: int) -> Any:
        assert not self.gpu.pending, "memory is freed while work that may use it waits"
        del self.gpu.memory[address]

    def cuMemsetD8Async(self, address: int, value: int, nbytes: int, stream: Any) -> None:
        self.gpu.enqueue(lambda: ctypes.memset(self.gpu.view(address, nbytes), value, nbytes))

    def cuMemHostAlloc(self, nbytes: int, flags: int) -> int:
        block = (ctypes.c_uint8 * nbytes)()
        ctypes.memset(block, 0xA5, nbytes)
        self.gpu.host[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def cuMemFreeHost(self, pointer: int) -> None:
        assert not self.gpu.pending, "host memory is freed while work that may use it waits"
        del self.gpu.host[pointer]

    def cuMemcpyHtoDAsync(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        self.gpu.enqueue(lambda: ctypes.memmove(self.gpu.view(target, nbytes), source, nbytes))

    def cuMemcpyDtoHAsync(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        self.gpu.enqueue(lambda: ctypes.memmove(target, self.gpu.view(source, nbytes), nbytes))

    def cuMemcpyDtoDAsync(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        self.gpu.enqueue(lambda: ctypes.memmove(self.gpu.view(target, nbytes), self.gpu.view(source, nbytes), nbytes))

    def cuMemGetInfo(self) -> tuple[int, int]:
        total = self.gpu.facts["total"]
        return total - sum(size for _, size in self.gpu.memory.values()), total

    def cuStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        assert mode.name == "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"
        assert self.gpu.capturing is None
        self.gpu.capturing = []

    def cuStreamEndCapture(self, stream: Any) -> Any:
        graph, self.gpu.capturing = _Handle(), None if self.gpu.capturing is None else self.gpu.capturing
        self.gpu.graphs[int(graph)], self.gpu.capturing = self.gpu.capturing or [], None
        return graph

    def cuGraphInstantiate(self, graph: Any, flags: int) -> Any:
        executable = _Handle()
        self.gpu.graphs[int(executable)] = list(self.gpu.graphs[int(graph)])
        return executable

    def cuGraphDestroy(self, graph: Any) -> None:
        del self.gpu.graphs[int(graph)]

    cuGraphExecDestroy = cuGraphDestroy

    def cuGraphLaunch(self, executable: Any, stream: Any) -> None:
        for work in self.gpu.graphs[int(executable)]:
            self.gpu.enqueue(work)

    def cuModuleLoadData(self, image: bytes) -> Any:
        if self.gpu.capturing is not None and self.mode.name != "CU_STREAM_CAPTURE_MODE_RELAXED":
            return _Failure("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        return ctypes.CDLL(image.decode())

    def cuModuleUnload(self, module: Any) -> None:
        pass

    def cuModuleGetFunction(self, module: Any, name: bytes) -> Any:
        return getattr(module, f"run_{name.decode()}")

    def cuLaunchKernel(self, function: Any, *args: Any) -> None:
        grid, block, (values, kinds), extra = args[:3], args[3:6], args[8], args[9]
        assert (grid[1:], block[1:], args[6], extra) == ((1, 1), (1, 1), 0, 0)
        unit = int(function.__name__.rpartition("_")[2])
        assert not values[0] % unit, "a GPU refuses such an address"
        assert not values[1] % unit, "a GPU refuses such an address"
        arguments = [kind(value) for kind, value in zip(kinds, values, strict=True)]
        self.gpu.enqueue(lambda: function(ctypes.c_uint(grid[0]), ctypes.c_uint(block[0]), *arguments))


@functools.cache
def _compiled(source: bytes) -> str:
    """The shared library of a kernel's source, made for this machine."""
    folder = Path(tempfile.mkdtemp(prefix="kernel-"))
    (folder / "kernel.cpp").write_text(SHIM % source.decode(), encoding="utf-8")
    command = ["g++", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(folder / "kernel.so"), str(folder / "kernel.cpp")]
    subprocess.run(command, check=True, timeout=60)
    return str(folder / "kernel.so")


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="kernels are tried with the machine's C++ compiler: install g++")


class _Nvrtc:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.options: list[bytes] = []

    def nvrtcVersion(self) -> tuple[int, int]:
        if self.gpu.facts.get("no_nvrtc"):
            raise RuntimeError("Failed to dlopen libnvrtc.so.12")
        return 12, 9

    def nvrtcGetSupportedArchs(self) -> list[int]:
        return [75, 80, 86, 87, 89, 90]

    def nvrtcCreateProgram(self, source: bytes, name: bytes, count: int, headers: Any, names: Any) -> bytes:
        return source

    def nvrtcCompileProgram(self, program: bytes, count: int, options: list[bytes]) -> None:
        assert count == len(options)
        self.options = options

    def nvrtcGetProgramLogSize(self, program: bytes) -> int:
        return 12

    def nvrtcGetProgramLog(self, program: bytes, text: bytes) -> None:
        _write(text, b"it went bad")

    def nvrtcGetCUBINSize(self, program: bytes) -> int:
        return len(_compiled(program))

    def nvrtcGetCUBIN(self, program: bytes, image: bytes) -> None:
        _write(image, _compiled(program).encode())

    def nvrtcDestroyProgram(self, program: bytes) -> None:
        pass


def _write(target: bytes, data: bytes) -> None:
    """Writes into a bytes object, as the bindings do."""
    start = id(target) + bytes.__basicsize__ - 1
    ctypes.memmove(start, data, min(len(data), len(target)))
