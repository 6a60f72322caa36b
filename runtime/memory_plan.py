"""What a bundle needs of a device's memory: a list of items, each with where it lies and how its figure is known.

The exporter computes it before it builds and writes it into the manifest; whoever compiles an engine puts the figures of the engine's log
in place of the estimates (`with_measured`). Knows nothing about how a figure is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from runtime.errors import BundleError

DEVICE, SHARED, HOST = "device", "shared", "host"
WEIGHTS, ACTIVATIONS, BESIDE = "weights, {}", "activations, {}", "engines beside their weights"  # rows that an engine's log measures
EXACT, ESTIMATED, ASSUMED, MEASURED = "exact", "estimated", "assumed", "measured"


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """One row: `place` is DEVICE, SHARED or HOST; `basis` is EXACT (from shapes), ESTIMATED (a formula), ASSUMED (a constant) or MEASURED.

    SHARED is device memory that engines use in turn: of all such rows the largest counts. `planned_bytes` is what a MEASURED row was
    planned as.
    """

    name: str
    bytes: int
    place: str
    basis: str
    planned_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.bytes < 0 or self.place not in (DEVICE, SHARED, HOST) or self.basis not in (EXACT, ESTIMATED, ASSUMED, MEASURED):
            raise BundleError(f"memory item {self.name!r:.80} is malformed ({self.bytes} bytes, {self.place}, {self.basis}): export again")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """One conversation with one image, `keep` of its visual tokens after the split, at the full context.

    `memory_bytes` is the device's (None: not known), of which `reserve_bytes` are not the bundle's. `export_peak_bytes` and
    `compile_peak_bytes` (0: nothing is compiled) are peaks of making the bundle, not of running it. `largest_allocation_bytes` is the
    largest single piece that running or compiling asks for; more than `max_allocation_bytes` (None: no limit known) may fail.
    `head_pieces` is into how many products the language-model head is split for that.
    """

    precision: str
    keep: int
    max_context: int
    unified: bool
    items: tuple[MemoryItem, ...]
    memory_bytes: int | None
    reserve_bytes: int
    export_peak_bytes: int
    compile_peak_bytes: int
    largest_allocation_bytes: int
    max_allocation_bytes: int | None = None
    head_pieces: int = 1

    def __post_init__(self) -> None:
        sizes = (self.reserve_bytes, self.export_peak_bytes, self.compile_peak_bytes, self.largest_allocation_bytes, self.memory_bytes or 0)
        if self.keep < 1 or self.max_context < 1 or min(sizes) < 0:
            raise BundleError(
                f"the memory plan has a size below 0, or keep {self.keep} of {self.max_context} tokens: export the bundle again"
            )

    @property
    def device_bytes(self) -> int:
        return sum(item.bytes for item in self.items if item.place == DEVICE) + self.shared_bytes

    @property
    def shared_bytes(self) -> int:
        """The one buffer that engines use in turn."""
        return max((item.bytes for item in self.items if item.place == SHARED), default=0)

    @property
    def host_bytes(self) -> int:
        return sum(item.bytes for item in self.items if item.place == HOST)

    @property
    def total_bytes(self) -> int:
        """What counts against the device's memory: with unified memory the host's side too."""
        return self.device_bytes + (self.host_bytes if self.unified else 0)

    @property
    def available_bytes(self) -> int | None:
        return None if self.memory_bytes is None else self.memory_bytes - self.reserve_bytes

    @property
    def fits(self) -> bool | None:
        """None where the device's memory is not known."""
        return None if self.available_bytes is None else self.total_bytes <= self.available_bytes

    def bytes_of(self, name: str) -> int:
        """Bytes of one item; KeyError where there is none of that name."""
        for item in self.items:
            if item.name == name:
                return item.bytes
        raise KeyError(f"the memory plan has no item {name!r}")

    def with_measured(self, figures: Mapping[str, int]) -> MemoryPlan:
        """The same plan with measured bytes in place of the planned ones, which are kept beside.

        Args:
            figures: bytes by item name, for example an engine log's activation memory.

        Raises:
            KeyError: there is no such item.
        """
        for name in figures:
            self.bytes_of(name)
        items = tuple(_measured(item, figures[item.name]) if item.name in figures else item for item in self.items)
        return dataclasses.replace(self, items=items)

    def as_planned(self) -> MemoryPlan:
        """The same plan before anything was measured."""
        items = tuple(item if item.planned_bytes is None else _planned(item, item.planned_bytes) for item in self.items)
        return dataclasses.replace(self, items=items)

    @property
    def measured(self) -> tuple[MemoryItem, ...]:
        """The rows that were measured."""
        return tuple(item for item in self.items if item.basis == MEASURED)


def _measured(item: MemoryItem, size: int) -> MemoryItem:
    planned = item.bytes if item.planned_bytes is None else item.planned_bytes
    return dataclasses.replace(item, bytes=size, basis=MEASURED, planned_bytes=planned)


def _planned(item: MemoryItem, size: int) -> MemoryItem:
    basis = EXACT if item.name.startswith(WEIGHTS.format("")) else ESTIMATED
    return dataclasses.replace(item, bytes=size, basis=basis, planned_bytes=None)
