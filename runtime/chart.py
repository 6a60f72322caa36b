"""A profile as a picture: the stages up to the first token as stacked bars, further tokens below, ratios as text."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from runtime.profile_report import STAGES, Profile, Setting
from runtime.profile_statistics import Distribution, Ratio

CHART_SIZE = (1280, 800)
Colour = tuple[int, int, int]
Segments = tuple[tuple[float, Colour], ...]

# Okabe and Ito's palette: told apart without colour vision too
_COLOURS: dict[str, Colour] = {
    "preprocess": (153, 153, 153), "vision": (86, 180, 233), "embed": (240, 228, 66), "pre_ecl": (0, 114, 178),
    "score": (204, 60, 0), "post_ecl": (0, 158, 115), "rest": (204, 121, 167),
}  # fmt: skip
_SINGLE: Colour = (120, 130, 150)
_INK, _SOFT, _GRID, _PAPER = (30, 30, 34), (105, 105, 112), (226, 226, 230), (255, 255, 255)
_LEFT, _RIGHT, _BAR = 250, 60, 38


@dataclass(frozen=True, slots=True)
class _Bar:
    """One bar: its parts from the left in milliseconds, and the whole's distribution for end, whisker and number."""

    label: str
    segments: Segments
    whole: Distribution


def draw_profile(profile: Profile) -> Image.Image:
    """The chart, RGB, CHART_SIZE."""
    canvas = Image.new("RGB", CHART_SIZE, _PAPER)
    draw = ImageDraw.Draw(canvas)
    s = profile.subject
    _text(draw, (40, 26), f"{s.model}: latency with {s.keep} of {s.visual_tokens} visual tokens kept after layer {s.split_layer - 1}", 24)
    prompt = f"{s.visual_tokens} visual + {s.text_tokens} text tokens, {s.new_tokens} generated"
    images = "a new image each" if s.distinct_images == profile.pairs else f"{s.distinct_images} images"
    _text(draw, (40, 60), f"medians of {profile.pairs} interleaved pairs, {images}; whiskers to p90; {prompt}", 15, _SOFT)
    second = profile.kept_state.first_token
    first = [
        _stacked(f"keep all {s.visual_tokens}", profile.dense),
        _stacked(f"keep {s.keep}", profile.pruned),
        _single("second question, kept image", second),
    ]
    further = [_single(f"keep all {s.visual_tokens}", profile.dense.per_token), _single(f"keep {s.keep}", profile.pruned.per_token)]
    bottom = _panel(draw, 104, "time to first token, ms", first)
    bottom = _legend(draw, bottom + 4, profile)
    bottom = _panel(draw, bottom + 34, "time per output token, ms", further)
    _figures(draw, bottom + 22, profile)
    _text(draw, (40, CHART_SIZE[1] - 34), _fitting(draw, profile.machine.describe(), 13, CHART_SIZE[0] - 80), 13, _SOFT)
    return canvas


def _stacked(label: str, setting: Setting) -> _Bar:
    """As long as the median of the whole, which is not the sum of its stages' medians: they share it in proportion."""
    medians = [setting.stages[stage].median_ms for stage in STAGES]
    scale = setting.first_token.median_ms / sum(medians)
    return _Bar(label, tuple((ms * scale, _COLOURS[stage]) for ms, stage in zip(medians, STAGES, strict=True)), setting.first_token)


def _single(label: str, whole: Distribution) -> _Bar:
    return _Bar(label, ((whole.median_ms, _SINGLE),), whole)


def _panel(draw: ImageDraw.ImageDraw, top: int, title: str, bars: list[_Bar]) -> int:
    """Bars over a common axis that begins at 0; returns where it ends."""
    _text(draw, (40, top), title, 17)
    top += 32
    bottom = top + len(bars) * (_BAR + 16)
    largest = max(bar.whole.p90_ms for bar in bars)
    step = _tick_step(largest)
    scale = (CHART_SIZE[0] - _LEFT - _RIGHT - 70) / largest
    for i in range(int(largest / step) + 1):
        x = _LEFT + round(i * step * scale)
        draw.line([(x, top), (x, bottom)], fill=_GRID)
        _text(draw, (x, bottom + 4), f"{i * step:g}", 13, _SOFT, anchor="ma")
    for i, bar in enumerate(bars):
        _draw_bar(draw, top + 8 + i * (_BAR + 16), bar, scale)
    return bottom + 24


