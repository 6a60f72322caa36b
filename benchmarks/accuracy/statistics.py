"""Shares of right answers with intervals: questions about one image are not independent, so images are drawn anew, whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibration.resampling import Resampler


@dataclass(frozen=True, slots=True)
class Share:
    """A mean with its 95 % interval, as shares of 1; with one image alone the interval is the mean."""

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
        self._questions = np.bincount(self._image).astype(np.float64)
        self._resampler = Resampler.of(len(self._questions), seed)

    def share(self, values: np.ndarray) -> Share:
        """Mean of values [questions], or [repetitions, questions] (random seeds, say)."""
        return self._ratio(self._by_image(values), self._questions)

    def ratio(self, values: np.ndarray, baseline: np.ndarray) -> Share:
        """Mean of values over mean of a baseline on the same questions: accuracy retained."""
        return self._ratio(self._by_image(values), self._by_image(baseline))

    def difference(self, values: np.ndarray, others: np.ndarray) -> Share:
        """Mean of the difference of two settings on the same questions."""
        return self._ratio(self._by_image(values) - self._by_image(others), self._questions)

    def _by_image(self, values: np.ndarray) -> np.ndarray:
        """Sums over each image's questions."""
        flat = np.atleast_2d(np.asarray(values, np.float64)).mean(0)
        return np.bincount(self._image, flat, minlength=len(self._questions))

    def _ratio(self, above: np.ndarray, below: np.ndarray) -> Share:
        figure = self._resampler.ratio(above, below)
        low, high = figure.interval or (figure.mean, figure.mean)
        return Share(figure.mean, low, high)
