"""A selection as one self-contained HTML page: it needs no network, no fonts and, except for the slider, no script.

Texts from outside (prompt, answer, file names) pass Jinja's autoescaping, data for the script its `tojson`; a content security policy
forbids the page to load anything.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from runtime.patch_map import Explanation, PatchMap
from runtime.picture import HEAT_SHARE, HEAT_STOPS, LUMA, grey_contrast, heat_of, over_grey
from runtime.picture_page import SCRIPT, STYLE, TEMPLATE

UNITS = 1000.0  # width of a drawing's coordinates, so that rounding them to a tenth is exact enough
FINE_SIDE = 12  # from more patches in a row on, outlines are thinner
INSET = 3.0  # units that the outline of a kept patch lies inside it
JPEG_QUALITY = 88
PNG_PIXELS = 300_000  # an image of fewer stays exact where that takes few bytes
PNG_BYTES = 250_000


def page(explanation: Explanation) -> str:
    """The page's text, UTF-8 when written to a file. All images are inside, so it takes as many bytes as they do.

    Args:
        explanation: what `runtime.patch_map.explanation_of` gives.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(
        e=explanation,
        style=STYLE,
        script=SCRIPT,
        images=[_image(explanation, map_) for map_ in explanation.maps],
        gradient=", ".join(f"rgb{over_grey(stop)}" for stop in HEAT_STOPS),
        heat_share=HEAT_SHARE,
        cut=_share_of_range(explanation),
        count=len(explanation.tokens),
        data={"kept": explanation.kept, "ranked": explanation.by_rank, "images": [_data(map_) for map_ in explanation.maps]},
    )


def _image(explanation: Explanation, map_: PatchMap) -> dict[str, Any]:
    """What the template needs of one image; coordinates in units of `UNITS` to its width."""
    height = UNITS * map_.image.height / map_.image.width
    cells = []
    if explanation.score_range is not None:
        for place, patch in enumerate(map_.patches):
            if patch.placed:
                colour = None if patch.score is None else "#{:02x}{:02x}{:02x}".format(*heat_of(patch, explanation.score_range))
                cells.append({"box": _units(patch.box, height), "colour": colour, "text": describe(explanation, map_, place)})
    kept = [_units(p.box, height) for p in map_.patches if p.placed and p.kept]
    dropped = [_units(p.box, height) for p in map_.patches if p.placed and not p.kept]
    return {
        "map": map_,
        "uri": data_uri(map_.image),
        "height": round(height, 1),
        "fine": map_.side > FINE_SIDE,
        "grey": _grey_filter(map_.image),
        "cells": cells,
        "kept_path": "".join(_rectangle(box, INSET) for box in kept),
        "dropped_path": "".join(_rectangle(box, 0.0) for box in dropped),
        "unseen_path": f"M-9 -9H{UNITS + 9:g}V{height + 9:.1f}H-9z" + _rectangle(_units(map_.window, height), 0.0) if map_.cropped else "",
    }


def describe(explanation: Explanation, map_: PatchMap, place: int) -> str:
    """One patch in words."""
    patch = map_.patches[place]
    score = "not scored" if patch.score is None else f"score {patch.score:.4f}"
    rank = "" if patch.rank is None else f", rank {patch.rank + 1} of {len(explanation.tokens)}"
    row, column = divmod(place, map_.side)
    return f"token {patch.token} (row {row + 1}, column {column + 1}): {score}{rank}, {'kept' if patch.kept else 'dropped'}"


def data_uri(image: Image.Image) -> str:
    """The image itself as a URI: PNG where that is small, otherwise JPEG."""
    kind, data = "png", _encoded(image, "PNG") if image.width * image.height <= PNG_PIXELS else b""
    if not 0 < len(data) <= PNG_BYTES:
        kind, data = "jpeg", _encoded(image, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _grey_filter(image: Image.Image) -> str:
    """CSS that turns an image into the greys under its heat map: (grey - middle) * gain + 1/2, in two steps that clip nothing more."""
    middle, gain = grey_contrast(np.asarray(image.resize((min(64, image.width), min(64, image.height))), np.float32) @ LUMA)
    middle = max(middle / 255, 0.02)
    return f"grayscale(1) brightness({0.5 / middle:.3f}) contrast({2 * gain * middle:.3f})"


def _data(map_: PatchMap) -> dict[str, Any]:
    """What the script needs of one image: boxes [left, top, right, bottom] (null: in the padding), tokens, scores, ranks, kept."""
    height = UNITS * map_.image.height / map_.image.width
    return {
        "side": map_.side,
        "first": map_.patches[0].token,
        "boxes": [_units(p.box, height) if p.placed else None for p in map_.patches],
        "scores": [None if p.score is None else round(p.score, 6) for p in map_.patches],
        "ranks": [p.rank for p in map_.patches],
        "kept": [int(p.kept) for p in map_.patches],
        "classRank": None if map_.class_token is None else map_.class_token.rank,
        "keptTokens": map_.kept,
    }


def _units(box: Sequence[float], height: float) -> list[float]:
    return [round(v * edge, 1) for v, edge in zip(box, (UNITS, height, UNITS, height), strict=True)]


def _rectangle(box: Sequence[float], inset: float) -> str:
    """A rectangle as part of an SVG path."""
    inset = min(inset, (box[2] - box[0]) / 4, (box[3] - box[1]) / 4)
    left, top, width, height = box[0] + inset, box[1] + inset, box[2] - box[0] - 2 * inset, box[3] - box[1] - 2 * inset
    return f"M{left:.5g} {top:.5g}h{width:.5g}v{height:.5g}h-{width:.5g}z"


def _share_of_range(explanation: Explanation) -> float | None:
    """Where the lowest kept score lies on the colour bar, in percent of it."""
    if explanation.score_range is None or explanation.lowest_kept is None:
        return None
    low, high = explanation.score_range
    return round(100 * (explanation.lowest_kept - low) / (high - low), 1) if high > low else None
