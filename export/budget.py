"""How many visual tokens are kept: keep counts, the paper's averages over layers, percentages; always resolved to keep counts.

`keep` counts visual tokens after the split; an average a over layers (EntropyPrune's budget) means K layers with N tokens and
L - K layers with R: R = floor((L a - K N) / (L - K)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from runtime.errors import UsageError
from runtime.names import SCORE_MODES, SCORELESS_MODES

ROUNDING = 1e-6  # so that the average of a keep count, rounded as a float, gives that keep count and not one less


def keep_from_average(average: float, *, visual_tokens: int, split_layer: int, layers: int) -> int:
    """R for an average over layers; visual_tokens is N, split_layer K, layers L.

    Raises:
        UsageError: no R of 1..N gives that average; the message names the feasible range.
    """
    keep = (layers * average - split_layer * visual_tokens) / (layers - split_layer) + ROUNDING
    if not 1 <= keep < visual_tokens + 1:  # false for NaN
        least = average_from_keep(1, visual_tokens=visual_tokens, split_layer=split_layer, layers=layers)
        smallest = f"{math.ceil(least * 100) / 100:.2f}".rstrip("0").rstrip(".")
        raise UsageError(
            f"an average of {average:g} visual tokens over {layers} layers is not feasible with a split at layer {split_layer} of "
            f"{visual_tokens} tokens: choose {smallest} to {visual_tokens}, or an earlier split"
        )
    return math.floor(keep)


def average_from_keep(keep: int, *, visual_tokens: int, split_layer: int, layers: int) -> float:
    """The average number of visual tokens over all layers that a keep count means."""
    return (split_layer * visual_tokens + (layers - split_layer) * keep) / layers


def keep_from_percent(percent: float, *, visual_tokens: int) -> int:
    """R for a percentage of the visual tokens kept after the split, rounded to the nearest, at least 1."""
    if not 0 < percent <= 100:
        raise UsageError(f"--keep-percent is the percentage of visual tokens KEPT, above 0 and up to 100; got {percent:g}")
    return max(1, math.floor(visual_tokens * percent / 100 + 0.5))


def check_keep(keep: int, *, visual_tokens: int) -> int:
    """Returns `keep`, or raises UsageError where it is outside 1..N."""
    if not 1 <= keep <= visual_tokens:
        raise UsageError(f"--keep {keep} is out of range: an image has {visual_tokens} visual tokens, keep 1 to {visual_tokens} of them")
    return keep


def check_auto_keep(threshold: float | None, *, budgets: Sequence[int], score_mode: str) -> float | None:
    """Returns the share of the scores' mass that a budget chosen for an image must hold (`runtime.budgets`); None offers no choice.

    Raises:
        UsageError: it is out of range, or there is nothing to choose among or by.
    """
    if threshold is None:
        return None
    if not 0 < threshold <= 1:  # false for NaN
        raise UsageError(f"--auto-keep is the share of the scores' mass that kept tokens must hold, above 0 and up to 1; got {threshold:g}")
    if score_mode in SCORELESS_MODES:
        choices = ", ".join(mode for mode in SCORE_MODES if mode not in SCORELESS_MODES)
        raise UsageError(f"--auto-keep means nothing with --score-mode {score_mode}, whose scores see no image: choose one of {choices}")
    if len(budgets) < 2:
        raise UsageError(
            f"--auto-keep chooses among budgets, and the bundle would hold {budgets[0]} alone: give two or more, as --keep R,R"
        )
    return float(threshold)


def check_split(split_layer: int, *, layers: int) -> int:
    """Returns `split_layer`, or raises UsageError where it is outside 1..L-1."""
    if not 1 <= split_layer < layers:
        raise UsageError(
            f"--split-layer {split_layer} is out of range: the decoder has {layers} layers, split before layer 1 to {layers - 1}"
        )
    return split_layer
