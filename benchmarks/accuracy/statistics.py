"""Shares of right answers with intervals: questions about one image are not independent, so images are drawn anew, whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Share:
    """A mean with its 95 % interval, as shares of 1."""

    mean: float
    low: float
    high: float

    def percent(self) -> str:
        return f"{100 * self.mean:.1f} ({100 * self.low:.1f}-{100 * self.high:.1f})"


class ImageBootstrap:
    """Means over questions, resampled over their images.

    Args:
        images: int64 [questions], the image of each question.
        seed: the same seed resamples the same images for every mean, so that differences are paired.
    """

    def __init__(self, images: np.ndarray, seed: int = 0) -> None:
        _, self._image = np.unique(images, return_inverse=True)
        count = int(self._image.max()) + 1
        drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
        self._weights = drawn.astype(np.float64)  # [resamples, images]: how often each is drawn
        self._size = np.bincount(self._image, minlength=count).astype(np.float64)

    def share(self, values: np.ndarray) -> Share:
        """Mean of values [questions], or [repetitions, questions] (random seeds, say), with its interval."""
        flat = np.atleast_2d(np.asarray(values, np.float64)).mean(0)
        sums = np.bincount(self._image, flat, minlength=len(self._size))
        means = (self._weights @ sums) / (self._weights @ self._size)
        low, high = np.percentile(means, (2.5, 97.5))
        return Share(float(flat.mean()), float(low), float(high))

    def ratio(self, values: np.ndarray, baseline: np.ndarray) -> Share:
        """Mean of values over mean of a baseline on the same questions: accuracy retained."""
        sums = [
            np.bincount(self._image, np.atleast_2d(np.asarray(v, np.float64)).mean(0), minlength=len(self._size))
            for v in (values, baseline)
        ]
        means = (self._weights @ sums[0]) / (self._weights @ sums[1])
        low, high = np.percentile(means, (2.5, 97.5))
        return Share(float(sums[0].sum() / sums[1].sum()), float(low), float(high))

    def difference(self, values: np.ndarray, others: np.ndarray) -> Share:
        """Mean of the difference of two settings on the same questions."""
        one, two = (np.atleast_2d(np.asarray(v, np.float64)).mean(0) for v in (values, others))
        return self.share(one - two)
