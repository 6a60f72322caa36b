"""From messages and images to what the engines take: token ids, the places of visual tokens, pixels."""

from __future__ import annotations

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
from runtime.errors import BundleError
from runtime.images import ImageProcessor, image_seed, load_image
from runtime.manifest import Manifest

Message = Mapping[str, Any]
ImageSource = str | os.PathLike[str] | Image.Image | npt.NDArray[Any]
TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
PREPROCESSOR_FILE = "preprocessor_config.json"
SPECIAL_TOKENS_FILE = "special_tokens.json"
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prepared prompt: `ids.input_ids` [S] int64 with images expanded, `pixel_values` [images, 3, side, side] float32 or None.

    `image_seed` is derived from the images' bytes; the control `random` ranks by it.
    """

    ids: PromptIds
    pixel_values: np.ndarray | None
    images: tuple[Image.Image, ...]
    image_seed: int


class PromptBuilder:
    """Reads the bundle's tokenizer, chat template and image processor, and prepares prompts with them."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self._manifest = manifest
        self.tokenizer = Tokenizer.from_file(bundle / TOKENIZER_FILE)
        self.image_processor = ImageProcessor.from_file(bundle / PREPROCESSOR_FILE)
        self._template = ChatTemplate(_read(bundle / TEMPLATE_FILE))
        self.special_tokens: dict[str, str] = json.loads(_read(bundle / SPECIAL_TOKENS_FILE))

    def build(self, messages: str | Sequence[Message], images: Sequence[ImageSource]) -> Prompt:
        """Prepares a prompt.

        Raises:
            InputError: a message or image cannot be used.
        """
        pictures = tuple(load_image(source) for source in images)
        text = self._template.render(normalize_messages(messages, len(pictures)), add_generation_prompt=True, **self.special_tokens)
        per_image = [self._manifest.geometry.visual_tokens] * len(pictures)
        ids = self.tokenizer.encode(text, self._manifest.image_token_id, per_image)
        pixels = np.concatenate([self.image_processor(p) for p in pictures]) if pictures else None
        return Prompt(ids, pixels, pictures, combined_seed([image_seed(p) for p in pictures]))


def combined_seed(seeds: Sequence[int]) -> int:
    """One 31-bit seed for several images, in their order; a single image's own seed for one."""
    combined = 0
    for seed in seeds:
        combined = (combined * 1_000_003 + seed) % (2**31)
    return combined


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot read {path.name} of the bundle ({error}): export the bundle again") from error
