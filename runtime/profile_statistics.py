"""Percentiles of times, and ratios of paired times with their interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Distribution:
    """Times of `runs` runs, in milliseconds; p90 and p99 are interpolated percentiles."""

    median_ms: float
    p90_ms: float
    p99_ms: float
    runs: int

    @classmethod
    def of(cls, values_ms: Sequence[float]) -> Distribution:
        median, p90, p99 = (round(float(v), 4) for v in np.percentile(values_ms, (50, 90, 99)))
        return cls(median, p90, p99, len(values_ms))


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of pairwise ratios; `low` and `high` bound its 95 % interval (bootstrap over the pairs)."""

    median: float
    low: float
    high: float
    pairs: int

    def divided_by(self, number: float) -> Ratio:
        """The same, interval included, relative to a number without error."""
        return Ratio(self.median / number, self.low / number, self.high / number, self.pairs)


def paired_ratio(numerators: npt.ArrayLike, denominators: npt.ArrayLike, seed: int = 0) -> Ratio:
    """Compares two settings that were measured in pairs.

    Args:
        numerators, denominators: as many of each, above 0, run by run; a pair shares its image and its moment.
        seed: of the resampling; the same values and seed give the same interval.
    """
    ratios = np.asarray(numerators, np.float64) / np.asarray(denominators, np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.median(ratios[drawn], axis=1), (tail, 100 - tail))
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))
