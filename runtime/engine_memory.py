"""A memory plan beside what the build logs of its engines say: which rows they measure, and how far the plan was off.

Knows nothing about how a plan is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from runtime import names
from runtime.memory_plan import ACTIVATIONS, BESIDE, WEIGHTS, MemoryItem, MemoryPlan
from runtime.units import format_bytes

if TYPE_CHECKING:
    from runtime.engines.tensorrt_builder import BuiltEngine

TOLERANCE: Final = 0.1
ALLOWANCE: Final = 8_000_000  # bytes that a row may be off whatever its size: kernels' scratch, which shapes do not tell


def measured_plan(plan: MemoryPlan, engines: Sequence[BuiltEngine]) -> MemoryPlan:
    """The plan with the rows of its engines as they were built; rows that the library does not log stay as they are.

    Args:
        engines: of all graphs; those of several budgets' scores are one row, the largest counts.
    """
    figures = dict[str, int]()
    for engine in engines:
        stage = names.SCORE if engine.info.graph.startswith(names.SCORE) else engine.info.graph
        if engine.info.weights_bytes is not None:
            figures[WEIGHTS.format(stage)] = max(figures.get(WEIGHTS.format(stage), 0), engine.info.weights_bytes)
        if engine.info.activation_bytes:
            name = ACTIVATIONS.format(stage)
            figures[name] = max(figures.get(name, 0), *engine.info.activation_bytes)
    weights = [engine.info.weights_bytes for engine in engines]
    if None not in weights:
        figures[BESIDE] = max(0, sum(engine.file.bytes for engine in engines) - sum(count or 0 for count in weights))
    known = {item.name for item in plan.items}
    return plan.with_measured({name: size for name, size in figures.items() if name in known})


def off(item: MemoryItem) -> bool:
    """Whether a measured row is more than `TOLERANCE` and `ALLOWANCE` away from what was planned."""
    planned = item.planned_bytes or 0
    return abs(item.bytes - planned) > max(TOLERANCE * planned, ALLOWANCE)


def describe_measured(plan: MemoryPlan) -> Iterator[str]:
    """The measured rows as a table, and a warning for those that the plan missed."""
    yield f"  {'memory':<34}{'planned':>10}{'measured':>10}{'ratio':>8}"
    for item in plan.measured:
        ratio = f"{item.bytes / item.planned_bytes:.2f}" if item.planned_bytes else "-"
        yield f"  {item.name:<34}{format_bytes(item.planned_bytes or 0):>10}{format_bytes(item.bytes):>10}{ratio:>8}"
    planned = plan.as_planned().total_bytes
    ratio = f"{plan.total_bytes / planned:.2f}"
    yield f"  {'all that the bundle needs':<34}{format_bytes(planned):>10}{format_bytes(plan.total_bytes):>10}{ratio:>8}"
    missed = [item.name for item in plan.measured if off(item)]
    if missed:
        yield f"  warning: more than {TOLERANCE:.0%} and {format_bytes(ALLOWANCE)} from the plan: {'; '.join(missed)}"
    if plan.fits is False:
        yield f"  warning: as built it needs {format_bytes(plan.total_bytes)} of {format_bytes(plan.available_bytes or 0)} on its target"
