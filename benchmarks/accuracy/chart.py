"""Accuracy retained against the decoder's FLOPs, as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.accuracy.report import GOAL_RETAINED, GOAL_SAVED, Evidence
from benchmarks.accuracy.settings import equal_cost

# Okabe and Ito's palette: told apart without colour vision too
STYLES = {
    "dpp": ("#D55E00", "o", "-"), "trace": ("#0072B2", "s", "-"), "row": ("#56B4E9", "s", "--"), "raw": ("#009E73", "s", ":"),
    "random": ("#666666", "x", "--"), "uniform": ("#666666", "+", ":"), "energy-high": ("#CC79A7", "v", ":"),
    "fastv": ("#E69F00", "D", "-"), "divprune": ("#000000", "^", "-"), "cdpruner": ("#000000", "^", ":"),
}  # fmt: skip


def draw(evidence: Evidence, path: Path) -> None:
    """Two panels: every method at the neighbours' split, and the best three at every split."""
    figure = Figure(figsize=(12.5, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    split = evidence.neighbour_split
    pairs = list(equal_cost(evidence.visual_tokens, evidence.decoder.layers, split, evidence.extra_keeps))
    for method in STYLES:
        early = method in ("divprune", "cdpruner")
        points = [
            (evidence.flops_share(0, e) if early else evidence.flops_share(split, k), 0 if early else split, e if early else k)
            for k, e in pairs
        ]
        _line(left, evidence, method, points, method + (", before layer 0" if early else ""))
    left.set_title(f"pruned before layer {split} of {evidence.decoder.layers}, and neighbours at their own place")
    for method in ("dpp", "random", "trace"):
        for number, k in enumerate(evidence.outcomes.splits):
            points = [(evidence.flops_share(k, keep), k, keep) for keep in evidence.budgets(k)]
            shade = 0.3 + 0.7 * number / max(1, len(evidence.outcomes.splits) - 1)
            _line(
                right,
                evidence,
                method,
                points,
                f"{method}, K = {k}" if k in (evidence.outcomes.splits[0], evidence.outcomes.splits[-1]) else "",
                shade,
            )
    right.set_title("each split layer K (darker: later)")
    for axes in (left, right):
        axes.axvline(100 * (1 - GOAL_SAVED), color="#BBBBBB", linewidth=1)
        axes.axhline(100 * GOAL_RETAINED, color="#BBBBBB", linewidth=1)
        axes.set_xlabel("decoder prefill FLOPs of the visual tokens, % of unpruned")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="lower right")
        axes.set_xlim(0, 100)
    left.set_ylabel("accuracy retained, % of unpruned")
    left.annotate(
        f"the paper's {GOAL_RETAINED:.0%} at {GOAL_SAVED:.1%} fewer",
        (100 * (1 - GOAL_SAVED), 101.2),
        fontsize=8,
        color="#777777",
        ha="center",
    )
    figure.savefig(path, dpi=110)


def _line(axes: Axes, evidence: Evidence, method: str, points: list[tuple[float, int, int]], label: str, alpha: float = 1.0) -> None:
    colour, marker, dash = STYLES[method]
    shares = [evidence.retained(method, split, keep) for _, split, keep in points]
    axes.errorbar(
        [100 * x for x, _, _ in points], [100 * s.mean for s in shares],
        yerr=[[100 * (s.mean - s.low) for s in shares], [100 * (s.high - s.mean) for s in shares]],
        color=colour, marker=marker, linestyle=dash, alpha=alpha, label=label or None, markersize=5, linewidth=1.4, elinewidth=0.7,
    )  # fmt: skip
