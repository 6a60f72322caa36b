"""Budgets chosen per image by kept score mass, against fixed budgets at the same average number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.accuracy.evaluation import MASS_SELECTORS
from benchmarks.accuracy.report import Evidence, table
from benchmarks.accuracy.statistics import Share

SHOWN = 0.0005  # half of the last digit in the table: less is not called above


@dataclass(frozen=True, slots=True)
class PerImage:
    """One threshold's outcome; `difference` is its accuracy less that of the best blind mix of two fixed budgets with the same average."""

    method: str
    split: int
    threshold: float
    average_keep: float
    accuracy: Share
    difference: Share


def per_image(e: Evidence, selector: int, split: int, ladder: Sequence[int], target: float) -> PerImage:
    """The largest threshold whose average number of kept tokens is at most `target`.

    Args:
        selector: index into MASS_SELECTORS.
        ladder: budgets to choose from, ascending.
    """
    out, name = e.outcomes, MASS_SELECTORS[selector].name
    places = [out.keeps.index(keep) for keep in ladder]
    masses = out.masses[:, out.splits.index(split), selector][:, places]
    right = np.stack([e.right(name, split, keep)[0] for keep in ladder])
    sizes = np.array(ladder)

    def choice(threshold: float) -> np.ndarray:
        reached = masses >= threshold
        chosen: np.ndarray = np.where(reached.any(1), reached.argmax(1), len(sizes) - 1)
        return chosen

    fitting = [t for t in np.unique(masses) if sizes[choice(t)].mean() <= target]
    threshold = float(max(fitting, default=0.0))
    chosen = choice(threshold)
    average = float(sizes[chosen].mean())
    mine = right[chosen[out.images], np.arange(len(out.images))].astype(np.float64)
    fixed = _mixed(right, sizes, average)
    return PerImage(name, split, threshold, average, e.bootstrap.share(mine), e.bootstrap.difference(mine, fixed))


def _mixed(right: np.ndarray, sizes: np.ndarray, average: float) -> np.ndarray:
    """[questions]: right answers of the best mix of two fixed budgets, given out blindly, that keeps `average` tokens."""
    mixes = []
    for low in np.flatnonzero(sizes <= average):
        for high in np.flatnonzero(sizes >= average):
            weight = (average - sizes[low]) / (sizes[high] - sizes[low]) if high != low else 0.0
            mixes.append((1 - weight) * right[low] + weight * right[high])
    best: np.ndarray = max(mixes, key=lambda mix: float(mix.mean()))
    return best


def markdown(e: Evidence, splits: Sequence[int]) -> str:
    """A table over selectors, splits and average budgets, and what it says."""
    rows, above = [], 0
    for split in splits:
        ladder = sorted(e.budgets(split))
        for selector in range(len(MASS_SELECTORS)):
            for target in ladder[1:-1]:
                found = per_image(e, selector, split, ladder, target)
                above += found.difference.low >= SHOWN
                d = found.difference
                rows.append([
                    f"`{found.method}`, K = {split}", f"{found.threshold:.3f}", f"{found.average_keep:.1f}", found.accuracy.percent(),
                    f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})",
                ])  # fmt: skip
    head = ["", "threshold of the kept mass", "tokens kept on average", "right, %", "less fixed budgets at that average, points"]
    verdict = f"Of {len(rows)} comparisons {above} lie above fixed budgets with their whole 95 % interval."
    return f"## Budgets per image\n\n{table(head, rows)}\n\n{verdict}\n"
