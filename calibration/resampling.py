"""Means with intervals by bootstrap over images: an image with all its questions is drawn or not, so that they stay together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Figure", "Resampler", "bounds"]

Floats = npt.NDArray[np.float64]
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean and its 95 % interval; None where there is one image alone, which has none."""

    mean: float
    interval: tuple[float, float] | None

    @property
    def sure(self) -> float:
        """The interval's lower bound; the mean where there is no interval."""
        return self.mean if self.interval is None else self.interval[0]


@dataclass(frozen=True, slots=True, eq=False)
class Resampler:
    """How often each image is drawn in each resample: `weights` float64 [RESAMPLES, images]; None with one image."""

    weights: Floats | None

    @classmethod
    def of(cls, images: int, seed: int) -> Resampler:
        """The same number of images and seed give the same resamples."""
        if images < 2:
            return cls(None)
        drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), RESAMPLES)
        return cls(drawn.astype(np.float64))

    def ratio(self, numerators: npt.ArrayLike, denominators: npt.ArrayLike) -> Figure:
        """Sum of the numerators over sum of the denominators, [images] each.

        A difference of two settings is the ratio of the numerators' difference: its resamples are paired.
        """
        above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
        mean = float(above.sum() / below.sum())
        if self.weights is None:
            return Figure(mean, None)
        drawn = self.weights @ below
        used = drawn > 0  # a resample without a single label says nothing about labels
        return Figure(mean, bounds((self.weights @ above)[used] / drawn[used]))


def bounds(values: Floats, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentile interval of resampled values."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(values, (tail, 100 - tail))
    return float(low), float(high)
