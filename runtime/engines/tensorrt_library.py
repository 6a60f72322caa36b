"""The two libraries that compile engines: `tensorrt` (a JetPack's, a data centre's) and `tensorrt_rtx` (RTX cards), one API between them.

What a library has is found out by looking (`hasattr`), never from its version. Imported when it is asked for, not with this module.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, Final

from runtime.engines.tensorrt_log import BuildLog
from runtime.errors import EngineError, UsageError

INSTALL: Final = MappingProxyType({
    "tensorrt": "comes with a Jetson's JetPack (apt-get install python3-libnvinfer); elsewhere: pip install tensorrt",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13",
})  # fmt: skip


def installed_library() -> str:
    """The library to use where none is named: the device's own TensorRT before TensorRT for RTX.

    Raises:
        EngineError: there is none; the message says what to install.
    """
    for name in INSTALL:
        if importlib.util.find_spec(name) is not None:
            return name
    raise EngineError(
        "no engine library is installed: for RTX cards, pip install tensorrt-rtx-cu13 (it needs no GPU to build); "
        "on a Jetson, TensorRT comes with the JetPack (apt-get install python3-libnvinfer)"
    )


def load_library(name: str) -> Any:
    """Imports an engine library.

    Raises:
        UsageError: it is none of those known.
        EngineError: it is not installed, or cannot be loaded.
    """
    if name not in INSTALL:
        raise UsageError(f"unknown engine library {name!r}; expected {' or '.join(INSTALL)}")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise EngineError(f"the engine library {name} lacks {error.name}: install it again ({INSTALL[name]})") from error
        raise EngineError(f"the engine library {name} is not installed: {INSTALL[name]}") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(f"the engine library {name} cannot be loaded ({error}): install it again ({INSTALL[name]})") from error


def make_logger(library: Any, log: BuildLog) -> Any:
    """The library's logger; everything in it goes to `log`."""

    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.read(int(severity), message)

    return Logger()


@functools.cache
def running_logger(library: Any) -> tuple[Any, BuildLog]:
    """The logger for running engines, and what it collects: one in a process, since a library keeps the first that it is given."""
    log = BuildLog()
    return make_logger(library, log), log


def set_capabilities(library: Any, config: Any, capabilities: Sequence[int]) -> None:
    """Asks for an engine that runs on each of these compute capabilities (86 is 8.6).

    Raises:
        UsageError: the library builds for the device it runs on alone, or knows no such capability.
    """
    if not hasattr(config, "num_compute_capabilities"):
        if capabilities:
            raise UsageError(f"{library.__name__} builds engines for the device it runs on: leave the compute capability out")
        return
    known = library.ComputeCapability
    if not capabilities:
        raise UsageError(f"{library.__name__} builds for named compute capabilities ({_known(known)}): give one or more")
    missing = [c for c in capabilities if not hasattr(known, f"SM{c}")]
    if missing:
        raise UsageError(f"{library.__name__} {library.__version__} builds no engine for SM{missing[0]}: it knows {_known(known)}")
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        config.set_compute_capability(getattr(known, f"SM{capability}"), index)


def _known(capabilities: Any) -> str:
    numbers = sorted(int(name[2:]) for name in dir(capabilities) if name.startswith("SM") and name[2:].isdigit())
    return ", ".join(f"SM{number}" for number in numbers)
