"""Importing ONNX Runtime so that it reports nothing to its maker and writes nothing into the user's home.

From 1.29 on its wheels for Linux and macOS make a device identifier and a database below `~/.cache` when they are imported, and send
events about every session. `ORT_DISABLE_TELEMETRY=1` at that moment is its own switch against all of it, for the process's lifetime; the
function `disable_telemetry_events` comes too late for the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH = "ORT_DISABLE_TELEMETRY"


@contextmanager
def without_telemetry() -> Iterator[None]:
    """While the library is imported in this block it finds its telemetry switched off; the environment is as before afterwards.

    Whoever sets the variable (`ORT_DISABLE_TELEMETRY=0`), or imports the library earlier, has decided otherwise.
    """
    if SWITCH in os.environ:
        yield
        return
    os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        os.environ.pop(SWITCH, None)
