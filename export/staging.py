"""Atomic output directories: a bundle is written beside its place and moved there whole, or not at all.

One build per output directory at a time (an operating-system lock, released when the process dies); what an earlier, killed
build left behind is cleared by the next one. Knows nothing about what is written.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from runtime.errors import BundleExistsError, StorageError
from runtime.names import MANIFEST_FILE


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Gives an empty directory; when the block ends well it becomes `output`, replacing an earlier bundle there.

    Raises:
        BundleExistsError: `output` holds something that is not a bundle, or another build is writing it.
        StorageError: the file system refuses (no space, no permission); `output` is as it was.
    """
    output = output.absolute()
    check_destination(output)
    partial, previous, lock_file = (output.with_name(f".{output.name}.{end}") for end in ("partial", "previous", "lock"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_file)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise BundleExistsError(f"another build is writing {output}: wait for it, or choose another --output") from error
    except OSError as error:
        raise storage_error(error, output) from error
    try:
        _recover(output, previous)
        _remove(partial)
        partial.mkdir()
        yield partial
        _publish(partial, output, previous)
    except OSError as error:
        if isinstance(error, (StorageError, BundleExistsError)):
            raise
        raise storage_error(error, output) from error
    finally:
        _remove(partial)
        lock.release()
        lock_file.unlink(missing_ok=True)


def check_destination(output: Path) -> None:
    """Raises BundleExistsError unless `output` is free, empty, or a bundle that may be replaced."""
    if output.is_dir() and (not any(output.iterdir()) or (output / MANIFEST_FILE).is_file()):
        return
    if output.exists() or output.is_symlink():
        raise BundleExistsError(f"{output} exists and is not a bundle; it is left alone: choose another --output")


def storage_error(error: OSError, output: Path) -> StorageError:
    """A StorageError that says what to do about an operating-system error while writing `output`."""
    advice = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some of your quota", errno.EACCES: "choose a writable --output"}
    hint = advice.get(error.errno or 0, "check the disk")
    return StorageError(f"cannot write {output}: {error.strerror or error}; {hint} and build again (nothing was changed)")


def _publish(partial: Path, output: Path, previous: Path) -> None:
    if output.exists():
        os.replace(output, previous)
    try:
        os.replace(partial, output)
    except BaseException:
        if previous.exists():
            os.replace(previous, output)
        raise
    _remove(previous)


def _recover(output: Path, previous: Path) -> None:
    """Puts an earlier bundle back that a build, killed between its two renames, had set aside."""
    if previous.exists():
        if output.exists():
            _remove(previous)
        else:
            os.replace(previous, output)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
