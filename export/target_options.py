"""What `--target`, `--precision` and `--device-memory` mean together: one target, or several that share a bundle.

Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from export.configs import load_target_config
from export.targets import TargetConfig
from runtime.errors import UsageError


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """One target of a build, and the precision of its weights."""

    target: TargetConfig
    precision: str


def settle_targets(names: str, precision: str | None, device_memory: str | None) -> tuple[TargetPlan, ...]:
    """The targets of a build, in the order they were named.

    Args:
        names: as `--target` takes them, "cpu" or "cpu,rtx".
        precision: one for each target ("fp32,fp16"), or one for all of them; None: each target's default.
        device_memory: the memory of those targets that are families of cards or any machine; the CPU's where it is the only target.

    Raises:
        UsageError: a target is unknown or named twice, does not run a precision, or takes no other memory.
    """
    targets = [load_target_config(name.strip()) for name in names.split(",")]
    twice = next((one.name for i, one in enumerate(targets) if one.name in [t.name for t in targets[:i]]), None)
    if twice is not None:
        raise UsageError(f"--target {names} names {twice} twice: name each target once")
    precisions = [None] * len(targets) if precision is None else [part.strip() for part in precision.split(",")]
    if len(precisions) == 1:
        precisions *= len(targets)
    if len(precisions) != len(targets):
        raise UsageError(f"--precision {precision} has {len(precisions)} for {len(targets)} targets: give one for each, or one for all")
    if device_memory is not None:
        targets = _with_memory(targets, device_memory)
    return tuple(TargetPlan(target, choose_precision(wanted, target)) for target, wanted in zip(targets, precisions, strict=True))


def _with_memory(targets: Sequence[TargetConfig], size: str) -> list[TargetConfig]:
    """The size goes to every card; with the CPU among several targets, that keeps what is known of it."""
    open_ones = [target for target in targets if target.memory_of is not None]
    cards = [target for target in open_ones if target.engine != "onnxruntime"]
    wanted = cards or open_ones or targets[:1]  # the last case raises
    return [target.with_memory(size) if target in wanted else target for target in targets]


def choose_precision(wanted: str | None, target: TargetConfig) -> str:
    """The precision asked for, or the target's default.

    Raises:
        UsageError: the target does not run it; the message lists what it runs.
    """
    precision = wanted or target.default_precision
    if precision not in target.precisions:
        raise UsageError(f"--precision {precision} is not offered for target {target.name}: choose one of {', '.join(target.precisions)}")
    return precision
