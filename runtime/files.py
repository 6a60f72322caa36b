"""Writing files whole or not at all."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from runtime.errors import StorageError


def check_writable(path: str | os.PathLike[str]) -> None:
    """Says early that a file cannot be written, before work is done for it.

    Raises:
        StorageError: `path` names something that is not a file, or its directory does not exist or cannot be written.
    """
    target = Path(path)
    if "\0" in str(target):
        raise StorageError(f"cannot write {str(target)!r}: its name holds a null character; give another name")
    try:
        if target.is_dir() or (target.exists() and not target.is_file()):
            raise StorageError(f"cannot write {target}: it is a directory or a device, give the name of a file")
        if not target.parent.is_dir():
            raise StorageError(f"cannot write {target}: there is no directory {target.parent}, make it first")
        if not os.access(target.parent, os.W_OK):
            raise StorageError(f"cannot write {target}: no permission in {target.parent}, give another directory")
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise _failed(target, error) from error


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file under a temporary name beside `path` and moves it into place; what was there before stays until then.

    Raises:
        StorageError: it cannot be written.
    """
    check_writable(path)
    target = Path(path)
    partial = target.parent / f".{secrets.token_hex(8)}.part"
    try:
        with partial.open("xb") as file:
            file.write(data)
        os.replace(partial, target)
    except OSError as error:
        raise _failed(target, error) from error
    finally:
        with suppress(OSError):  # gone where it was moved
            partial.unlink()


def _failed(target: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {target}: {error.strerror}; give a file in a directory that exists and has room")
