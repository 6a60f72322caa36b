"""Atomic output directories: a bundle is written beside its place and moved there whole, or not at all.

One build per output directory at a time (an operating-system lock, released when the process dies); what an earlier, killed
build left behind is cleared by the next one. What is written there is known by its `Kind` alone.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from export.publish import publish, recover, remove
from runtime.errors import BundleExistsError, StorageError
from runtime.names import MANIFEST_FILE, REPORT_FILE, VERIFY_FILE


@dataclass(frozen=True, slots=True)
class Kind:
    """What is written: its name in messages, and `own`, which names all that such a directory may hold (None: it is none).

    `option` is the one that names the directory.
    """

    name: str
    own: Callable[[Path], set[str] | None]
    option: str = "--output"


def _bundle_files(directory: Path) -> set[str] | None:
    """What a bundle's directory may hold, by its manifest; None where that is none of ours."""
    try:
        raw = json.loads((directory / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or not isinstance(raw.get("files"), dict) or "schema_version" not in raw:
        return None
    return {MANIFEST_FILE, REPORT_FILE, VERIFY_FILE, *(name.partition("/")[0] for name in raw["files"])}


BUNDLE = Kind("bundle", _bundle_files)


@contextmanager
def staged(output: Path, kind: Kind = BUNDLE) -> Iterator[Path]:
    """Gives an empty directory; when the block ends well it becomes `output`, replacing an earlier one of its kind there.

    Raises:
        BundleExistsError: `output` holds something of another kind, or another build is writing it.
        StorageError: the file system refuses (no space, no permission); `output` is as it was.
    """
    check_destination(output, kind)
    output = output.resolve()
    partial, previous, lock_file = (output.with_name(f".{output.name}.{end}") for end in ("partial", "previous", "lock"))
    made = [path for path in output.parents if not path.exists()]
    lock = FileLock(lock_file, is_singleton=False)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise BundleExistsError(f"another build is writing {output}: wait for it, or choose another {kind.option}") from error
    except OSError as error:
        raise storage_error(error, output, kind.option) from error
    try:
        recover(output, previous)
        remove(partial)
        partial.mkdir()
        yield partial
        check_destination(output, kind)  # it may have changed meanwhile
        publish(partial, output, previous)
    except OSError as error:
        if isinstance(error, (StorageError, BundleExistsError)):
            raise
        raise storage_error(error, output, kind.option) from error
    finally:
        remove(partial)
        with suppress(OSError):  # while it is locked: later it could be the next build's
            lock_file.unlink()
        lock.release()
        with suppress(OSError):
            for path in made:
                path.rmdir()


def check_destination(output: Path, kind: Kind = BUNDLE) -> None:
    """Raises BundleExistsError unless `output` is free, empty, or of its kind with nothing else in it: that may be replaced."""
    if not output.exists() and not output.is_symlink():
        return
    try:
        found = {path.name for path in output.iterdir()} if output.is_dir() else None
    except OSError as error:
        raise storage_error(error, output, kind.option) from error
    if found == set():
        return
    own = kind.own(output) if found else None
    if not found or own is None:
        raise BundleExistsError(f"{output} exists and is not a {kind.name}; it is left alone: choose another {kind.option}")
    foreign = sorted(found - own)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise BundleExistsError(
            f"{output} holds {foreign[0]}{more}, which is not of the {kind.name}; it is left alone: "
            f"move it away, or choose another {kind.option}"
        )


def storage_error(error: OSError, output: Path, option: str = "--output") -> StorageError:
    """A StorageError that says what to do about an operating-system error while writing `output`."""
    writable = dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG), f"choose a writable {option}"
    )
    advice = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some of your quota", **writable}
    hint = advice.get(error.errno or 0, "check the disk")
    return StorageError(f"cannot write {output}: {error.strerror or error}; {hint} and build again (nothing was changed)")
