"""Builds an engine in a child process, one at a time, so that a builder that crashes or is killed for its memory is an error and no more.

The child gets its work as one line of JSON on stdin and ends when that pipe closes, so that it does not outlive its parent; it leaves
its result in a file. Of all processes it is the one that Linux kills first when memory runs out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from runtime.errors import EngineError, EntropyPruneError, StorageError, UsageError
from runtime.manifest import build_typed
from runtime.units import format_bytes

if TYPE_CHECKING:
    from runtime.engines.tensorrt_builder import BuiltEngine, EngineSpec

_CHILD = (
    "import json, sys; job = json.loads(sys.stdin.readline()); sys.path[:] = job['path']; "
    "from runtime.engines.tensorrt_process import child; child(job)"
)
_ERRORS = MappingProxyType({kind.__name__: kind for kind in (EngineError, StorageError, UsageError)})
POLL_S = 0.2


def build_in_child(spec: EngineSpec) -> BuiltEngine:
    """Builds one engine in a process of its own; see `build_engine`.

    Raises:
        UsageError, EngineError, StorageError: as `build_engine` raises them; an EngineError too where the process died.
    """
    from runtime.engines.tensorrt_builder import BuiltEngine, partial_name

    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        result, output = Path(folder, "result.json"), Path(folder, "output.txt")
        job = {"path": sys.path, "spec": dataclasses.asdict(spec), "result": str(result)}
        with output.open("wb") as said:
            child = subprocess.Popen([sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT)
            try:
                free, peak = available_memory(), _run(child, json.dumps(job))
            finally:
                child.kill()
                child.wait()
                if child.stdin is not None:
                    with suppress(OSError):  # what it has not read
                        child.stdin.close()
                with suppress(OSError):
                    partial = Path(spec.output).with_name(partial_name(Path(spec.output).name, child.pid))
                    partial.unlink()
        if not result.is_file():
            raise EngineError(_death(spec, child.returncode, peak, free, output.read_text(encoding="utf-8", errors="replace")))
        raw = json.loads(result.read_text(encoding="utf-8"))
    if "error" in raw:
        raise _ERRORS[raw["error"]](raw["message"])
    built: BuiltEngine = build_typed(BuiltEngine, raw, "the builder's result")
    return built


def child(job: dict[str, Any]) -> None:
    """What the child process does with its job."""
    from runtime.engines.tensorrt_builder import EngineSpec, build_engine

    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    try:
        raw = dataclasses.asdict(build_engine(build_typed(EngineSpec, job["spec"], "the builder's job")))
    except EntropyPruneError as error:
        raw = {"error": next((kind for kind in _ERRORS if isinstance(error, _ERRORS[kind])), EngineError.__name__), "message": str(error)}
    Path(job["result"]).write_text(json.dumps(raw), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # the library's own teardown may crash after all is done


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(3)


def _run(child: subprocess.Popen[bytes], job: str) -> int | None:
    """Gives the child its job and waits for its end; returns its largest resident memory as last seen, in bytes."""
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        child.stdin.write(job.encode() + b"\n")
        child.stdin.flush()
    peak = None
    while True:
        peak = _peak_memory_of(child.pid) or peak
        with suppress(subprocess.TimeoutExpired):
            child.wait(POLL_S)
            return peak


def _peak_memory_of(process: int) -> int | None:
    return _kilobytes(Path(f"/proc/{process}/status"), "VmHWM:")


def available_memory() -> int | None:
    """Bytes of memory that a process can get now; None where the system does not say."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def _kilobytes(path: Path, entry: str) -> int | None:
    """One entry of a file below /proc, in bytes; None where there is none."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(entry)), None)


def _death(spec: EngineSpec, code: int, peak: int | None, free: int | None, said: str) -> str:
    """What to say of a child that left no result."""
    memory = "" if peak is None else f" at {format_bytes(peak)} of memory" + ("" if free is None else f", of {format_bytes(free)} free")
    if code == -getattr(signal, "SIGKILL", 9):
        return (
            f"the builder of {spec.graph} was killed{memory}: most likely the system ran out of memory; "
            "close other programs, add swap, or export with a smaller precision, and compile again"
        )
    how = f"with signal {-code}" if code < 0 else f"with exit code {code}"
    last = said.strip().splitlines()[-1:] or ["it said nothing"]
    return f"the builder of {spec.graph} ({spec.library}) ended {how}{memory}: {last[0][:300]}; compile again, or report this message"
