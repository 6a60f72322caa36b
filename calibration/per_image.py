"""Budgets per image: each takes the smallest budget that keeps a share T of its score mass, else the largest.

Whether that is better than one budget for all is an empirical question: for each threshold T, the images' answers under their own budgets
are compared with fixed budgets at the same average number of tokens: the best mix of two of them, given out to images blindly, which is
linear interpolation. Differences are paired over images; their intervals hold for all thresholds together (Bonferroni), since the best of
several is looked for. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibration.pareto import Measured, Rule
from calibration.resampling import CONFIDENCE, Figure, Resampler, bounds

__all__ = ["ImageBudgets", "Threshold", "choose_threshold", "evaluate_thresholds", "usual_thresholds"]

Floats = npt.NDArray[np.float64]
DECILES = 9
ROUNDING = 1e-9  # a gain of 0 is 0 only up to rounding


@dataclass(frozen=True, slots=True, eq=False)
class ImageBudgets:
    """What each image does under each budget, of one mode and split layer.

    Attributes:
        keeps: int64 [budgets], ascending.
        mass: float64 [images, budgets], the kept share of the score mass.
        agreeing, right: float64 [images, budgets], answer positions that agree, labels that are given.
        positions, labelled: float64 [images], how many there are.
    """

    keeps: npt.NDArray[np.int64]
    mass: Floats
    agreeing: Floats
    right: Floats
    positions: Floats
    labelled: Floats

    def assigned(self, threshold: float) -> npt.NDArray[np.int64]:
        """int64 [images], the budget's index that each image takes."""
        reaches = self.mass >= threshold
        return np.where(reaches.any(axis=1), reaches.argmax(axis=1), len(self.keeps) - 1)


@dataclass(frozen=True, slots=True)
class Threshold:
    """What a threshold gives.

    Attributes:
        threshold: T.
        shares: of the images that take each budget, ascending by keep count.
        tokens: average keep count over images.
        agreement, accuracy: with 95 % intervals; accuracy None without labels.
        fixed_agreement, fixed_accuracy: of the best blind mix of two fixed budgets with the same average.
        gain, accuracy_gain: the difference to them, the interval paired and for all thresholds together.
    """

    threshold: float
    shares: tuple[float, ...]
    tokens: float
    agreement: Figure
    fixed_agreement: float
    gain: Figure
    accuracy: Figure | None
    fixed_accuracy: float | None
    accuracy_gain: Figure | None

    @property
    def above(self) -> bool:
        """Whether the agreement is above that of fixed budgets, beyond chance."""
        return self.gain.interval is not None and self.gain.interval[0] > ROUNDING


def usual_thresholds(budgets: ImageBudgets) -> tuple[float, ...]:
    """Deciles of the masses that budgets below the largest keep, rounded to four digits: ascending, above 0 and up to 1."""
    masses = np.quantile(budgets.mass[:, :-1], np.arange(1, DECILES + 1) / (DECILES + 1))
    return tuple(sorted({round(float(mass), 4) for mass in masses if 0 < round(float(mass), 4) <= 1}))


def evaluate_thresholds(budgets: ImageBudgets, thresholds: Sequence[float], resampler: Resampler) -> list[Threshold]:
    """Agreement and accuracy for each threshold, beside fixed budgets."""
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(thresholds))
    found = []
    for threshold in thresholds:
        chosen = budgets.assigned(threshold)
        shares = tuple(float((chosen == index).mean()) for index in range(len(budgets.keeps)))
        agreement, fixed, gain = _against_fixed(budgets, chosen, budgets.agreeing, budgets.positions, resampler, confidence)
        accuracy: tuple[Figure | None, float | None, Figure | None] = (None, None, None)
        if budgets.labelled.any():
            accuracy = _against_fixed(budgets, chosen, budgets.right, budgets.labelled, resampler, confidence)
        tokens = float(budgets.keeps[chosen].mean())
        found.append(Threshold(threshold, shares, tokens, agreement, fixed, gain, *accuracy))
    return found


def _against_fixed(
    budgets: ImageBudgets, chosen: npt.NDArray[np.int64], good: Floats, total: Floats, resampler: Resampler, confidence: float
) -> tuple[Figure, float, Figure]:
    """The rule's share of good answers, that of fixed budgets at its average, and the difference."""
    own = np.take_along_axis(good, chosen[:, None], axis=1)[:, 0]
    one, average = np.ones((1, len(chosen))), budgets.keeps[chosen].mean()
    below, above = np.flatnonzero(budgets.keeps <= average), np.flatnonzero(budgets.keeps >= average)
    mixes = [(int(low), int(high)) for low in below for high in above if low < high]
    best = max(mixes, key=lambda mix: float(_mixed(budgets, mix, chosen, good, total, one)[0]))
    share = resampler.ratio(own, total)
    fixed = float(_mixed(budgets, best, chosen, good, total, one)[0])
    if resampler.weights is None:
        return share, fixed, Figure(share.mean - fixed, None)
    drawn = resampler.weights[resampler.weights @ total > 0]
    gains = drawn @ own / (drawn @ total) - _mixed(budgets, best, chosen, good, total, drawn)
    return share, fixed, Figure(share.mean - fixed, bounds(gains, confidence))


def _mixed(
    budgets: ImageBudgets, mix: tuple[int, int], chosen: npt.NDArray[np.int64], good: Floats, total: Floats, weights: Floats
) -> Floats:
    """[resamples]: the share of good answers of a mix of two fixed budgets, at the average number of tokens that `chosen` gives in each."""
    low, high = mix
    keeps = budgets.keeps.astype(np.float64)
    shares = weights @ good[:, [low, high]] / (weights @ total)[:, None]
    part = (weights @ keeps[chosen] / weights.sum(axis=1) - keeps[low]) / (keeps[high] - keeps[low])
    mixed: Floats = shares[:, 0] * (1 - part) + shares[:, 1] * part
    return mixed


def choose_threshold(found: Sequence[Threshold], rule: Rule, fixed: Measured, budgets: Sequence[Measured]) -> Threshold | None:
    """The threshold that a rule picks; None where none is above fixed budgets, or none does better by the rule than the fixed setting.

    Args:
        fixed: the setting that the rule chose.
        budgets: the settings of the same mode and split, ascending by keep count, as in `Threshold.shares`.
    """

    def average(row: Threshold, values: Sequence[float]) -> float:
        return float(np.dot(row.shares, values))

    fitting = []
    for row in (row for row in found if row.above):
        if rule.min_agreement is not None:
            fits = 100 * row.agreement.sure >= rule.min_agreement and row.tokens < fixed.setting.keep
        elif rule.avg_keep is not None:
            fits = average(row, [budget.average_keep for budget in budgets]) <= rule.avg_keep
        else:
            times = [budget.first_token.ms for budget in budgets if budget.first_token is not None]
            fits = rule.max_ttft_ms is not None and average(row, times) <= rule.max_ttft_ms
        if fits and (rule.cheapest or row.agreement.mean > fixed.agreement.mean):
            fitting.append(row)
    key = (lambda row: (row.tokens, -row.agreement.mean)) if rule.cheapest else (lambda row: (-row.agreement.mean, row.tokens))
    return min(fitting, key=key, default=None)
