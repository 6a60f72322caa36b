"""What a picture of a selection shows: the images of a prompt, where their patches lie, which were kept, and every score.

Draws nothing: `runtime.picture` makes a PNG of it, `runtime.picture_html` a page.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from runtime.errors import UsageError
from runtime.generation import Generation
from runtime.images import ImageProcessor, load_image
from runtime.pipeline import VisionLanguageModel
from runtime.prompt import RawImage
from runtime.state import PromptState

Box = tuple[float, float, float, float]
Sources = RawImage | Sequence[RawImage]
NOWHERE: Box = (0.0, 0.0, 0.0, 0.0)
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
ENTROPY_MODES = ("trace", "row", "raw")
MAX_EDGE = 1280  # pixels: a larger image is kept smaller, or the frames of a video would fill the memory
MAX_SURROUNDINGS = 2.5  # of an image that is long and thin, no more is shown than this many times what the model saw


@dataclass(frozen=True, slots=True)
class Patch:
    """One visual token.

    Attributes:
        token: its index within all visual tokens of the prompt.
        box: left, top, right, bottom as shares (0 to 1) of the shown image; empty where the token has no place in it.
        score: None where it was not scored, or its score is not finite.
        rank: 0 for the highest score among all visual tokens of the prompt; None where nothing was scored.
    """

    token: int
    box: Box
    score: float | None
    rank: int | None
    kept: bool

    @property
    def placed(self) -> bool:
        """Whether it shows a part of the image (False: only the padding around it, or the class token)."""
        return self.box[2] > self.box[0] and self.box[3] > self.box[1]


@dataclass(frozen=True, slots=True, eq=False)
class PatchMap:
    """One image and its visual tokens: `patches` row after row, `side` in a row, and the class token where the model has one.

    Attributes:
        image: RGB, what is shown of the original, at most `MAX_EDGE` pixels on its longer edge.
        original_size: width and height of the original in pixels.
        window: what the model saw of `image`, as a box in shares of it; the rest was cut off by the centre crop.
    """

    name: str
    image: Image.Image
    original_size: tuple[int, int]
    window: Box
    side: int
    patches: tuple[Patch, ...]
    class_token: Patch | None

    @property
    def tokens(self) -> tuple[Patch, ...]:
        """All visual tokens, in the prompt's order."""
        return self.patches if self.class_token is None else (self.class_token, *self.patches)

    @property
    def kept(self) -> int:
        """How many of its visual tokens were kept, the class token included."""
        return sum(patch.kept for patch in self.tokens)

    @property
    def cropped(self) -> bool:
        """Whether a part of what is shown was not seen by the model."""
        return any(abs(edge - whole) > 1e-6 for edge, whole in zip(self.window, WHOLE, strict=True))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the panels cannot show, in words."""
        notes = []
        if self.class_token is not None:
            score = "" if self.class_token.score is None else f" (score {self.class_token.score:.4f})"
            notes.append(f"the class token, which has no place in the image, was {'kept' if self.class_token.kept else 'dropped'}{score}")
        if unplaced := [patch for patch in self.patches if not patch.placed]:
            notes.append(f"{len(unplaced)} patches lie in the padding around the image ({sum(p.kept for p in unplaced)} kept)")
        return tuple(notes)


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """All images of a prompt with what was kept of them, and the run's figures.

    Attributes:
        budgets: the keep counts that the bundle holds.
        by_rank: the kept tokens are those of the highest scores over the whole prompt (not so over several messages, each with its own
            budget, or where nothing was scored), so that other budgets can be shown without running them.
        auto_budgets: the budget chosen for each message's images, by `auto_keep`'s share of the scores' mass; empty without a choice.
        prompt, answer: None where no question was asked.
        ttft_ms: milliseconds to the first token; None where no question was asked.
    """

    maps: tuple[PatchMap, ...]
    model: str
    split_layer: int
    layers: int
    score_mode: str
    budgets: tuple[int, ...]
    by_rank: bool
    auto_keep: float | None
    auto_budgets: tuple[int, ...]
    prompt: str | None
    answer: str | None
    ttft_ms: float | None

    @property
    def tokens(self) -> tuple[Patch, ...]:
        """All visual tokens of the prompt, in its order."""
        return tuple(patch for map_ in self.maps for patch in map_.tokens)

    @property
    def kept(self) -> int:
        return sum(map_.kept for map_ in self.maps)

    @property
    def score_range(self) -> tuple[float, float] | None:
        """Lowest and highest score over all images; None where nothing was scored."""
        scores = [patch.score for patch in self.tokens if patch.score is not None]
        return (min(scores), max(scores)) if scores else None

    @property
    def lowest_kept(self) -> float | None:
        """The score from which on tokens were kept; None where the selection is not by rank."""
        scores = [patch.score for patch in self.tokens if patch.score is not None and patch.kept]
        return min(scores) if scores and self.by_rank else None

    @property
    def all_kept(self) -> bool:
        return self.kept == len(self.tokens)

    @property
    def score_name(self) -> str:
        """What the scores are."""
        return f"{'matrix entropy' if self.score_mode in ENTROPY_MODES else 'score'} of a token ({self.score_mode})"

    @property
    def run(self) -> str:
        """The run's figures in one line."""
        count, images = len(self.tokens), len(self.maps)
        parts = [
            f"{count} visual tokens{f' in {images} images' if images > 1 else ''}",
            f"{self.kept} kept ({100 * self.kept / count:.1f} %) from layer {self.split_layer} of {self.layers} on",
        ]
        if self.auto_budgets and self.auto_keep is not None:
            budgets, chosen = ", ".join(map(str, sorted(self.budgets))), ", ".join(map(str, self.auto_budgets))
            parts.append(f"budget {chosen} of {budgets} chosen for {100 * self.auto_keep:g} % of the scores' mass")
        if self.score_range is None:
            parts.append("nothing was scored")
        else:
            parts.append(f"score ({self.score_mode}) {self.score_range[0]:.4f} to {self.score_range[1]:.4f}")
            unscored = sum(patch.score is None for patch in self.tokens)
            parts += [f"{unscored} tokens without a score"] if unscored else []
        parts += [f"first token after {self.ttft_ms:.1f} ms"] if self.ttft_ms is not None else []
        return "; ".join(parts)

    @property
    def figures(self) -> str:
        """The same with the answer."""
        answer = "no question asked" if self.answer is None else f"answer {one_line(self.answer, 80)!r}"
        return f"{self.run}; {answer}"


