"""A picture of a selection: per image a row of three panels, the image, its kept patches, and every token's score as a heat map.

Several images (or a video's frames) make a contact sheet. Text is drawn in Pillow's own font, which holds Latin letters only.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from runtime.files import write_file
from runtime.generation import Generation
from runtime.patch_map import Box, Explanation, Patch, PatchMap, Sources, explanation_of, one_line
from runtime.pipeline import VisionLanguageModel
from runtime.state import PromptState

Pixels = npt.NDArray[np.float32]  # [H, W, 3], 0 to 255
Colour = tuple[int, int, int]

MARGIN = 18
GAP = 14
TITLE_GAP = 3
TEXT = 15  # pixels
LINE = 21
BAR = 12
LEGEND = 3 * LINE
PANEL, LARGE_PANEL = 420, 640  # pixels of one image's longer edge: the larger one where patches would be smaller than PATCH
PATCH = 16
MIN_COLUMN = 230  # pixels: narrower ones would not hold their caption
PAPER: Colour = (250, 250, 250)
INK: Colour = (30, 30, 34)
FRAME: Colour = (205, 205, 210)
FAINT: Colour = (100, 100, 108)
DROPPED = 0.26  # brightness of a dropped patch
OUTLINE: Colour = (255, 200, 40)  # of a kept patch, with a dark line inside, so that one of them stands out on any image
INSIDE: Colour = (25, 20, 0)
UNSEEN = 0.3  # how much is left of what the model did not see, the rest is paper
HEAT_SHARE = 0.62  # of the heat map's colour, the rest is the image in grey
LUMA = np.array((0.299, 0.587, 0.114), np.float32)
MIDDLE = 128  # grey
HEAT_STOPS: tuple[Colour, ...] = ((20, 11, 52), (101, 21, 110), (187, 55, 84), (249, 142, 9), (252, 255, 164))


def draw_selection(
    model: VisionLanguageModel, sources: Sources, result: Generation | PromptState, prompt: str | None = None
) -> Image.Image:
    """Draws what `generate` (or `prefill`) kept of a prompt's images.

    Args:
        sources: the prompt's images, in order: one, or a list.
        prompt: the question, written above.

    Raises:
        UsageError: the result is about other images, or its tokens form no square grid.
        InputError: an image cannot be read.
    """
    return draw(explanation_of(model, sources, result, prompt))


def draw(explanation: Explanation) -> Image.Image:
    """The picture of an explanation: a heading, a legend, one row per image."""
    font = ImageFont.load_default(TEXT)
    edge = _panel_edge(explanation.maps)
    sizes = [_fitted(map_.image, edge) for map_ in explanation.maps]
    column = max(MIN_COLUMN, *(width for width, _ in sizes))
    width = 2 * MARGIN + 3 * column + 2 * GAP
    heading = _heading(explanation, width - 2 * MARGIN, font)
    titles = [_wrapped(_row_title(explanation, map_), width - 2 * MARGIN, font) for map_ in explanation.maps]
    rows = sum(LINE * len(title) + TITLE_GAP + size[1] + GAP for title, size in zip(titles, sizes, strict=True))
    canvas = Image.new("RGB", (width, 2 * MARGIN + LINE * len(heading) + GAP + LEGEND + rows), PAPER)
    pen = ImageDraw.Draw(canvas)
    top = _write(pen, heading, MARGIN, MARGIN, INK, font) + GAP
    _draw_legend(canvas, explanation, top, column, font)
    top += LEGEND
    for map_, title, size in zip(explanation.maps, titles, sizes, strict=True):
        top = _write(pen, title, MARGIN, top, INK, font) + TITLE_GAP
        for i, panel in enumerate(panels(map_, size, explanation.score_range)):
            left = MARGIN + i * (column + GAP)
            pen.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=FRAME)
            canvas.paste(panel, (left, top))
        top += size[1] + GAP
    return canvas


def panels(map_: PatchMap, size: tuple[int, int], score_range: tuple[float, float] | None) -> tuple[Image.Image, Image.Image, Image.Image]:
    """The three panels of one image, `size` (width, height) pixels each: seen, kept and dropped, scores.

    Args:
        score_range: the scores of the darkest and the lightest colour; None where nothing was scored.
    """
    shown = map_.image.resize(size, Image.Resampling.LANCZOS)
    pixels = np.asarray(shown, np.float32)
    seen = np.zeros(pixels.shape[:2], bool)
    _fill(seen, _pixels(map_.window, size), True)
    return (
        _image_of(_faded(pixels, seen)),
        _kept_panel(map_, pixels, seen, size),
        _score_panel(map_, pixels, seen, size, score_range),
    )


def heat(level: float) -> Colour:
    """0 to 1 -> dark violet over red to light yellow; brightness rises evenly, so that it also reads in grey."""
    place = min(max(level, 0.0), 1.0) * (len(HEAT_STOPS) - 1)
    i = min(int(place), len(HEAT_STOPS) - 2)
    low, high = HEAT_STOPS[i], HEAT_STOPS[i + 1]
    red, green, blue = (round(low[c] + (high[c] - low[c]) * (place - i)) for c in range(3))
    return red, green, blue


def heat_of(patch: Patch, score_range: tuple[float, float]) -> Colour:
    """A scored patch's colour."""
    low, high = score_range
    return heat(((low if patch.score is None else patch.score) - low) / ((high - low) or 1.0))


