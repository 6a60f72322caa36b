"""Weight files of a bundle: tensors appended one by one, 64-byte aligned, shared by all graphs.

Nothing is kept in memory: a tensor is written as it comes and remembered only as a slice of its file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from runtime.errors import StorageError
from runtime.manifest import FileInfo

ALIGNMENT = 64  # ONNX Runtime maps external data page by page; tensors need the alignment of a vector register


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a slice of a weight file: `bytes` bytes from `offset`, row-major, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    bytes: int
    directory: Path


class WeightFile:
    """Appends tensors to one file and hashes it while writing. Use as a context manager.

    Args:
        path: the file, which must not exist yet.
        progress: called with the number of bytes after each tensor.
    """

    def __init__(self, path: Path, progress: Callable[[int], None] | None = None) -> None:
        self.path = path
        self._progress = progress or (lambda _: None)
        self._stored: dict[str, StoredTensor] = {}
        self._hash = hashlib.sha256()
        self._offset = 0

    def __enter__(self) -> WeightFile:
        try:
            self._file = self.path.open("xb")
        except OSError as error:
            raise StorageError(f"cannot create {self.path}: {error.strerror}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError as failure:
            raise StorageError(f"cannot write {self.path}: {failure.strerror}") from failure

    def add(self, name: str, array: np.ndarray) -> StoredTensor:
        """Appends a tensor; a name that is already there returns the stored one (and `array` is ignored)."""
        if name in self._stored:
            return self._stored[name]
        self._write(b"\0" * (-self._offset % ALIGNMENT))
        array = np.ascontiguousarray(array)
        stored = StoredTensor(name, array.dtype.name, array.shape, self.path.name, self._offset, array.nbytes, self.path.parent)
        self._write(array.reshape(-1).view(np.uint8).data)
        self._stored[name] = stored
        self._progress(array.nbytes)
        return stored

    def info(self) -> FileInfo:
        """Size and hash of what was written so far."""
        return FileInfo(self._offset, self._hash.hexdigest())

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}; free some space and build again") from error
        self._hash.update(data)
        self._offset += len(data)