def explanation_of(
    model: VisionLanguageModel, sources: Sources, result: Generation | PromptState, prompt: str | None = None
) -> Explanation:
    """Puts together what a picture shows.

    Args:
        sources: the prompt's images, all of them, in order: one, or a list.
        result: what `generate` or `prefill` returned for them.
        prompt: the question, to be shown with the answer.

    Raises:
        UsageError: the result is about no image or about others than these, or its tokens form no square grid.
        InputError: an image cannot be read.
    """
    images: list[RawImage] = list(sources) if isinstance(sources, (list, tuple)) else [cast(RawImage, sources)]
    held = result.conversation if isinstance(result, PromptState) else result
    per_image, manifest = model.manifest.geometry.visual_tokens, model.manifest
    if not images or not held.visual_tokens:
        raise UsageError("there is no image to draw: a picture needs a prompt with at least one")
    if len(images) * per_image != held.visual_tokens:
        raise UsageError(
            f"the result is about {held.visual_tokens // per_image} images, {len(images)} were given: give those of its prompt"
        )
    side = grid_side(per_image)
    tokens, by_rank = _tokens(held.visual_tokens, held.kept_indices, held.token_entropy)
    maps = [
        _patch_map(source, f"image {i + 1}", tokens[i * per_image : (i + 1) * per_image], side, model.prompts.image_processor)
        for i, source in enumerate(images)
    ]
    return Explanation(
        maps=tuple(maps),
        model=manifest.model,
        split_layer=manifest.split_layer,
        layers=manifest.geometry.layers,
        score_mode=manifest.score_mode,
        budgets=manifest.budgets,
        by_rank=by_rank,
        auto_keep=manifest.auto_keep,
        auto_budgets=held.auto_budgets,
        prompt=None if prompt is None else printable(prompt),
        answer=printable(result.text) if isinstance(result, Generation) else None,
        ttft_ms=result.ttft_ms if isinstance(result, Generation) else None,
    )


