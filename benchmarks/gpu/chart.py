"""A summary as a picture: where the time to the first token goes, and how much of the FLOPs saved is time saved."""

from __future__ import annotations

from typing import IO, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.gpu.latency import STAGES

# Okabe and Ito's palette: told apart without colour vision too
COLOURS = {
    "preprocess": "#999999", "vision": "#56B4E9", "embed": "#F0E442", "pre_ecl": "#0072B2", "score": "#D55E00", "post_ecl": "#009E73",
}  # fmt: skip
LINES = {"cpu": ("#000000", "x"), "cuda": ("#0072B2", "o"), "tensorrt": ("#D55E00", "s"), "tensorrt_rtx": ("#009E73", "^")}


def draw(gathered: dict[str, Any], target: IO[bytes]) -> None:
    """Two panels, as PNG."""
    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _stages(left, gathered["latency"])
    _realised(right, gathered["latency"])
    note = f"{gathered['note']}\n" if "note" in gathered else ""
    figure.suptitle(f"{note}{gathered['device']}, {gathered['date'][:10]}", fontsize=11)
    figure.savefig(target, format="png", dpi=110)


def _stages(axes: Axes, latency: dict[str, Any]) -> None:
    """Medians of the stages, one bar for each backend and budget; they need not add up to the first token's median."""
    labels = [f"{backend}\nkeep {keep}" for backend, found in latency.items() for keep in found["times_ms"]]
    bottoms = [0.0] * len(labels)
    for stage in STAGES:
        heights = [times[stage]["median_ms"] for found in latency.values() for times in found["times_ms"].values()]
        axes.bar(range(len(labels)), heights, bottom=bottoms, color=COLOURS[stage], label=stage, width=0.7)
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylabel("milliseconds, medians of the stages")
    axes.set_title("to the first token")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.grid(axis="y", alpha=0.25)


def _realised(axes: Axes, latency: dict[str, Any]) -> None:
    """The decoder's prefill: times as fast against times fewer FLOPs."""
    highest = 1.0
    for backend, found in latency.items():
        colour, marker = LINES[backend]
        rows = list(found["against_all"].values())
        flops, speed = [r["flops_ratio"] for r in rows], [r["decoder"]["median"] for r in rows]
        bounds = [
            [r["decoder"]["median"] - r["decoder"]["low"] for r in rows],
            [r["decoder"]["high"] - r["decoder"]["median"] for r in rows],
        ]
        axes.errorbar(flops, speed, yerr=bounds, color=colour, marker=marker, label=backend, linewidth=1.4, elinewidth=0.7, markersize=5)
        for keep, x, y in zip(found["against_all"], flops, speed, strict=True):
            axes.annotate(f"keep {keep}", (x, y), textcoords="offset points", xytext=(6, -10), fontsize=8)
        highest = max(highest, *flops)
    axes.plot([1, highest], [1, highest], color="#BBBBBB", linewidth=1, label="as fast as FLOPs are fewer")
    axes.set_xlabel("FLOPs of the decoder's prefill, keep all / keep some")
    axes.set_ylabel("time, keep all / keep some")
    axes.set_title("decoder prefill")
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(alpha=0.25)
