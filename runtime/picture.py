"""A picture of a selection: the image, its kept patches, and the entropy of every visual token as a heat map."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime.generation import Generation
from runtime.images import load_image
from runtime.pipeline import VisionLanguageModel
from runtime.prompt import RawImage

PANEL = 420
MARGIN = 16
CAPTION = 44
DROPPED = 0.22  # brightness of a dropped patch


def draw_selection(model: VisionLanguageModel, source: RawImage, result: Generation) -> Image.Image:
    """Three panels side by side: the image, kept patches (dropped ones darkened), entropy from low (dark) to high (light).

    Args:
        source: the prompt's first image.
        result: what `generate` returned for it.
    """
    image = load_image(source)
    scale = PANEL / max(image.size)
    shown = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
    count = model.manifest.geometry.visual_tokens
    side = int(count**0.5)
    boxes = [tuple(v * scale for v in model.prompts.image_processor.patch_box(i, (side, side), image.size)) for i in range(side * side)]
    kept = [i for i in result.kept_indices if i < count]
    panels = [
        (shown, "image"),
        (_kept_panel(shown, boxes, set(kept)), f"{len(kept)} of {count} visual tokens kept"),
        (_entropy_panel(shown, boxes, result.token_entropy), _entropy_caption(result.token_entropy)),
    ]
    font = ImageFont.load_default(15)
    canvas = Image.new("RGB", (MARGIN + (shown.width + MARGIN) * len(panels), shown.height + 2 * MARGIN + CAPTION), (250, 250, 250))
    draw = ImageDraw.Draw(canvas)
    for i, (panel, caption) in enumerate(panels):
        left = MARGIN + i * (shown.width + MARGIN)
        canvas.paste(panel, (left, MARGIN))
        draw.text((left, MARGIN + shown.height + 10), caption, fill=(40, 40, 40), font=font)
    return canvas


def _kept_panel(shown: Image.Image, boxes: list[tuple[float, ...]], kept: set[int]) -> Image.Image:
    pixels = np.asarray(shown, np.float32)
    light = np.full(pixels.shape[:2], DROPPED, np.float32)
    for i in kept:
        left, top, right, bottom = (round(v) for v in boxes[i])
        light[max(0, top) : bottom, max(0, left) : right] = 1.0
    panel = Image.fromarray((pixels * light[..., None]).astype(np.uint8))
    draw = ImageDraw.Draw(panel)
    for i in kept:
        draw.rectangle([round(v) for v in boxes[i]], outline=(255, 200, 40))
    return panel


def _entropy_panel(shown: Image.Image, boxes: list[tuple[float, ...]], entropy: np.ndarray | None) -> Image.Image:
    panel = Image.new("RGB", shown.size, (225, 225, 225))
    if entropy is None:
        return panel
    values = entropy[: len(boxes)]
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    draw = ImageDraw.Draw(panel)
    for box, value in zip(boxes, values, strict=False):
        draw.rectangle([round(v) for v in box], fill=_heat((value - low) / (high - low or 1.0)) if np.isfinite(value) else (255, 0, 255))
    return panel


def _entropy_caption(entropy: np.ndarray | None) -> str:
    if entropy is None or not np.isfinite(entropy).any():
        return "token entropy: nothing was scored"
    finite = entropy[np.isfinite(entropy)]
    return f"score from {finite.min():.4f} (dark) to {finite.max():.4f} (light)"


def _heat(level: float) -> tuple[int, int, int]:
    """0 to 1 -> dark violet over red to light yellow; brightness rises evenly, so that it also reads in grey."""
    stops = ((20, 11, 52), (101, 21, 110), (187, 55, 84), (249, 142, 9), (252, 255, 164))
    place = min(max(level, 0.0), 1.0) * (len(stops) - 1)
    i = min(int(place), len(stops) - 2)
    low, high = stops[i], stops[i + 1]
    red, green, blue = (round(low[c] + (high[c] - low[c]) * (place - i)) for c in range(3))
    return red, green, blue