def grid_side(visual_tokens: int) -> int:
    """Patches in a row of the square grid that `visual_tokens` form, with or without a class token before them.

    Raises:
        UsageError: they form none.
    """
    side = math.isqrt(visual_tokens)
    if visual_tokens - side * side not in (0, 1):
        raise UsageError(
            f"{visual_tokens} visual tokens of an image form no square grid (expected a square number, or one more for the class token): "
            "pictures are drawn for square grids only"
        )
    return side


def printable(text: str) -> str:
    """`text` without what can be neither encoded nor shown: lone surrogates and control characters other than line breaks."""
    return "".join(" " if c != "\n" and unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def one_line(text: str, length: int) -> str:
    """`text` without line breaks, cut to `length` characters."""
    text = " ".join(printable(text[: 4 * length]).split())
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."


def _tokens(count: int, kept_indices: Sequence[int] | np.ndarray, scores: np.ndarray | None) -> tuple[list[Patch], bool]:
    """Every visual token, its place left open, and whether those of the highest scores were kept.

    Of equal scores the lower index ranks first, those that are not finite rank last, as in the score graph.
    """
    kept = np.zeros(count, bool)
    kept[np.asarray(kept_indices, np.int64)] = True
    if scores is None:
        return [Patch(i, NOWHERE, None, None, bool(kept[i])) for i in range(count)], False
    ranks = np.empty(count, np.int64)
    ranks[np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable")] = np.arange(count)
    finite = [float(score) if math.isfinite(score) else None for score in scores]
    return [Patch(i, NOWHERE, finite[i], int(ranks[i]), bool(kept[i])) for i in range(count)], bool((kept == (ranks < kept.sum())).all())


def _patch_map(source: RawImage, name: str, tokens: Sequence[Patch], side: int, processor: ImageProcessor) -> PatchMap:
    image = load_image(source)
    boxes = [processor.patch_box(i, (side, side), image.size) for i in range(side * side)]
    filled = [box for box in boxes if box[2] > box[0] and box[3] > box[1]]
    window = (*(min(box[i] for box in filled) for i in (0, 1)), *(max(box[i] for box in filled) for i in (2, 3)))
    horizontal, vertical = _view(window[0], window[2], image.width), _view(window[1], window[3], image.height)
    left, top, width, height = horizontal[0], vertical[0], horizontal[1] - horizontal[0], vertical[1] - vertical[0]
    scale = min(1.0, MAX_EDGE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))

    def share(box: Sequence[float]) -> Box:
        return (box[0] - left) / width, (box[1] - top) / height, (box[2] - left) / width, (box[3] - top) / height

    class_tokens, patches = tokens[: -side * side], tokens[-side * side :]
    return PatchMap(
        name=one_line(Path(os.fsdecode(source)).name, 200) if isinstance(source, (str, os.PathLike)) else name,
        image=image.resize(size, Image.Resampling.LANCZOS, (left, top, left + width, top + height)),
        original_size=image.size,
        window=share(window),
        side=side,
        patches=tuple(replace(patch, box=share(box)) for patch, box in zip(patches, boxes, strict=True)),
        class_token=class_tokens[0] if class_tokens else None,
    )


def _view(low: float, high: float, size: int) -> tuple[int, int]:
    """What is shown along one edge of `size` pixels: all of it, or the surroundings of what the model saw, `low` to `high`."""
    around = max(1.0, (high - low) * (MAX_SURROUNDINGS - 1) / 2)
    return max(0, math.floor(low - around)), min(size, math.ceil(high + around))
