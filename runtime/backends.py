"""The table of backends: what a bundle runs on, and which is tried when none is named.

A backend that is named runs or is an error. Where none is named, one that the bundle was made for is tried, and the CPU takes over with one
warning. Libraries are imported when their backend is tried.
"""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from runtime.errors import EngineError, UsageError, shown

if TYPE_CHECKING:
    from runtime.device.base import Device, DeviceEngine
    from runtime.executor import Executor
    from runtime.manifest import Manifest

_log = logging.getLogger(__name__)
AUTO: Final = "auto"
CPU: Final = "cpu"
CUDA: Final = "cuda"
CUDA_TARGET: Final = "cuda"  # of configs/targets: graphs made for ONNX Runtime on a GPU
MAX_DEVICES: Final = 1024

Open = Callable[[Path, "Manifest", int, "int | None"], "Executor"]  # bundle, manifest, device index, threads


def _open_cpu(bundle: Path, manifest: Manifest, device_index: int, threads: int | None) -> Executor:
    from runtime.host_executor import HostExecutor

    return HostExecutor(bundle, manifest, threads)


def _open_cuda(bundle: Path, manifest: Manifest, device_index: int, threads: int | None) -> Executor:
    def load(device: Device) -> dict[str, DeviceEngine]:
        engines: dict[str, DeviceEngine] = _module("onnxruntime").load_engines(bundle, manifest, device, device_index, threads)
        return engines

    from runtime.engines.onnxruntime import version

    return _on_device(bundle, manifest, device_index, load, f"ONNX Runtime {version()} on GPU {device_index}")


def _open_tensorrt(library: str) -> Open:
    def open_library(bundle: Path, manifest: Manifest, device_index: int, threads: int | None) -> Executor:
        listed = [engine.library_version for engine in manifest.engines if engine.library == library]
        if not listed:
            raise EngineError(
                f"the bundle holds no engines of {library}: python -m runtime.compile {bundle} --library {library}, on the device"
            )

        def load(device: Device) -> dict[str, DeviceEngine]:
            engines: dict[str, DeviceEngine] = _module("tensorrt").load_engines(bundle, manifest, library, device)
            return engines

        return _on_device(bundle, manifest, device_index, load, f"{library} {listed[0]} on GPU {device_index}")

    return open_library


BACKENDS: Final = MappingProxyType(
    {CPU: _open_cpu, CUDA: _open_cuda, "tensorrt": _open_tensorrt("tensorrt"), "tensorrt_rtx": _open_tensorrt("tensorrt_rtx")}
)


_ENGINES: Final = MappingProxyType({CPU: "onnxruntime", CUDA: "onnxruntime-cuda", "tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx"})


def open_backend(
    bundle: Path, manifest: Manifest, backend: str | None = None, device_index: int = 0, threads: int | None = None
) -> tuple[str, Executor]:
    """Loads a bundle's engines.

    Args:
        backend: one of `BACKENDS`; "auto" or None: one that the bundle was made for, or the CPU where that cannot run.
        device_index: which GPU.

    Returns:
        The backend's name, and what runs on it.

    Raises:
        UsageError: there is no such backend.
        EngineError: it cannot run here.
        BundleError: the bundle is damaged.
    """
    if backend not in (None, AUTO):
        return backend, _open(bundle, manifest, backend, device_index, threads)
    reasons = []
    for name in made_for(manifest):
        try:
            return name, _open(bundle, manifest, name, device_index, threads)
        except EngineError as error:
            reasons.append(f"{name}: {error}")
    if reasons:
        _log.warning("this bundle runs on the CPU, the backend it was made for cannot be used here (%s)", "; ".join(reasons))
    return CPU, _open(bundle, manifest, CPU, device_index, threads)


def _open(bundle: Path, manifest: Manifest, backend: str, device_index: int, threads: int | None) -> Executor:
    """Opens a backend on those of the bundle's graphs that are for it; where none are, on the first ones, and the engine says why not."""
    return BACKENDS[backend](bundle, manifest.for_engine(_ENGINES[backend]) or manifest, device_index, threads)


def made_for(manifest: Manifest) -> tuple[str, ...]:
    """The backends that a bundle has engines for or was exported for, in the order they are tried; the CPU is not among them."""
    targets = [manifest.variant(target) for target in manifest.targets]
    libraries = dict.fromkeys(engine.library for target in targets for engine in target.engines if engine.library in BACKENDS)
    return (*libraries, *((CUDA,) if CUDA_TARGET in manifest.targets else ()))


def check_backend(backend: Any, device_index: Any) -> None:
    """Raises UsageError unless both can be meant."""
    if backend is not None and backend != AUTO and (not isinstance(backend, str) or backend not in BACKENDS):
        raise UsageError(f"backend is {shown(backend)}; give {AUTO} or one of {', '.join(BACKENDS)}")
    if type(device_index) is not int or not 0 <= device_index < MAX_DEVICES:
        raise UsageError(f"device_index is {shown(device_index)}; give the number of a GPU, 0 for the first")


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """`--backend` and `--device`, for the commands that run a bundle."""
    parser.add_argument(
        "--backend", choices=(AUTO, *BACKENDS), default=AUTO, help="what runs (default: auto, what the bundle was made for, or the CPU)"
    )
    parser.add_argument("--device", type=int, default=0, metavar="N", help="which GPU (default: 0)")


def _on_device(
    bundle: Path, manifest: Manifest, device_index: int, load: Callable[[Device], dict[str, DeviceEngine]], label: str
) -> Executor:
    """A chain's stages in a GPU's memory; what was begun is given back where it cannot be."""
    from runtime.device.executor import DeviceExecutor

    device: Device = _module("cuda").CudaDevice(device_index)
    engines: dict[str, DeviceEngine] = {}
    try:
        engines = load(device)
        return DeviceExecutor(bundle, manifest, device, engines, label)
    except BaseException:
        engines.clear()  # they are the device's
        device.close()
        raise


def _module(name: str) -> Any:
    """A module of `runtime.device`, imported now.

    Raises:
        EngineError: it cannot be: something that it needs is missing or broken.
    """
    try:
        return importlib.import_module(f"runtime.device.{name}")
    except (ImportError, OSError) as error:
        raise EngineError(f"the backend cannot be loaded ({error}): install its packages again, see docs/backends.md") from error
