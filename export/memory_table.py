"""A memory plan as text and as plain data: one item a row, the sums, and whether it fits. Computes nothing of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

from export.targets import TargetConfig, gib
from runtime.memory_plan import EXACT, HOST, SHARED, MemoryPlan
from runtime.units import format_bytes


def describe_memory(plan: MemoryPlan, target: TargetConfig, indent: str = "  ") -> list[str]:
    """The table in lines."""
    which = "" if target.memory_of is None or plan.memory_bytes is None else f" ({target.memory_of})"
    memory = "memory not known: say it with --device-memory" if plan.memory_bytes is None else f"memory {gib(plan.memory_bytes)}{which}"
    lines = [
        f"memory on {target.name} in {plan.precision}, one image, --keep {plan.keep}, --max-context {plan.max_context}; {memory}"
        + (", shared by host and device" if plan.unified else ""),
    ]
    lines += [
        f"  {item.name:<34}{format_bytes(item.bytes):>10}  {_how(item.basis, item.place, plan.unified)}".rstrip() for item in plan.items
    ]
    lines.append(f"  {'sum' if plan.unified else 'sum on the device':<34}{format_bytes(plan.total_bytes):>10}")
    if plan.available_bytes is not None:
        left = f"{gib(plan.memory_bytes or 0)} less {gib(plan.reserve_bytes)} for the system"
        lines.append(f"  {'the target has':<34}{format_bytes(plan.available_bytes):>10}  {left}")
    lines.append(f"  {_verdict(plan)}")
    return [indent + line for line in [*lines, *_making(plan, target)]]


def _verdict(plan: MemoryPlan) -> str:
    if plan.available_bytes is None:
        return "not checked: the target's memory is not known"
    left = plan.available_bytes - plan.total_bytes
    return f"fits, {format_bytes(left)} are left" if left >= 0 else f"DOES NOT FIT: {format_bytes(-left)} too much"


def _how(basis: str, place: str, unified: bool) -> str:
    host = "the host's side" if unified else "in the host's memory, not in the sum"
    where = {HOST: host, SHARED: "one buffer for all, the largest counts"}.get(place, "")
    return ", ".join(part for part in ("" if basis == EXACT else basis, where) if part)


def _making(plan: MemoryPlan, target: TargetConfig) -> list[str]:
    """Peaks of making it, and what may fail although the sum fits."""
    lines = [f"  {'peak while exporting here':<34}{format_bytes(plan.export_peak_bytes):>10}  estimated"]
    if plan.compile_peak_bytes:
        here = target.compiles == "engines built here"
        place = "here" if here else "on the device"
        known = plan.available_bytes is None or here or plan.compile_peak_bytes <= plan.available_bytes
        more = "" if known else "; MORE than the target has: compiling may need swap"
        lines.append(f"  {f'peak while compiling {place}':<34}{format_bytes(plan.compile_peak_bytes):>10}  estimated{more}")
    if plan.max_allocation_bytes is not None:
        limit = format_bytes(plan.max_allocation_bytes)
        fine = plan.largest_allocation_bytes <= plan.max_allocation_bytes
        said = f"up to {limit} is known to work" if fine else f"MORE than the {limit} that are known to work"
        if plan.head_pieces > 1:
            lines.append(f"  {'language-model head':<34}{f'{plan.head_pieces} pieces':>10}  so that compiling it allocates less at once")
        lines.append(f"  {'largest single allocation':<34}{format_bytes(plan.largest_allocation_bytes):>10}  estimated; {said}")
    return lines


def memory_report(plan: MemoryPlan) -> dict[str, Any]:
    """Plain data for JSON: the plan and its sums."""
    sums = {name: getattr(plan, name) for name in ("device_bytes", "host_bytes", "total_bytes", "available_bytes", "fits")}
    return {**dataclasses.asdict(plan), **sums}