def _draw_bar(draw: ImageDraw.ImageDraw, top: int, bar: _Bar, scale: float) -> None:
    middle, at = top + _BAR // 2, 0.0
    _text(draw, (_LEFT - 12, middle), bar.label, 15, anchor="rm")
    for ms, colour in bar.segments:
        left, right = _LEFT + round(at * scale), _LEFT + round((at + ms) * scale)
        if right > left:
            draw.rectangle([left, top, right - 1, top + _BAR], fill=colour)
        at += ms
    end, p90 = _LEFT + round(bar.whole.median_ms * scale), _LEFT + round(bar.whole.p90_ms * scale)
    draw.line([(end, middle), (p90, middle)], fill=_INK, width=2)
    draw.line([(p90, middle - 7), (p90, middle + 7)], fill=_INK, width=2)
    _text(draw, (p90 + 8, middle), _number(bar.whole.median_ms), 15, anchor="lm")


def _legend(draw: ImageDraw.ImageDraw, top: int, profile: Profile) -> int:
    """Colours with both settings' medians; returns where it ends."""
    s, x = profile.subject, _LEFT
    width = (CHART_SIZE[0] - _LEFT - _RIGHT) // len(_COLOURS)
    _text(draw, (_LEFT - 12, top + 30), f"keep all {s.visual_tokens}, ms", 13, _SOFT, anchor="rm")
    _text(draw, (_LEFT - 12, top + 50), f"keep {s.keep}, ms", 13, _SOFT, anchor="rm")
    for name, colour in _COLOURS.items():
        draw.rectangle([x, top + 3, x + 12, top + 15], fill=colour)
        _text(draw, (x + 19, top + 9), name, 14, anchor="lm")
        for line, setting in enumerate((profile.dense, profile.pruned)):
            ms = setting.stages[name].median_ms
            _text(draw, (x + 19, top + 30 + 20 * line), _number(ms) if ms else "-", 13, _SOFT, anchor="lm")
        x += width
    return top + 60


def _figures(draw: ImageDraw.ImageDraw, top: int, profile: Profile) -> None:
    """Ratios with their intervals, in two columns."""
    c, s = profile.comparison, profile.subject
    rows = [
        ("pre_ecl + score + post_ecl", _factor(c.decoder)),
        ("the same in FLOPs", f"{c.flops_ratio:.2f}x"),
        ("realised share of the FLOPs ratio", _percent(c.realised)),
        ("time to first token", _factor(c.first_token)),
        ("time per output token", _factor(c.per_token)),
        ("second question / asked afresh", _percent(profile.kept_state.share_of_afresh)),
    ]
    _text(draw, (40, top), f"keep all {s.visual_tokens} / keep {s.keep}, median of pairwise ratios [95 % interval]", 17)
    for i, (name, value) in enumerate(rows):
        x, y = 40 + 600 * (i // 3), top + 32 + 24 * (i % 3)
        _text(draw, (x, y), name, 15)
        _text(draw, (x + 270, y), value, 15)


def _factor(ratio: Ratio) -> str:
    return f"{ratio.median:.2f}x  [{ratio.low:.2f}, {ratio.high:.2f}]"


def _percent(ratio: Ratio) -> str:
    return f"{ratio.median:.0%}  [{ratio.low:.0%}, {ratio.high:.0%}]"


def _number(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def _tick_step(largest: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that gives five to ten ticks."""
    power = 10.0 ** (len(str(int(largest))) - 1)
    while largest / power < 5:
        power /= 10
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if largest / step <= 10)


def _text(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: Colour = _INK, anchor: str = "la") -> None:
    draw.text(place, text, fill=colour, font=ImageFont.load_default(size), anchor=anchor)


def _fitting(draw: ImageDraw.ImageDraw, text: str, size: int, width: int) -> str:
    """The text, shortened where it would be wider than `width` pixels."""
    font = ImageFont.load_default(size)
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"
