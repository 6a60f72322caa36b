"""Whether this machine can run a bundle with each engine library, in a line each. Loads no library and makes no context on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from runtime.device.cuda_api import Gpu, load_driver
from runtime.engines.tensorrt_library import INSTALL
from runtime.errors import EngineError
from runtime.machine import installed
from runtime.manifest import Manifest
from runtime.units import format_bytes

DISTRIBUTIONS: Final = MappingProxyType({
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
})  # fmt: skip

UNKNOWN: Final = "a version that its package does not tell"


@dataclass(frozen=True, slots=True)
class Readiness:
    """One library: whether it can run the bundle here, and what there is or what is missing, with what to do about it."""

    library: str
    ready: bool
    words: str


def readiness(manifest: Manifest, find_gpu: Callable[[], tuple[Gpu, str]] | None = None) -> tuple[Readiness, ...]:
    """Each engine library that can run compiled engines.

    Args:
        find_gpu: the first GPU and the CUDA version of its driver; raises EngineError where there is none. Default: asks the driver.
    """
    try:
        gpu, cuda = (find_gpu or _first_gpu)()
    except EngineError as error:
        return tuple(_judge(manifest, library, None, str(error)) for library in DISTRIBUTIONS)
    shared = ", shared with the host" if gpu.integrated else ""
    here = f"{gpu.name} (SM{gpu.capability}, {format_bytes(gpu.total_bytes)}{shared}), driver of CUDA {cuda}"
    return tuple(_judge(manifest, library, gpu, here) for library in DISTRIBUTIONS)


def _judge(manifest: Manifest, library: str, gpu: Gpu | None, here: str) -> Readiness:
    engines = [engine for engine in manifest.engines if engine.library == library]
    version = _version(library)
    compile_it = f"python -m runtime.compile BUNDLE --library {library}"
    if version is None:
        return Readiness(library, False, f"not installed: {INSTALL[library]}")
    if gpu is None:
        return Readiness(library, False, f"{version} is installed, and cannot run engines here: {here}")
    if not engines:
        return Readiness(library, False, f"{version} on {here}; the bundle holds no engines for it: {compile_it}")
    built = {engine.library_version for engine in engines}
    if version != UNKNOWN and built != {version}:
        return Readiness(library, False, f"{version} on {here}; the engines were built by {', '.join(sorted(built))}: {compile_it}")
    capabilities = sorted({chip for engine in engines for chip in engine.capabilities})
    if capabilities and gpu.capability not in capabilities:
        chips = ", ".join(f"SM{chip}" for chip in capabilities)
        return Readiness(library, False, f"{version} on {here}; the engines were built for {chips}: {compile_it}")
    return Readiness(library, True, f"{version} on {here}")


def _version(library: str) -> str | None:
    """The installed version, `UNKNOWN` where its package does not say, None where it is not installed."""
    if importlib.util.find_spec(library) is None:
        return None
    return next((version for version in map(installed, DISTRIBUTIONS[library]) if version), UNKNOWN)


def _first_gpu() -> tuple[Gpu, str]:
    driver = load_driver()
    return driver.gpu(0), driver.version()
