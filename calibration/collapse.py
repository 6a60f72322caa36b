"""Where the entropy collapses: one layer out of curves S_0, S_1, ..., one curve for each image, and how sure that is.

Index l of a curve is what layer l is given (its input, or a projection of it), so a drop S_{l-1} - S_l is what layer l-1 does. The
split is K = l for every tensor: layer l-1 = K-1, whose queries the score reads, is the one that collapses, the last to be given tokens of
high entropy, and layer K is the first to be given the collapsed ones. Candidates are 1 <= l <= L/2.

Rules, each on the mean curve:
    largest-drop    argmax of S_{l-1} - S_l; of equal ones the first
    relative-drop   argmax of (S_{l-1} - S_l) / S_{l-1}
    first-drop      the first l whose S_{l-1} - S_l is above a threshold

Knows nothing about models or images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from runtime.errors import UsageError

__all__ = ["RULES", "Collapse", "CollapseRule", "find_collapse"]

Floats = npt.NDArray[np.float64]
RuleName = Literal["largest-drop", "relative-drop", "first-drop"]
RULES: tuple[RuleName, ...] = ("largest-drop", "relative-drop", "first-drop")
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class CollapseRule:
    """A rule's name; `threshold` is first-drop's, in units of S."""

    name: RuleName = "largest-drop"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if (self.threshold is not None) != (self.name == "first-drop"):
            need = "needs --threshold, a drop of S" if self.name == "first-drop" else "takes no --threshold"
            raise UsageError(f"--rule {self.name} {need}: a threshold belongs to first-drop")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise UsageError(f"--threshold {self.threshold:g} is out of range: S and its drops are within 0 and 1")

    def drops(self, curves: Floats) -> Floats:
        """What the rule compares: [..., points - 1] of [..., points]; entry l-1 belongs to l."""
        before, drops = curves[..., :-1], curves[..., :-1] - curves[..., 1:]
        if self.name != "relative-drop":
            return drops
        return np.divide(drops, before, out=np.zeros_like(drops), where=before > 0)

    def choose(self, drops: Floats) -> int | None:
        """The layer chosen by drops [candidates]; None where none is above first-drop's threshold."""
        if self.threshold is None:
            return int(drops.argmax()) + 1
        above = np.flatnonzero(drops > self.threshold)
        return int(above[0]) + 1 if len(above) else None

    def margin(self, drops: Floats, layer: int) -> float:
        """How far the drops are from another choice than `layer`; negative where they would choose another. Infinite where there is none.

        For first-drop: the smaller of the chosen drop's excess over the threshold and what every earlier drop lacks to it.
        """
        chosen, others = drops[layer - 1], np.delete(drops, layer - 1)
        if self.threshold is None:
            return float(chosen - others.max()) if len(others) else np.inf
        return float(min(chosen - self.threshold, *(self.threshold - drops[: layer - 1])) if layer > 1 else chosen - self.threshold)


@dataclass(frozen=True, slots=True)
class Collapse:
    """The chosen layer and its evidence.

    Attributes:
        layer: the entropy collapse layer l, which is K.
        runner_up: the other candidate with the largest value; None where there is one candidate alone.
        margin: see `CollapseRule.margin`; None where there is no other candidate.
        margin_interval: 95 % interval of the margin of `layer`, by bootstrap over images; None with one image.
        resample_share: share of the resamples that choose the same layer; None with one image.
        image_share: share of the images whose own curve chooses it.
        mean, std: of S for each index l, over images (the sample's standard deviation; zeros with one image).
        drops: S_{l-1} - S_l of the mean curve, for l = 1, 2, ...; entry 0 belongs to l = 1.
        candidates: the largest l that may be chosen, L // 2.
        images: how many curves there are.
    """

    layer: int
    runner_up: int | None
    margin: float | None
    margin_interval: tuple[float, float] | None
    resample_share: float | None
    image_share: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    drops: tuple[float, ...]
    candidates: int
    images: int

    @property
    def falls(self) -> bool:
        """Whether the entropy falls at the chosen layer; where it does not, no candidate's does."""
        return self.drops[self.layer - 1] > 0

    @property
    def recovers_at(self) -> int | None:
        """The first index after the chosen layer where the mean is back at its level before the drop; None where the drop lasts."""
        level = self.mean[self.layer - 1]
        return next((index for index in range(self.layer + 1, len(self.mean)) if self.mean[index] >= level), None)


def find_collapse(curves: npt.ArrayLike, layers: int, rule: CollapseRule, seed: int = 0) -> Collapse:
    """Finds the collapse layer.

    Args:
        curves: S of [images, points], in an order that does not depend on chance: sums and resamples follow it.
        layers: L, of which the first half is searched.
        rule: how the layer is chosen.
        seed: of the bootstrap.

    Raises:
        UsageError: no candidate drops by more than first-drop's threshold.
    """
    curves = np.asarray(curves, np.float64)
    count, last = len(curves), layers // 2
    if not count or curves.shape[1] <= last:
        raise UsageError(f"curves of shape {list(curves.shape)} do not reach layer {last}, half of {layers}: give [images, {layers}]")
    mean = curves.mean(axis=0)
    scores = rule.drops(mean)[:last]
    layer = rule.choose(scores)
    if layer is None:
        raise UsageError(
            f"no layer of 1..{last} drops by more than --threshold {rule.threshold:g}; the largest drop is {scores.max():.4g}, "
            f"at layer {int(scores.argmax()) + 1}: lower the threshold, or take another --rule"
        )
    others = [other for other in range(1, last + 1) if other != layer]
    shares, interval = _bootstrap(curves, last, rule, layer, seed) if count > 1 else (None, None)
    chosen = [rule.choose(rule.drops(curve)[:last]) for curve in curves]
    return Collapse(
        layer=layer, runner_up=max(others, key=lambda other: scores[other - 1]) if others else None,
        margin=rule.margin(scores, layer) if others else None, margin_interval=interval if others else None, resample_share=shares,
        image_share=chosen.count(layer) / count, mean=tuple(mean.tolist()),
        std=tuple((curves.std(axis=0, ddof=1) if count > 1 else np.zeros_like(mean)).tolist()),
        drops=tuple((mean[:-1] - mean[1:]).tolist()), candidates=last, images=count,
    )  # fmt: skip


def _bootstrap(curves: Floats, last: int, rule: CollapseRule, layer: int, seed: int) -> tuple[float, tuple[float, float]]:
    """The share of resamples that choose `layer`, and the 95 % interval of its margin."""
    rng, count = np.random.default_rng(seed), len(curves)
    same, margins = 0, np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        weights = np.bincount(rng.integers(0, count, count), minlength=count)
        scores = rule.drops(weights @ curves / count)[:last]
        same += rule.choose(scores) == layer
        margins[index] = rule.margin(scores, layer)
    low, high = np.percentile(margins, (2.5, 97.5)) if np.isfinite(margins).all() else (np.inf, np.inf)
    return same / RESAMPLES, (float(low), float(high))