def grey_contrast(grey: npt.NDArray[np.float32]) -> tuple[float, float]:
    """The middle of an image's greys and the factor that spreads them, since the heat map's colours leave little contrast."""
    dark, light = np.percentile(grey, (1, 99))
    return float(dark + light) / 2, float(230 / max(light - dark, 80.0))


def over_grey(colour: Colour) -> Colour:
    """How a colour of the heat map looks over the middle grey of an image: what the colour bar shows."""
    red, green, blue = (round(HEAT_SHARE * c + (1 - HEAT_SHARE) * MIDDLE) for c in colour)
    return red, green, blue


def save_picture(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Writes a PNG, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_file(path, buffer.getvalue())


# ------------------------------------------------------------ panels


def _kept_panel(map_: PatchMap, pixels: Pixels, seen: npt.NDArray[np.bool_], size: tuple[int, int]) -> Image.Image:
    light = np.full(pixels.shape[:2], DROPPED, np.float32)
    kept = [_pixels(patch.box, size) for patch in map_.patches if patch.kept and patch.placed]
    for box in kept:
        _fill(light, box, 1.0)
    panel = _image_of(_faded(pixels, seen, light[..., None]))
    pen = ImageDraw.Draw(panel)
    for left, top, right, bottom in kept:
        thick = 1 + min(right - left, bottom - top) // 40
        for inset, colour in ((0, OUTLINE), (thick, INSIDE)):
            edges = left + inset, top + inset, right - 1 - inset, bottom - 1 - inset
            if min(right - left, bottom - top) >= 10 * inset:  # a small patch has room for one line only
                pen.rectangle(edges, outline=colour, width=thick if inset == 0 else 1)
    return panel


def _score_panel(
    map_: PatchMap, pixels: Pixels, seen: npt.NDArray[np.bool_], size: tuple[int, int], score_range: tuple[float, float] | None
) -> Image.Image:
    if score_range is None:
        return _nothing_scored(size)
    grey = pixels @ LUMA
    middle, gain = grey_contrast(grey[seen])
    blended = np.repeat(((grey - middle) * gain + MIDDLE).clip(0, 255)[..., None], 3, axis=2)
    for patch in map_.patches:
        if patch.placed and patch.score is not None:
            left, top, right, bottom = _pixels(patch.box, size)
            spot = blended[top:bottom, left:right]
            spot *= 1 - HEAT_SHARE
            spot += np.array(heat_of(patch, score_range), np.float32) * HEAT_SHARE
    panel = _image_of(_faded(blended, seen))
    pen = ImageDraw.Draw(panel)
    for patch in map_.patches:
        if patch.placed and patch.score is None:  # crossed out
            left, top, right, bottom = _pixels(patch.box, size)
            pen.line((left, top, right - 1, bottom - 1), fill=INK)
            pen.line((left, bottom - 1, right - 1, top), fill=INK)
    return panel


def _nothing_scored(size: tuple[int, int]) -> Image.Image:
    panel = Image.new("RGB", size, (228, 228, 230))
    if size[0] >= 150 and size[1] >= 2 * LINE:
        pen = ImageDraw.Draw(panel)
        pen.text((size[0] / 2, size[1] / 2), "nothing was scored", fill=INK, font=ImageFont.load_default(TEXT), anchor="mm")
    return panel


def _faded(pixels: Pixels, seen: npt.NDArray[np.bool_], light: Pixels | float = 1.0) -> Pixels:
    """What the model saw in its `light`; the rest washed out and hatched."""
    rows, columns = np.indices(seen.shape)
    hatch = np.where((rows + columns) % 12 < 2, 0.62, 1.0)[..., None]
    pale = (pixels * UNSEEN + np.array(PAPER, np.float32) * (1 - UNSEEN)) * hatch
    return np.where(seen[..., None], pixels * light, pale).astype(np.float32)


def _image_of(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box in whole pixels of a panel, at least one pixel each way; neighbours share no pixel where there are enough."""
    left, top = min(round(box[0] * size[0]), size[0] - 1), min(round(box[1] * size[1]), size[1] - 1)
    return left, top, max(left + 1, round(box[2] * size[0])), max(top + 1, round(box[3] * size[1]))


def _fill(pixels: npt.NDArray[np.generic], box: tuple[int, int, int, int], value: float) -> None:
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = value


# ------------------------------------------------------------ text and legend


def _heading(explanation: Explanation, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    question = [] if explanation.prompt is None else _wrapped(f"Question: {one_line(explanation.prompt, 300)}", width, font)
    answer = [] if explanation.answer is None else _wrapped(f"Answer: {one_line(explanation.answer, 300)}", width, font)
    return [*question, *answer, *_wrapped(f"{explanation.model}: {explanation.run}", width, font)]


def _row_title(explanation: Explanation, map_: PatchMap) -> str:
    count = f"{map_.kept} of {len(map_.tokens)} visual tokens kept"
    number = f"{explanation.maps.index(map_) + 1}. " if len(explanation.maps) > 1 else ""
    size = f"{map_.original_size[0]} x {map_.original_size[1]}"
    return "; ".join([f"{number}{one_line(map_.name, 60)} ({size}): {count}", *map_.notes])


def _draw_legend(
    canvas: Image.Image, explanation: Explanation, top: int, column: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    """What the three columns show, and the colour bar with its numbers."""
    pen = ImageDraw.Draw(canvas)
    lefts = [MARGIN + i * (column + GAP) for i in range(3)]
    cropped = any(map_.cropped for map_ in explanation.maps)
    _write(pen, ["image", *(["hatched: not seen by the model"] if cropped else [])], lefts[0], top, FAINT, font)
    _write(pen, ["kept: outlined", "dropped: dark"], lefts[1], top, FAINT, font)
    if explanation.score_range is None:
        _write(
            pen, ["score: none", "no token was to be dropped" if explanation.all_kept else "nothing was scored"], lefts[2], top, FAINT, font
        )
        return
    low, high = explanation.score_range
    _write(pen, [explanation.score_name], lefts[2], top, FAINT, font)
    bar_top = top + LINE
    for x in range(column):
        pen.line((lefts[2] + x, bar_top, lefts[2] + x, bar_top + BAR), fill=over_grey(heat(x / (column - 1))))
    pen.text((lefts[2], bar_top + BAR + 3), f"{low:.4f}", fill=INK, font=font)
    pen.text((lefts[2] + column, bar_top + BAR + 3), f"{high:.4f}", fill=INK, font=font, anchor="ra")
    if explanation.lowest_kept is not None and high > low:
        x = lefts[2] + round((explanation.lowest_kept - low) / (high - low) * (column - 1))
        pen.line((x, bar_top - 3, x, bar_top + BAR + 3), fill=INK, width=2)
        middle = f"kept from {explanation.lowest_kept:.4f}"
        pen.text((lefts[2] + column / 2, bar_top + BAR + 3), middle, fill=INK, font=font, anchor="ma")


def _write(
    pen: ImageDraw.ImageDraw, lines: list[str], left: int, top: int, colour: Colour, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> int:
    """Writes lines one below the other; returns where the next one would begin."""
    for line in lines:
        pen.text((left, top), line, fill=colour, font=font)
        top += LINE
    return top


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces, or inside a word that is longer than a line."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            lines += [""] if font.getlength(lines[-1] + letter) > width else []
            lines[-1] += letter
    return lines


def _panel_edge(maps: Sequence[PatchMap]) -> int:
    """Pixels of a panel's longer edge: smaller the more images there are, but larger for one of many patches."""
    if len(maps) > 1:
        return 320 if len(maps) == 2 else max(170, min(240, 960 // len(maps)))
    along = 0 if maps[0].image.width >= maps[0].image.height else 1
    share = max(patch.box[along + 2] - patch.box[along] for patch in maps[0].patches)  # of the longer edge; the same for all inside
    return max(PANEL, min(LARGE_PANEL, math.ceil(PATCH / share)))


def _fitted(image: Image.Image, edge: int) -> tuple[int, int]:
    scale = edge / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))
