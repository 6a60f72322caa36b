"""Which settings the evidence compares: score modes, controls and neighbours, at every split and budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from calibration.selection import TENSORS, Selector
from export.budget import keep_from_average
from export.exact_score import ENTROPY_MODES
from runtime.errors import UsageError

KEEP_PERCENTS = (50.0, 33.0, 22.0, 11.0, 5.5)  # of N, after the split
AVERAGE_SHARES = (1 / 3, 2 / 9, 1 / 9)  # of N, over all layers: the paper's 192, 128 and 64 of 576
RANDOM_SEEDS = 5


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """One way to prune. `method` is a selector's name or a neighbour's; `seed` counts repetitions of mode `random`."""

    method: str
    split_layer: int
    keep: int
    seed: int = 0


def selectors() -> tuple[Selector, ...]:
    """The score's modes on every tensor, the controls, and the diversity mode."""
    scores = [Selector(mode, tensor) for mode in ENTROPY_MODES for tensor in TENSORS]
    controls = [Selector("energy-high"), Selector("energy-low"), Selector("uniform")]
    return (*scores, *controls, *(Selector("random", seed=seed) for seed in range(RANDOM_SEEDS)), Selector("dpp"))


def keeps(visual_tokens: int) -> tuple[int, ...]:
    """The keep counts that KEEP_PERCENTS mean."""
    return tuple(max(1, math.floor(visual_tokens * percent / 100 + 0.5)) for percent in KEEP_PERCENTS)


def average_keeps(visual_tokens: int, layers: int, split_layer: int) -> tuple[int | None, ...]:
    """The keep counts that AVERAGE_SHARES mean at a split; None where an average is not feasible there."""

    def keep(share: float) -> int | None:
        try:
            return keep_from_average(share * visual_tokens, visual_tokens=visual_tokens, split_layer=split_layer, layers=layers)
        except UsageError:
            return None

    return tuple(keep(share) for share in AVERAGE_SHARES)


def budgets(visual_tokens: int, layers: int, split_layer: int, extra: tuple[int, ...] = ()) -> tuple[int, ...]:
    """All keep counts evaluated at a split, largest first."""
    wanted = {*keeps(visual_tokens), *extra, *(k for k in average_keeps(visual_tokens, layers, split_layer) if k is not None)}
    return tuple(sorted(wanted, reverse=True))


def equal_cost(visual_tokens: int, layers: int, split_layer: int, extra: tuple[int, ...] = ()) -> Iterator[tuple[int, int]]:
    """(keep after the split, tokens kept before layer 0 at no more cost) for each budget of a split.

    Of visual tokens alone a layer's cost grows a little faster than their number, so the same average over layers is not dearer.
    """
    for keep in budgets(visual_tokens, layers, split_layer, extra):
        yield keep, (split_layer * visual_tokens + (layers - split_layer) * keep) // layers
