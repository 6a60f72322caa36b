"""From messages and images to what the engines take: token ids, the places of visual tokens, pixels."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtime.chat import ChatTemplate, PromptIds, Tokenizer, normalize_messages
from runtime.conversation import ImageGroup, ImageSpan
from runtime.errors import BundleError, InputError
from runtime.images import ImageProcessor, image_hash, image_seed, load_image
from runtime.manifest import Manifest

Message = Mapping[str, Any]
TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
PREPROCESSOR_FILE = "preprocessor_config.json"
SPECIAL_TOKENS_FILE = "special_tokens.json"
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """An image ready for the vision engine: `pixel_values` [1, 3, side, side] float32; `digest` and `seed` come from its bytes."""

    pixel_values: np.ndarray
    digest: str
    seed: int


RawImage = str | os.PathLike[str] | Image.Image | npt.NDArray[Any]
ImageSource = RawImage | PreparedImage


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prepared prompt: `ids` with images expanded, its messages and images in order, one group for each message with images."""

    ids: PromptIds
    messages: tuple[Message, ...]
    images: tuple[PreparedImage, ...]
    groups: tuple[ImageGroup, ...]

    @property
    def pixel_values(self) -> np.ndarray | None:
        """[images, 3, side, side] float32, all images; None without."""
        return self.pixels_of(self.groups)

    @property
    def image_seed(self) -> int:
        """The first group's seed; 0 without images."""
        return self.groups[0].seed if self.groups else 0

    def pixels_of(self, groups: Sequence[ImageGroup]) -> np.ndarray | None:
        """The same for the images of some groups."""
        wanted = {span.start for group in groups for span in group.spans}
        starts = [span.start for group in self.groups for span in group.spans]
        pixels = [image.pixel_values for image, start in zip(self.images, starts, strict=True) if start in wanted]
        return np.concatenate(pixels) if pixels else None


class PromptBuilder:
    """Reads the bundle's tokenizer, chat template and image processor, and prepares prompts with them."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self._manifest = manifest
        self.tokenizer = Tokenizer.from_file(bundle / TOKENIZER_FILE)
        self.image_processor = ImageProcessor.from_file(bundle / PREPROCESSOR_FILE)
        self._template = ChatTemplate(_read(bundle / TEMPLATE_FILE))
        self.special_tokens = read_object(bundle / SPECIAL_TOKENS_FILE)

    def prepare(self, source: ImageSource) -> PreparedImage:
        """Loads and preprocesses an image (a prepared one is returned as it is).

        Raises:
            InputError: it cannot be used.
        """
        if isinstance(source, PreparedImage):
            return source
        image = load_image(source)
        digest = image_hash(image)
        return PreparedImage(self.image_processor(image), digest, image_seed(digest))

    def build(self, messages: str | Sequence[Message], images: Sequence[ImageSource], *, answer: bool = True) -> Prompt:
        """Prepares a prompt.

        Args:
            answer: end with the template's invitation to answer; without it, text is not needed either.

        Raises:
            InputError: a message or image cannot be used.
        """
        images = image_list(images)
        parts = normalize_messages(messages, len(images), text_needed=answer)
        text = self._template.render(parts, add_generation_prompt=answer, **self.special_tokens)
        hidden = self.tokenizer.mask(parts)
        masked = None if hidden is None else self._template.render(hidden, add_generation_prompt=answer, **self.special_tokens)
        per_image = self._manifest.geometry.visual_tokens
        ids = self.tokenizer.encode(text, self._manifest.image_token_id, [per_image] * len(images), masked=masked)
        prepared = tuple(self.prepare(source) for source in images)
        return Prompt(ids, tuple(parts), prepared, _groups(ids, parts, prepared, per_image))


def _groups(ids: PromptIds, messages: Sequence[Message], images: Sequence[PreparedImage], per_image: int) -> tuple[ImageGroup, ...]:
    """One group for each message that has images, spans in the prompt's order."""
    starts = iter(np.flatnonzero(ids.visual_mask)[::per_image].tolist())
    remaining = iter(images)
    groups = []
    for message in messages:
        count = sum(part["type"] == "image" for part in message["content"])
        chosen = list(itertools.islice(remaining, count))
        spans = tuple(
            ImageSpan(start, start + per_image, image.digest) for start, image in zip(itertools.islice(starts, count), chosen, strict=True)
        )
        if spans:
            groups.append(ImageGroup(spans, combined_seed([image.seed for image in chosen])))
    return tuple(groups)


def image_list(images: Any) -> tuple[ImageSource, ...]:
    """The images of a prompt.

    Raises:
        InputError: something else than a list of them, one image by itself for instance.
    """
    if not isinstance(images, (list, tuple)):
        raise InputError(f"images must be a list with one entry for each image, not {type(images).__name__}: write images=[image]")
    return tuple(images)


def combined_seed(seeds: Sequence[int]) -> int:
    """One 31-bit seed for several images, in their order; a single image's own seed for one."""
    combined = 0
    for seed in seeds:
        combined = (combined * 1_000_003 + seed) % (2**31 - 1)
    return combined


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object among a bundle's files.

    Raises:
        BundleError: it is missing, or holds something else.
    """
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path.name} is not valid JSON ({error}): export the bundle again") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path.name} must hold a JSON object, not {type(value).__name__}: export the bundle again")
    return value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot read {path.name} of the bundle ({error}): export the bundle again") from error
