"""ONNX Runtime with its CUDA provider: graphs run as they are, on addresses and on the device's own stream.

The library has CUDA graphs of its own, which are left off: they want every node on the GPU, and the graphs' shapes are computed on the CPU.
Nor does it run within a capture that others began (the process ends, as its maintainers say): steps are enqueued anew each time.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import io
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from runtime import names
from runtime.device.base import Device, DeviceArray, DeviceEngine
from runtime.engines.onnxruntime import check_session, first_line, session_options
from runtime.engines.telemetry import without_telemetry
from runtime.errors import EngineError
from runtime.manifest import GraphInfo, Manifest

with without_telemetry():
    import onnxruntime as ort

CUDA_PROVIDER: Final = "CUDAExecutionProvider"
ELEMENT_TYPES: Final = MappingProxyType({"float32": 1, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16})  # of TensorProto
CPU, CUDA = "cpu", "cuda"
GPU_PACKAGE, CPU_PACKAGE = "onnxruntime-gpu", "onnxruntime"


class OnnxRuntimeDeviceEngine(DeviceEngine):
    """See `runtime.device.base.DeviceEngine`: a session, and one binding that is told only what changed.

    Args:
        path: the graph's file.
        device: whose stream runs it.
        device_type: "cuda"; "cpu" runs on the CPU's provider, for a device whose memory is the host's.
        device_index: which GPU.
    """

    capacity: int | None = None
    max_rows: int | None = None
    uncapturable: str | None = "ONNX Runtime cannot run within a capture"

    def __init__(
        self, name: str, path: Path, graph: GraphInfo, device: Device, *, device_type: str = CUDA, device_index: int = 0,
        threads: int | None = None,
    ) -> None:  # fmt: skip
        self.name, self._device_type, self._device_index = name, device_type, device_index
        provider: Any = "CPUExecutionProvider"
        if device_type == CUDA:
            provider = (CUDA_PROVIDER, provider_options(name, device.stream, device_index))
        try:
            self._session = ort.InferenceSession(str(path), session_options(threads), providers=[provider], enable_fallback=0)
        except Exception as error:  # the library's exceptions share no base class of their own
            raise EngineError(f"ONNX Runtime {ort.__version__} cannot load {path.name}: {_explained(error)}") from error
        if device_type == CUDA and CUDA_PROVIDER not in self._session.get_providers():
            raise EngineError(f"ONNX Runtime {ort.__version__} left the GPU for the CPU when it loaded {path.name}; {_what_it_needs()}")
        check_session(self._session, name, graph)
        self._inputs = frozenset(tensor.name for tensor in graph.inputs)
        self._binding, self._bound = self._session.io_binding(), dict[str, DeviceArray]()
        self._options = ort.RunOptions()
        if device_type == CUDA:  # the chain waits, and only where it must
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def enqueue(self, arrays: Mapping[str, DeviceArray]) -> None:
        for name, array in arrays.items():
            known = self._bound.get(name)
            if known is not array and known != array:
                self._bind(name, array)
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # as above
            self._bound.clear()
            raise EngineError(f"ONNX Runtime could not run {self.name}: {_explained(error)}") from error

    def _bind(self, name: str, array: DeviceArray) -> None:
        bind = self._binding.bind_input if name in self._inputs else self._binding.bind_output
        try:
            bind(name, self._device_type, self._device_index, ELEMENT_TYPES[array.dtype], array.shape, array.address)
        except Exception as error:  # as above; a TypeError where the library knows no such number
            self._bound.pop(name, None)
            raise EngineError(
                f"ONNX Runtime {ort.__version__} takes no {array.dtype} for {name} of {self.name}: {first_line(error)}; "
                f"upgrade {GPU_PACKAGE}, or export with --precision fp16"
            ) from error
        self._bound[name] = array


def load_engines(
    bundle: Path, manifest: Manifest, device: Device, device_index: int = 0, threads: int | None = None
) -> dict[str, DeviceEngine]:
    """An engine of every graph on a GPU.

    Raises:
        EngineError: the installed library cannot use the GPU, or refuses a graph.
    """
    check_cuda_provider()
    return {
        name: OnnxRuntimeDeviceEngine(name, bundle / graph.file, graph, device, device_index=device_index, threads=threads)
        for name, graph in manifest.graphs.items()
    }


def provider_options(graph: str, stream: int, device_index: int) -> dict[str, str]:
    """What a graph's session asks of the CUDA provider; the score is float32 throughout, TF32 would move the kept set."""
    return {
        "device_id": str(device_index),
        "user_compute_stream": str(stream),
        "do_copy_in_default_stream": "1",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0" if graph.startswith(names.SCORE) else "1",
    }


def check_cuda_provider() -> None:
    """Whether the installed library can use a GPU, before it logs that it cannot and runs on the CPU instead.

    Raises:
        EngineError: it is the package for CPUs, both packages lie over each other, or a library that it needs is missing.
    """
    if CUDA_PROVIDER not in ort.get_available_providers():
        if _installed(GPU_PACKAGE):
            raise EngineError(
                f"the packages {CPU_PACKAGE} and {GPU_PACKAGE} lie over each other, and the one for CPUs is uppermost: "
                f"pip uninstall {CPU_PACKAGE} {GPU_PACKAGE}, then pip install {GPU_PACKAGE}"
            )
        raise EngineError(
            f"ONNX Runtime {ort.__version__} is the package for CPUs: pip uninstall {CPU_PACKAGE}, then pip install {GPU_PACKAGE}"
        )
    if hasattr(ort, "preload_dlls"):  # finds CUDA's libraries where pip puts them; it prints what it does not find
        with redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    missing = missing_library(Path(ort.__file__).parent / "capi")
    if missing is not None:
        raise EngineError(f"ONNX Runtime {ort.__version__} cannot use the GPU: {missing} is not found; {_what_it_needs(missing)}")


def missing_library(folder: Path) -> str | None:
    """The first shared library that the CUDA provider in `folder` needs and the system does not find; None where that is not known."""
    provider = folder / "libonnxruntime_providers_cuda.so"
    if sys.platform != "linux" or not provider.is_file():
        return None
    try:
        ctypes.CDLL(str(provider))
    except OSError as error:
        found = re.match(r"(lib[\w.+-]+): cannot open shared object file", str(error))
        return found[1] if found and found[1] != provider.name else None
    return None


def _what_it_needs(missing: str = "") -> str:
    """What to do about a provider that does not load."""
    if missing.startswith("libcuda."):
        return "it comes with NVIDIA's driver: install the driver"
    cuda = str(getattr(ort, "cuda_version", "") or "")
    release = f"CUDA {cuda.partition('.')[0]}" if cuda else "CUDA"
    return f"this build needs {release} and cuDNN 9: pip install '{GPU_PACKAGE}[cuda,cudnn]', or put their libraries on the loader's path"


def _explained(error: Exception) -> str:
    """A library's message, with what to do about it."""
    line = first_line(error)
    if re.search("cudnn|cublas", line, re.IGNORECASE):
        return f"{line}; {_what_it_needs()}"
    if re.search("out of memory|failed to allocate", line, re.IGNORECASE):
        return f"{line}; the GPU's memory is full: close other programs, or export with a smaller --max-context or --precision"
    if "NOT_IMPLEMENTED" in line:
        return f"{line}; it has no such operator for this precision: export with another --precision"
    return f"{line}; export the bundle again"


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
