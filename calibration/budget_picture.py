"""Agreement (and accuracy) against FLOPs as a picture: lines for modes and splits, Pareto front, chosen setting. Knows no files."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from calibration import resampling
from calibration.grid import CONTROLS
from calibration.pareto import Measured, front

__all__ = ["draw_budget"]

WIDTH_INCHES, PANEL_INCHES, DOTS_PER_INCH = 8.0, 3.6, 110
COLOURS = ("#1f5a94", "#2e8b57", "#7a4fa3", "#b8860b", "#008b8b", "#8b3a62")
CONTROL_COLOURS = ("0.45", "0.65")
MARKERS = "osD^vPX*"  # one a split
CHOSEN = "#c4421a"


def draw_budget(rows: Sequence[Measured], chosen: Measured | None, title: str, unpruned_accuracy: float | None) -> bytes:
    """A PNG.

    Args:
        rows: all settings.
        unpruned_accuracy: a share, drawn as a line where there are labels.
    """
    panels: list[tuple[str, Callable[[Measured], resampling.Figure | None]]] = [
        ("agreement with the unpruned model, %", lambda r: r.agreement)
    ]
    if unpruned_accuracy is not None:
        panels.append(("accuracy, %", lambda r: r.accuracy))
    figure = Figure(figsize=(WIDTH_INCHES, PANEL_INCHES * len(panels) + 0.4), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)  # becomes the figure's own
    axes = [figure.add_subplot(len(panels), 1, number + 1) for number in range(len(panels))]
    for place, (label, value) in zip(axes, panels, strict=True):
        _lines(place, rows, value)
        _marks(place, rows, chosen, value)
        place.set_ylabel(label, fontsize=11)
        place.spines[["top", "right"]].set_visible(False)
        place.grid(color="0.9", linewidth=0.8)
        place.set_axisbelow(True)
    if unpruned_accuracy is not None:
        axes[-1].axhline(100 * unpruned_accuracy, color="0.3", linewidth=1, linestyle="--", label="unpruned")
    axes[0].set_title(title, fontsize=11, loc="left")
    axes[-1].set_xlabel("decoder prefill FLOPs, % of unpruned", fontsize=11)
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _lines(axes: Axes, rows: Sequence[Measured], value: Callable[[Measured], resampling.Figure | None]) -> None:
    modes = list(dict.fromkeys(row.setting.mode for row in sorted(rows, key=lambda row: (row.control, row.setting.mode))))
    own = [mode for mode in modes if mode not in CONTROLS]
    splits = sorted({row.setting.split_layer for row in rows})
    for mode in modes:
        colour = CONTROL_COLOURS[CONTROLS.index(mode)] if mode in CONTROLS else COLOURS[own.index(mode) % len(COLOURS)]
        for number, split in enumerate(splits):
            line = sorted(
                (row for row in rows if (row.setting.mode, row.setting.split_layer) == (mode, split)), key=lambda row: row.flops_share
            )
            found = [(row.flops_share, figure) for row in line if (figure := value(row)) is not None]
            costs = [100 * cost for cost, _ in found]
            axes.plot(
                costs, [100 * figure.mean for _, figure in found], color=colour, linewidth=1.4, marker=MARKERS[number % len(MARKERS)],
                markersize=4, linestyle=":" if mode in CONTROLS else "-", label=f"{mode}, split {split}",
            )  # fmt: skip
            if mode not in CONTROLS and all(figure.interval is not None for _, figure in found):
                bounds = [figure.interval or (figure.mean, figure.mean) for _, figure in found]
                low, high = ([100 * bound[side] for bound in bounds] for side in (0, 1))
                axes.fill_between(costs, low, high, color=colour, alpha=0.12, linewidth=0)


def _marks(
    axes: Axes, rows: Sequence[Measured], chosen: Measured | None, value: Callable[[Measured], resampling.Figure | None]
) -> None:  # fmt: skip
    best = [(row.flops_share, figure) for row in front(rows) if (figure := value(row)) is not None]
    axes.plot(
        [100 * cost for cost, _ in best], [100 * figure.mean for _, figure in best], color="0.2", linewidth=0.8, marker="o", markersize=9,
        markerfacecolor="none", zorder=4, label="Pareto front (agreement)",
    )  # fmt: skip
    figure = None if chosen is None else value(chosen)
    if chosen is not None and figure is not None:
        label = f"chosen: {chosen.setting.describe()}"
        axes.scatter([100 * chosen.flops_share], [100 * figure.mean], s=150, marker="*", color=CHOSEN, zorder=5, label=label)
