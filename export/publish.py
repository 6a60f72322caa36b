"""Moving a finished directory into its place: in one step where the system can exchange two directories, in two where it cannot.

Knows nothing about what the directories hold, nor who else writes there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

AT_FDCWD = -100  # <fcntl.h>: paths are taken as they are
RENAME_EXCHANGE = 2  # <linux/fs.h>, for renameat2
RENAME_SWAP = 2  # <sys/stdio.h> of macOS, for renamex_np
# What says that the kernel, the file system or a sandbox (EPERM) does not do it; where that is not why, the two renames fail as well.
REFUSALS = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def publish(finished: Path, place: Path, previous: Path) -> None:
    """Puts the directory `finished` at `place`; an earlier one there is replaced and removed.

    All three lie on one file system, `previous` is free. Where two directories can be exchanged (Linux, macOS), `place` is never
    empty in between; elsewhere the earlier one is set aside as `previous` for a moment, and `recover` puts it back after a kill.

    Raises:
        OSError: the file system refuses; the earlier directory is at `place`.
    """
    if place.exists() and exchange(finished, place):
        remove(finished)
        return
    try:
        if place.exists():
            os.replace(place, previous)
        os.replace(finished, place)
    except BaseException:
        if previous.exists() and not place.exists():
            os.replace(previous, place)
        raise
    remove(previous)


def recover(place: Path, previous: Path) -> None:
    """Puts an earlier directory back that a process, killed between its two renames, had set aside."""
    if place.exists() and any(place.iterdir()):
        remove(previous)
    elif previous.exists():
        if place.exists():
            place.rmdir()  # it is empty
        os.replace(previous, place)


def exchange(one: Path, other: Path) -> bool:
    """Swaps two directory entries in one step, so that neither name is ever without its entry.

    Returns:
        Whether it was done; False where the system or this file system cannot, and nothing has changed.

    Raises:
        OSError: it can, and was refused (a path that is missing, no permission).
    """
    call = _system_call()
    if call is None:
        return False
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    if number in REFUSALS:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def remove(path: Path) -> None:
    """Removes a file, a link or a directory with all it holds; what cannot be removed stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _system_call() -> Callable[[bytes, bytes], int] | None:
    """The C library's call that exchanges two paths; None where it has none (Windows, an old C library)."""
    name = {"linux": "renameat2", "darwin": "renamex_np"}.get(sys.platform)
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if function is None:
        return None
    function.restype = ctypes.c_int
    if name == "renamex_np":
        function.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint)
        return lambda one, other: int(function(one, other, RENAME_SWAP))
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return lambda one, other: int(function(AT_FDCWD, one, AT_FDCWD, other, RENAME_EXCHANGE))
