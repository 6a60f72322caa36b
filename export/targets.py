"""What a target is: the engine, its library, the chip and its memory. The files are `configs/targets/*.toml`, read by `export.configs`.

Knows nothing about models. What can be built for a target today is said in `export.build`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from export.precision import SCHEMES
from runtime.errors import UsageError
from runtime.names import IN_PLACE, KV_WRITES, TENSOR_SCATTER

# Where each engine is compiled: what happens on the machine that builds the bundle.
ENGINES = {
    "onnxruntime": "nothing to compile",
    "onnxruntime-cuda": "nothing to compile",
    "tensorrt": "graphs here, engines on the device",
    "tensorrt-rtx": "engines built here",
}
TENSOR_SCATTER_OPSET = 24  # the first with the operator
_UNITS = {"g": 1 << 30, "gb": 1 << 30, "gib": 1 << 30, "m": 1 << 20, "mb": 1 << 20, "mib": 1 << 20}


@dataclass(frozen=True, slots=True)
class LibraryVersion:
    """A library that runs the target's engines: its module or package, the lowest version, and what it comes with."""

    name: str
    minimum: str
    platform: str


@dataclass(frozen=True, slots=True)
class TargetConfig:
    """One file of `configs/targets`; `name` is the file's.

    `compute_capabilities` are those an engine is made for. `memory_bytes` is the device's whole memory (None: not known), of which
    `reserve_bytes` are for firmware, system and other programs; `unified` memory holds the host's side too. Where `memory_of` is set, it
    says whose memory that is, and the user may say another's. `bandwidth_gb_s` is the memory's peak (10^9 bytes). `opset` is the
    highest ONNX opset that the library parses. `max_allocation_bytes` is the largest single allocation that is known to work. `kv_write` is
    how the graphs write the cache (`export.graphs.kv_write`).
    """

    name: str
    description: str
    engine: str
    precisions: tuple[str, ...]
    default_precision: str
    compute_capabilities: tuple[str, ...] = ()
    memory_bytes: int | None = None
    memory_of: str | None = None
    reserve_bytes: int = 0
    bandwidth_gb_s: float | None = None
    unified: bool = False
    opset: int | None = None
    max_allocation_bytes: int | None = None
    kv_write: str = IN_PLACE
    libraries: tuple[LibraryVersion, ...] = ()

    def __post_init__(self) -> None:
        where = f"the config of target {self.name}"
        if self.engine not in ENGINES:
            raise UsageError(f"{where} has engine {self.engine!r}; known are {', '.join(ENGINES)}")
        unknown = [precision for precision in self.precisions if precision not in SCHEMES]
        if unknown or len(set(self.precisions)) != len(self.precisions):
            raise UsageError(f"{where} has precisions {', '.join(self.precisions)}; list each once, of {', '.join(SCHEMES)}")
        if self.default_precision not in self.precisions:
            raise UsageError(
                f"{where} has default_precision {self.default_precision!r}, which is not among its precisions {', '.join(self.precisions)}"
            )
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"[1-9]\d?\.\d", capability):
                raise UsageError(f"{where} has compute capability {capability!r}; write it as NVIDIA does, such as 8.7")
        for entry in ("memory_bytes", "bandwidth_gb_s", "opset", "max_allocation_bytes"):
            value = getattr(self, entry)
            if value is not None and value <= 0:
                raise UsageError(f"{where} has {entry} = {value}; it must be above 0")
        if self.kv_write not in KV_WRITES:
            raise UsageError(f"{where} has kv_write {self.kv_write!r}; known are {', '.join(KV_WRITES)}")
        if self.kv_write == TENSOR_SCATTER and (self.opset or TENSOR_SCATTER_OPSET) < TENSOR_SCATTER_OPSET:
            raise UsageError(f"{where} has kv_write {TENSOR_SCATTER} and opset {self.opset}; the operator needs {TENSOR_SCATTER_OPSET}")
        if not 0 <= self.reserve_bytes < (self.memory_bytes or 1 << 60):
            raise UsageError(
                f"{where} has reserve_bytes = {self.reserve_bytes}; it must be from 0 to below the memory, {self.memory_bytes}"
            )

    @property
    def available_bytes(self) -> int | None:
        """What a bundle may take; None where the memory is not known."""
        return None if self.memory_bytes is None else self.memory_bytes - self.reserve_bytes

    @property
    def library(self) -> str:
        """The engine as the runtime calls it: "onnxruntime", "onnxruntime-cuda", "tensorrt" or "tensorrt_rtx"."""
        return "tensorrt_rtx" if self.engine == "tensorrt-rtx" else self.engine

    @property
    def compiles(self) -> str:
        """What happens on the machine that builds the bundle."""
        return ENGINES[self.engine]

    @property
    def fuses_attention(self) -> bool:
        """Whether attention runs without its scores in memory (TensorRT: seen in the kernels it chose)."""
        return self.engine.startswith("tensorrt")

    def with_memory(self, size: str) -> TargetConfig:
        """The same target with another memory.

        Args:
            size: as a card's is sold, "12GB" (2^30 bytes each) or "12288MB".

        Raises:
            UsageError: it is malformed, too small, or this target's memory is known and cannot differ.
        """
        if self.memory_of is None and self.memory_bytes is not None:
            raise UsageError(
                f"--device-memory {size} does not go with target {self.name}, whose memory is known ({gib(self.memory_bytes)}): "
                "choose the target that the device is"
            )
        memory = parse_memory(size)
        if memory <= self.reserve_bytes:
            raise UsageError(
                f"--device-memory {size} is not more than what the system keeps, {gib(self.reserve_bytes)}: say the whole memory"
            )
        return dataclasses.replace(self, memory_bytes=memory, memory_of="--device-memory", bandwidth_gb_s=None)


def parse_memory(size: str) -> int:
    """Bytes of "12GB" or "12288 MB"; memory is sold in powers of two, so GB means 2^30 here."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", size.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise UsageError(f"--device-memory {size!r} is not a size: write it such as 12GB or 12288MB")
    return int(float(match[1]) * _UNITS[match[2]])


def gib(count: float) -> str:
    """12884901888 -> '12 GiB'."""
    return f"{count / (1 << 30):.2f}".rstrip("0").rstrip(".") + " GiB"


def describe_targets(targets: Sequence[tuple[str, TargetConfig]]) -> str:
    """The table of `--list-targets`: what each name stands for; an alias has one line that names the other."""
    header = ("target", "engine", "capability", "memory", "GB/s", "precisions (default first)", "compiling")
    rows = [header, *(_row(name, target) for name, target in targets)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = sorted({f"{name}: the memory is that of a {t.memory_of}" for name, t in targets if t.memory_of and t.memory_bytes})
    return "\n".join([*lines, *notes, "another memory is said with --device-memory, where the table names a card's or none"])


def _row(name: str, target: TargetConfig) -> tuple[str, ...]:
    if name != target.name:
        return name, f"= {target.name}", "", "", "", "", ""
    memory = "not known" if target.memory_bytes is None else gib(target.memory_bytes) + (" unified" if target.unified else "")
    precisions = [target.default_precision, *(p for p in target.precisions if p != target.default_precision)]
    bandwidth = "-" if target.bandwidth_gb_s is None else f"{target.bandwidth_gb_s:g}"
    return name, target.engine, ", ".join(target.compute_capabilities) or "-", memory, bandwidth, ", ".join(precisions), target.compiles
