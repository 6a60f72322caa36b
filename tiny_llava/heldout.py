"""The held-out questions that ship with the repository: digits and photographs that training never saw.

`heldout/` holds images as PNG and `questions.json`. Needs no torch: the runtime's users and tests read it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "heldout"
CALIBRATION_FOLDER = Path(__file__).parent / "calibration"  # other scenes, for choosing settings
CHECKPOINT = Path(__file__).parent / "checkpoint"
DEMO_IMAGE = Path(__file__).parent / "demo.png"
DEMO_FILE = Path(__file__).parent / "demo.json"


@dataclass(frozen=True, slots=True)
class HeldoutQuestion:
    """`image` is a PNG of 112 x 112 pixels; `kind` the question's type; `answer` the only right text."""

    image: Path
    kind: str
    question: str
    answer: str


def load_heldout(limit: int | None = None) -> list[HeldoutQuestion]:
    """The held-out questions, image by image, in the file's order; the first `limit` of them."""
    rows = json.loads((FOLDER / "questions.json").read_text(encoding="utf-8"))["questions"]
    return [HeldoutQuestion(FOLDER / r["image"], r["kind"], r["question"], r["answer"]) for r in rows[:limit]]
