"""Atomic output directories: a bundle is written beside its place and moved there whole, or not at all.

One build per output directory at a time (an operating-system lock, released when the process dies); what an earlier, killed
build left behind is cleared by the next one. Knows nothing about what is written.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from runtime.errors import BundleExistsError, StorageError
from runtime.names import MANIFEST_FILE, REPORT_FILE, VERIFY_FILE


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Gives an empty directory; when the block ends well it becomes `output`, replacing an earlier bundle there.

    Raises:
        BundleExistsError: `output` holds something that is not a bundle, or another build is writing it.
        StorageError: the file system refuses (no space, no permission); `output` is as it was.
    """
    check_destination(output)
    output = output.resolve()
    partial, previous, lock_file = (output.with_name(f".{output.name}.{end}") for end in ("partial", "previous", "lock"))
    made = [path for path in output.parents if not path.exists()]
    lock = FileLock(lock_file, is_singleton=False)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
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
        check_destination(output)  # it may have changed meanwhile
        _publish(partial, output, previous)
    except OSError as error:
        if isinstance(error, (StorageError, BundleExistsError)):
            raise
        raise storage_error(error, output) from error
    finally:
        _remove(partial)
        with suppress(OSError):  # while it is locked: later it could be the next build's
            lock_file.unlink()
        lock.release()
        with suppress(OSError):
            for path in made:
                path.rmdir()


def check_destination(output: Path) -> None:
    """Raises BundleExistsError unless `output` is free, empty, or a bundle with nothing else in it, which may be replaced."""
    if not output.exists() and not output.is_symlink():
        return
    try:
        found = {path.name for path in output.iterdir()} if output.is_dir() else None
    except OSError as error:
        raise storage_error(error, output) from error
    if found == set():
        return
    own = _own_files(output / MANIFEST_FILE) if found else None
    if not found or own is None:
        raise BundleExistsError(f"{output} exists and is not a bundle; it is left alone: choose another --output")
    foreign = sorted(found - own)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise BundleExistsError(
            f"{output} holds {foreign[0]}{more}, which is not of the bundle; it is left alone: move it away, or choose another --output"
        )


def storage_error(error: OSError, output: Path) -> StorageError:
    """A StorageError that says what to do about an operating-system error while writing `output`."""
    writable = dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG), "choose a writable --output"
    )
    advice = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some of your quota", **writable}
    hint = advice.get(error.errno or 0, "check the disk")
    return StorageError(f"cannot write {output}: {error.strerror or error}; {hint} and build again (nothing was changed)")


def _own_files(manifest: Path) -> set[str] | None:
    """What a bundle's directory may hold, by its manifest; None where that is none of ours."""
    try:
        raw = json.loads(manifest.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or not isinstance(raw.get("files"), dict) or "schema_version" not in raw:
        return None
    return {MANIFEST_FILE, REPORT_FILE, VERIFY_FILE, *(name.partition("/")[0] for name in raw["files"])}


def _publish(partial: Path, output: Path, previous: Path) -> None:
    try:
        if output.exists():
            os.replace(output, previous)
        os.replace(partial, output)
    except BaseException:
        if previous.exists() and not output.exists():
            os.replace(previous, output)
        raise
    _remove(previous)


def _recover(output: Path, previous: Path) -> None:
    """Puts an earlier bundle back that a build, killed between its two renames, had set aside."""
    if (output / MANIFEST_FILE).exists():
        _remove(previous)
    elif previous.exists():
        if output.exists():
            output.rmdir()  # it is empty
        os.replace(previous, output)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
