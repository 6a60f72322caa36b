"""The running half of a TensorRT library on a fake GPU: an engine is JSON that names its ONNX file, a run is ONNX Runtime's.

Runs are put off with the rest of the stream and work on the memory behind the addresses, in place where input and output share one. What
the library refuses is refused: shapes outside the profile, a profile that another context holds, too little activation memory, a run
recorded before one of its shapes has run. Limited to the recorded names, as the building half is.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime.engine_info import EngineInfo
from runtime.engines.onnxruntime import session_options
from runtime.engines.tensorrt_builder import BuiltEngine, EngineSpec
from runtime.manifest import FileInfo
from tests.runtime.fake_cuda import FakeGpu
from tests.runtime.fake_tensorrt import fake_library, recorded

TYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64", "tensor(int32)": "INT32", "tensor(bool)": "BOOL"}
NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}
KERNELS = b"kernels of "


@functools.cache
def session(onnx: str) -> Any:
    """The graph on the CPU."""
    return ort.InferenceSession(onnx, session_options(), providers=["CPUExecutionProvider"])


def build(spec: EngineSpec, **changes: Any) -> BuiltEngine:
    """Builds a fake engine, as `build_engine` would a real one; `changes` go into it."""
    version = next(key for key in recorded() if key.split()[0] == spec.library).split()[1]
    profiles = [{name: [s.minimum, s.maximum] for name, s in profile.shapes.items()} for profile in spec.profiles]
    content = {
        "onnx": spec.onnx,
        "profiles": profiles,
        "capabilities": spec.capabilities,
        "activation": [1000 + 7 * i for i in range(len(profiles) or 1)],
    }
    data = json.dumps(content | changes).encode()
    Path(spec.output).write_bytes(data)
    graph = session(spec.onnx)
    info = EngineInfo(
        graph=spec.graph, file=Path(spec.output).name, library=spec.library, library_version=version, capabilities=spec.capabilities,
        profiles=spec.profiles, inputs=tuple(t.name for t in graph.get_inputs()), outputs=tuple(t.name for t in graph.get_outputs()),
        weights_bytes=None, activation_bytes=(), attention_kernels=(), build_seconds=0.1, peak_rss_bytes=None,
    )  # fmt: skip
    return BuiltEngine(info, FileInfo(len(data), hashlib.sha256(data).hexdigest()))


def running_library(key: str, gpu: FakeGpu) -> ModuleType:
    """The library of `key` on a GPU."""
    module = fake_library(key, recorded()[key], _BEHAVIOUR)
    module.__dict__["_gpu"] = gpu
    module.__dict__["_compiled"] = []  # what a runtime cache spared nobody
    return module


class _Runtime:
    _module: ModuleType

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, data: Any) -> Any:
        gpu: FakeGpu = self._module.__dict__["_gpu"]
        assert gpu.current, "no context is current"
        try:
            content = json.loads(bytes(data))
        except ValueError:
            self._logger.log(1, "[runtime.cpp::readHeader::765] Error Code 2: the magic tag does not match")
            return None
        here = 10 * gpu.facts["major"] + gpu.facts["minor"]
        if content["capabilities"] and here not in content["capabilities"]:
            self._logger.log(1, f"Error Code 9: no code for sm_{here}")  # noqa: G004 the library's logger, not Python's
            return None
        return self._module.__dict__["ICudaEngine"]()._filled(content, self._logger)


class _Engine:
    _module: ModuleType
    device_memory_size_v2 = 0

    def _filled(self, content: Any, logger: Any) -> Any:
        self._content, self._logger = content, logger
        self._session = session(content["onnx"])
        self._inputs = {t.name: t for t in self._session.get_inputs()}
        self._tensors = self._inputs | {t.name: t for t in self._session.get_outputs()}
        self._held: set[int] = set()
        return self

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return max(1, len(self._content["profiles"]))

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._module.__dict__["TensorIOMode"]
        return modes.INPUT if name in self._inputs else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self._module.__dict__["DataType"], TYPES[self._tensors[name].type])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._tensors[name].shape)

    def get_tensor_location(self, name: str) -> Any:
        locations = self._module.__dict__["TensorLocation"]
        return locations.HOST if name == self._content.get("on_host") else locations.DEVICE

    def is_shape_inference_io(self, name: str) -> bool:
        return bool(name == self._content.get("for_shapes"))

    def get_aliased_input_tensor(self, name: str) -> str | None:
        in_place = self._content.get("in_place") and name.startswith("present.")
        return name.replace("present.", "past_key_values.") if in_place else None

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return int(self._content["activation"][index])

    def create_runtime_config(self) -> Any:
        return self._module.__dict__["IRuntimeConfig"]()

    def create_execution_context(self, how: Any) -> Any:
        strategies, configs = self._module.__dict__["ExecutionContextAllocationStrategy"], self._module.__dict__.get("IRuntimeConfig", ())
        strategy = how._strategy if isinstance(how, configs) else how
        assert strategy == strategies.USER_MANAGED, "it would allocate activation memory of its own"
        if self._content.get("no_context"):
            self._logger.log(1, "Error Code 2: OutOfMemory (Requested size was 9 bytes.)")
            return None
        return self._module.__dict__["IExecutionContext"]()._filled(self, how)


class _Config:
    _module: ModuleType
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self) -> None:
        self._strategy: Any = None
        self._cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> Any:
        return self._module.__dict__["IRuntimeCache"]()

    def set_runtime_cache(self, cache: Any) -> bool:
        self._cache = cache
        return True


class _Cache:
    _module: ModuleType

    def __init__(self) -> None:
        self._kernels: set[str] = set()

    def serialize(self) -> Any:
        return self._module.__dict__["IHostMemory"](KERNELS + json.dumps(sorted(self._kernels)).encode())

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(KERNELS):
            return False
        self._kernels = set(json.loads(blob[len(KERNELS) :]))
        return True


class _Context:
    _module: ModuleType

    def _filled(self, engine: Any, how: Any) -> Any:
        self._engine, self._how = engine, how
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self._ready: set[tuple[Any, ...]] = set()
        self._calls = 0
        return self

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self._memory = (address, nbytes)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if index in self._engine._held:
            return self._refuse(f"profile {index} is held by another context")
        self._engine._held.add(index)
        self._profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._calls += 1
        fixed = self._engine.get_tensor_shape(name)
        profiles = self._engine._content["profiles"]
        low, high = profiles[self._profile].get(name, (fixed, fixed)) if profiles else (fixed, fixed)
        if len(shape) != len(fixed) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self._refuse(f"set_input_shape: {name} {shape} is not between {low} and {high}")
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] if name in self._engine._inputs else self._output_shapes()[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._calls += 1
        self._addresses[name] = address
        return address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        gpu: FakeGpu = self._module.__dict__["_gpu"]
        assert gpu.current, "no context is current"
        if set(self._addresses) != set(self._engine._tensors) or set(self._shapes) != set(self._engine._inputs):
            return self._refuse("an address or a shape is missing")
        if self._profile is None or self._memory[1] < self._engine.get_device_memory_size_for_profile_v2(self._profile):
            return self._refuse("there is too little activation memory")
        if self._engine._content.get("refuses_runs"):
            return self._refuse("Error Code 1: Cuda Runtime (an illegal memory access was encountered)")
        shapes = tuple(sorted(self._shapes.items()))
        if gpu.capturing is not None and shapes not in self._ready:
            return self._refuse("Error Code 1: Cuda Runtime (operation not permitted when stream is capturing)")
        self._ready = {shapes}
        self._compile()
        gpu.enqueue(self._run(dict(self._shapes), dict(self._addresses)))
        return True

    def _compile(self) -> None:
        kernel = f"{Path(self._engine._content['onnx']).name}/{self._profile}"
        cache = getattr(self._how, "_cache", None)
        if cache is not None and kernel not in cache._kernels:
            cache._kernels.add(kernel)
            self._module.__dict__["_compiled"].append(kernel)

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> Callable[[], object]:
        gpu: FakeGpu = self._module.__dict__["_gpu"]
        shapes = shapes | self._output_shapes()
        engine, memory, size = self._engine, *self._memory

        def value(name: str) -> Any:
            dtype = np.dtype(NUMPY[TYPES[engine._tensors[name].type]])
            raw = gpu.view(addresses[name], int(np.prod(shapes[name])) * dtype.itemsize)
            return ort.OrtValue.ortvalue_from_numpy(np.frombuffer(raw, dtype).reshape(shapes[name]))

        def run() -> None:
            ctypes.memset(gpu.view(memory, size), 0x5A, size)
            binding = engine._session.io_binding()
            for name in engine._tensors:
                (binding.bind_ortvalue_input if name in engine._inputs else binding.bind_ortvalue_output)(name, value(name))
            engine._session.run_with_iobinding(binding)

        return run

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        return _shapes_of(self._engine._content["onnx"], tuple(sorted(self._shapes.items())))

    def _refuse(self, message: str) -> bool:
        self._engine._logger.log(1, message)
        return False


@functools.cache
def _shapes_of(onnx: str, inputs: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, tuple[int, ...]]:
    """The outputs' shapes, found by running the graph on zeros."""
    graph, shapes = session(onnx), dict(inputs)
    feeds = {t.name: np.zeros(shapes[t.name], NUMPY[TYPES[t.type]]) for t in graph.get_inputs()}
    return {t.name: found.shape for t, found in zip(graph.get_outputs(), graph.run(None, feeds), strict=True)}


_BEHAVIOUR: dict[str, type] = {
    "ICudaEngine": _Engine, "IExecutionContext": _Context, "IRuntimeCache": _Cache, "IRuntimeConfig": _Config, "Runtime": _Runtime,
}  # fmt: skip
