"""The functions that `tiny_llava_heldout.yaml` names: a question's image, and whether its answer is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from tiny_llava.heldout import FOLDER


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The question's one image, RGB."""
    with Image.open(FOLDER / doc["image"]) as image:
        return [image.convert("RGB")]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the answer is exactly the expected one, 0 otherwise."""
    return {"exact_match": float(results[0] == doc["answer"])}
