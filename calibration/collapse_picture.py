"""The curve of entropies as a picture: mean and spread over the layers, the drop at each, and the chosen layer. Knows no files."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from calibration.collapse import Collapse

WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 8.0, 4.6, 110
CURVE, DROP, CHOSEN = "#1f5a94", "#9fb8d1", "#c4421a"


def draw_collapse(found: Collapse, split_layer: int, title: str) -> bytes:
    """A PNG: above, S over the layer index with its standard deviation over images; below, the drop at each index.

    Args:
        split_layer: K, marked; where it was given by hand the rule's own layer is marked too.
    """
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)  # becomes the figure's own
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _entropy(above, found)
    _drops(below, found, split_layer)
    for axes in (above, below):
        axes.axvline(split_layer, color=CHOSEN, linewidth=1.5, label=f"split K = {split_layer}")
        if found.layer != split_layer:
            axes.axvline(found.layer, color=CHOSEN, linewidth=1.5, linestyle=":", label=f"the rule's layer, {found.layer}")
        axes.axvspan(
            found.candidates + 0.5, len(found.mean) - 0.5, facecolor="0.93", edgecolor="0.75", linewidth=0.8, zorder=0, label="not searched"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.88", linewidth=0.8)
        axes.set_axisbelow(True)
    below.set_xlim(-0.5, len(found.mean) - 0.5)
    below.xaxis.get_major_locator().set_params(integer=True)
    above.set_title(title, fontsize=11, loc="left")
    above.legend(fontsize=9, frameon=False, loc="best")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _entropy(axes: Axes, found: Collapse) -> None:
    index, mean, std = np.arange(len(found.mean)), np.array(found.mean), np.array(found.std)
    axes.plot(index, mean, color=CURVE, linewidth=2, marker="o", markersize=4, label="mean over images")
    if found.images > 1:
        axes.fill_between(index, mean - std, mean + std, color=CURVE, alpha=0.22, linewidth=0, label="± 1 standard deviation")
    axes.set_ylabel("matrix entropy S", fontsize=11)


def _drops(axes: Axes, found: Collapse, split_layer: int) -> None:
    index = np.arange(1, len(found.mean))
    axes.bar(index, found.drops, width=0.7, color=[CHOSEN if layer == split_layer else DROP for layer in index])
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_ylabel("drop to here", fontsize=11)
    axes.set_xlabel("layer index: what layer l is given", fontsize=11)
