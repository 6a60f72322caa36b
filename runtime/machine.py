"""What a measurement was taken on: processor, versions, date; and how much memory the process has used."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

DISTRIBUTION = "entropy-prune"


@dataclass(frozen=True, slots=True)
class Machine:
    """`cores` are those that this process may use; `load` is the average over the last minute (None where there is none)."""

    cpu: str
    cores: int
    engine_threads: int | None
    load: float | None
    system: str
    python: str
    onnxruntime: str
    numpy: str
    entropy_prune: str
    date: str

    @classmethod
    def here(cls, engine_threads: int | None) -> Machine:
        import numpy as np

        from runtime.engines.telemetry import without_telemetry

        with without_telemetry():
            import onnxruntime

        return cls(
            cpu=cpu_name(), cores=available_cores(), engine_threads=engine_threads,
            load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None, system=platform.platform(terse=True),
            python=platform.python_version(), onnxruntime=onnxruntime.__version__, numpy=np.__version__,
            entropy_prune=installed(DISTRIBUTION) or "not installed (run from its sources)",
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )  # fmt: skip

    def describe(self) -> str:
        """One line."""
        threads = "" if self.engine_threads is None else f", {_count(self.engine_threads, 'engine thread')}"
        load = "" if self.load is None else f", load {self.load}"
        versions = f"ONNX Runtime {self.onnxruntime}, numpy {self.numpy}, Python {self.python}"
        return f"{self.cpu}, {_count(self.cores, 'core')}{threads}{load}; {self.system}; {versions}; {self.date}"


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """The largest resident memory of this process so far; `source` says who counted."""

    bytes: int
    source: str


def peak_memory() -> PeakMemory | None:
    """VmHWM on Linux, getrusage on other Unix systems, None elsewhere."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return PeakMemory(int(line.split()[1]) * 1024, "VmHWM of /proc/self/status")
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return PeakMemory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "ru_maxrss of getrusage")


def cpu_name() -> str:
    """The processor's or the board's name, as the system gives it."""
    info, board = Path("/proc/cpuinfo"), Path("/proc/device-tree/model")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    if not named and board.is_file():
        named = board.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    return named or platform.processor() or platform.machine()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, read without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
