"""Kernels that TensorRT for RTX compiled on this machine, kept between processes, so that only the first start compiles them.

One file for each set of engines, library version, compute capability and CUDA version, below `entropy-prune` in the user's cache directory
(`XDG_CACHE_HOME`, by default ~/.cache; on Windows LOCALAPPDATA). Not in the bundle: that may be read-only, and a rebuild refuses to replace
one with files that are not its own. The files may be deleted at any time. The library checks a cache against the device and its own
version; one that it refuses is written anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from runtime.errors import StorageError
from runtime.files import write_file

FOLDER: Final = "entropy-prune"
_log = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """Where such files lie; None where the user has no home."""
    named = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    if named and Path(named).is_absolute():
        return Path(named) / FOLDER
    try:
        return Path.home() / ".cache" / FOLDER
    except RuntimeError:
        return None


def cache_file(version: str, capability: int, cuda: str, engine_hashes: Iterable[str]) -> Path | None:
    """The file for these engines (by their SHA-256) with this library on this device and driver; None where there is no place for one."""
    folder = cache_folder()
    engines = hashlib.sha256("".join(engine_hashes).encode()).hexdigest()[:16]
    return None if folder is None else folder / f"{engines}.tensorrt_rtx-{version}.sm{capability}.cuda{cuda}.kernels"


class RuntimeCache:
    """The library's cache, shared by all contexts of a bundle's engines, and its file (None: kept in memory alone)."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._cache: Any = None
        self._stored = b""

    def attach(self, config: Any) -> None:
        """Has the contexts made with `config` use the cache; the first call reads the file. A CUDA context is current."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._read()
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Writes the file where the library has compiled since; what fails is logged. A CUDA context is current."""
        if self._cache is None or self._path is None:
            return
        blob = self._cache.serialize()
        data = b"" if blob is None else bytes(blob)
        if not data or data == self._stored:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._path, data)
        except (StorageError, OSError) as error:
            _log.warning("compiled kernels are not kept for the next start: %s", error)
            self._path = None
            return
        self._stored = data

    def _read(self) -> None:
        if self._path is None:
            _log.warning("compiled kernels are not kept for the next start: there is no cache directory; set XDG_CACHE_HOME to one")
            return
        try:
            data = self._path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            _log.warning("cannot read %s (%s): kernels are compiled anew", self._path, error.strerror)
            return
        if data and self._cache.deserialize(data):
            self._stored = data
        else:
            _log.warning("%s is damaged or of another driver: kernels are compiled anew", self._path)

    def close(self) -> None:
        """Saves, and lets go of the library's cache."""
        self.save()
        self._cache = None
