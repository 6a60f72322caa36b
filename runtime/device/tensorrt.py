"""Loads a bundle's compiled engines onto a CUDA device, with `tensorrt` (10.3, 10.16, 11) or `tensorrt_rtx`.

Engines run one after the other on the device's stream, so all execution contexts share one buffer for activations, as large as the
neediest one's. Loading runs every profile once with its smallest shapes: a context initialises in its first run, which a recording could
not hold (and TensorRT for RTX compiles its kernels there, which a file keeps: `runtime_cache`). Before recording a run of other shapes, run
them once: the library sets up for new shapes in the first run that has them. What differs between the libraries is probed with `hasattr`.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from runtime.device.base import DeviceEngine
from runtime.device.cuda import CudaDevice
from runtime.device.runtime_cache import RuntimeCache, cache_file
from runtime.device.tensorrt_engine import TensorRTEngine
from runtime.engine_info import EngineInfo
from runtime.engines.tensorrt_library import load_library, running_logger
from runtime.errors import EngineError, StorageError
from runtime.manifest import Manifest
from runtime.units import format_bytes

__all__ = ["TensorRTEngine", "load_engines"]
COMPILE: Final = "python -m runtime.compile"
RECORDED_PROFILE: Final = "decode"
_log = logging.getLogger(__name__)


def load_engines(bundle: Path, manifest: Manifest, library: str, device: CudaDevice) -> dict[str, DeviceEngine]:
    """Loads the engines of every graph of a bundle, gives them memory and runs each profile once.

    They live until the device is closed.

    Args:
        manifest: the bundle's, its files checked.
        library: "tensorrt" or "tensorrt_rtx".

    Returns:
        The engines by graph.

    Raises:
        UsageError: there is no such library.
        EngineError: it is not installed, or an engine cannot run here; the message says why, and what to build.
        StorageError: an engine's file cannot be read.
    """
    module = load_library(library)
    infos = _listed(manifest, library, module.__version__, bundle)
    loader = _Loader(module, device)
    device.before_close(loader.close)
    hashes = (manifest.files[info.file].sha256 for info in infos)
    try:
        with device.current():
            for info in infos:
                loader.add(bundle, manifest, info)
            loader.make_contexts(RuntimeCache(cache_file(module.__version__, device.capability, device.driver_version, hashes)))
    except BaseException:
        loader.close()
        raise
    return {engine.name: engine for engine in loader.engines}


def _listed(manifest: Manifest, library: str, version: str, bundle: Path) -> list[EngineInfo]:
    """The manifest's engines of a library, which is installed in `version`: one of every graph.

    Raises:
        EngineError: some are missing, or another version built them.
    """
    infos = [info for info in manifest.engines if info.library == library]
    missing = sorted(manifest.graphs.keys() - {info.graph for info in infos})
    if missing:
        what = f"no engine of {missing[0]}" if infos else "no engines"
        raise EngineError(f"the bundle holds {what} for {library}: build them, {COMPILE} {bundle} --library {library}")
    for info in infos:
        if info.library_version != version:
            raise EngineError(
                f"the engine of {info.graph} was built by {library} {info.library_version}, here is {version}, and engines run with the "
                f"version that built them: build them here, {COMPILE} {bundle} --library {library}, or install "
                f"{library} {info.library_version}"
            )
    return infos


class _Loader:
    """The engines of one bundle while they are loaded, and what they share afterwards."""

    def __init__(self, module: Any, device: CudaDevice) -> None:
        self.engines: list[TensorRTEngine] = []
        self._module, self._device = module, device
        self._logger, self._log = running_logger(module)
        self._log.forget_errors()
        self._runtime: Any = None
        self._cache: RuntimeCache | None = None
        self._memory: int | None = None
        self._loaded: list[tuple[TensorRTEngine, Any, EngineInfo]] = []

    def add(self, bundle: Path, manifest: Manifest, info: EngineInfo) -> None:
        """Deserialises one engine and compares it with the manifest."""
        if self._runtime is None:
            self._runtime = self._start()
        engine = self._deserialize(bundle / info.file)
        if engine is None:
            raise EngineError(self._refusal(info, bundle))
        if info.capabilities and self._device.capability not in info.capabilities:
            _log.warning("%s was built for %s and was accepted by this GPU, SM%d", info.file, _chips(info), self._device.capability)
        made = TensorRTEngine(info, manifest.graphs[info.graph], self._module, engine, self._device, self._log)
        self._loaded.append((made, engine, info))
        self.engines.append(made)

    def make_contexts(self, cache: RuntimeCache) -> None:
        """Makes the contexts on one buffer of activation memory, runs each once, and keeps what the library compiled for that."""
        self._cache = cache
        nbytes = max(made.needed_bytes for made in self.engines)
        self._memory = self._device.allocate(nbytes)
        for made, engine, info in self._loaded:
            profiles = [profile.name for profile in info.profiles] or [""]
            made.make_contexts([self._context(engine, info.graph, profile) for profile in profiles], self._memory, nbytes)
        self._loaded.clear()
        self._device.synchronize()
        for made in self.engines:
            made.warm_up()
        cache.save()

    def close(self) -> None:
        """Destroys contexts before engines before the runtime, and gives the memory back; keeps compiled kernels."""
        with self._device.current():
            if self._cache is not None:
                self._cache.close()
            with contextlib.suppress(EngineError):  # a lost device
                self._device.synchronize()
            for made in self.engines:
                made.close()
            self._loaded.clear()
            self._runtime = self._cache = None
            if self._memory is not None:
                with contextlib.suppress(EngineError):
                    self._device.free(self._memory)
                self._memory = None

    def _start(self) -> Any:
        try:
            return self._module.Runtime(self._logger)
        except TypeError as error:  # what the bindings make of a null pointer
            raise EngineError(
                f"{self._module.__name__} {self._module.__version__} cannot start on this machine: {self._log.failure}; it needs a GPU and "
                "a driver of its CUDA version"
            ) from error

    def _deserialize(self, path: Path) -> Any:
        """The engine in a file, or None. The file is mapped, not read: its pages need no memory of their own, with any of the libraries.

        (A stream reader would read into memory piece by piece; the library's documentation promises no gain from one in Python.)
        """
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return self._runtime.deserialize_cuda_engine(data)
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise EngineError(f"{path.name} is empty: compile the bundle again, {COMPILE} {path.parent}") from error

    def _refusal(self, info: EngineInfo, bundle: Path) -> str:
        name, version, here = self._module.__name__, self._module.__version__, self._device.capability
        if info.capabilities and here not in info.capabilities:
            why = f"it was built for {_chips(info)}, this GPU is SM{here} ({self._device.name})"
            again = f"build for it, {COMPILE} {bundle} --library {name}" + ("" if name == "tensorrt" else f" --capability {here}")
        else:
            built = "" if info.capabilities else f"; it was built on the device it was meant for, here is SM{here} ({self._device.name})"
            why = f"{self._log.failure}{built}"
            again = f"build it on this machine, {COMPILE} {bundle} --library {name}"
        return f"{name} {version} cannot load the engine of {info.graph}: {why}; {again}"

    def _context(self, engine: Any, graph: str, profile: str) -> Any:
        """An execution context whose activation memory is given by the caller."""
        user_managed = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(engine, "create_runtime_config") and hasattr(config := engine.create_runtime_config(), "set_runtime_cache"):
            config.set_execution_context_allocation_strategy(user_managed)
            if profile == RECORDED_PROFILE and hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
                # otherwise its kernels are made in the background, after a recording has taken the preliminary ones
                config.dynamic_shapes_kernel_specialization_strategy = self._module.DynamicShapesKernelSpecializationStrategy.EAGER
            if self._cache is not None:
                self._cache.attach(config)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(user_managed)
        if context is None:
            free, total = self._device.memory()
            raise EngineError(
                f"{self._module.__name__} cannot make an execution context of {graph} ({self._log.failure}): {format_bytes(free)} of "
                f"{format_bytes(total)} of GPU memory are free; close other programs that use it, or compile with a smaller --capacity, "
                "--text-tokens or --images"
            )
        return context


def _chips(info: EngineInfo) -> str:
    chips: Sequence[str] = [f"SM{capability}" for capability in info.capabilities]
    return ", ".join(chips)
