"""Questions files for tests, and settings with made-up figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calibration.first_token import FirstToken
from calibration.grid import Setting
from calibration.pareto import Measured
from calibration.resampling import Figure

TEXTS = ("what is at row 2 column 3?", "how many digits?", "what color is the circle?")
ANSWERS = ("circle", "3", "red")


def write_questions(path: Path, images: Sequence[Path], *, labelled: bool = True, each: int = 3) -> Path:
    """`each` questions about every image, which are named as from the file's folder or absolutely."""
    rows = [
        {"image": str(image), "question": text, **({"answer": answer} if labelled else {})}
        for image in images
        for text, answer in list(zip(TEXTS, ANSWERS, strict=True))[:each]
    ]
    path.write_text(json.dumps({"questions": rows}))
    return path


def figure(mean: float, spread: float | None = None) -> Figure:
    return Figure(mean, None if spread is None else (mean - spread, mean + spread))


def measured(mode: str, split: int, keep: int, flops: float, agreement: Figure | float, **changes: Any) -> Measured:
    """A setting with made-up figures."""
    same = agreement if isinstance(agreement, Figure) else figure(agreement)
    values: dict[str, Any] = {
        "setting": Setting(mode, split, keep), "control": False, "average_keep": float(keep), "flops_share": flops,
        "flops_share_visual": flops, "kv_bytes": 1000, "first_token": None, "kl": figure(1 - same.mean), "agreement": same,
        "unchanged": same, "accuracy": None, "mass": 0.5,
    }  # fmt: skip
    if "ms" in changes:
        values["first_token"] = FirstToken(changes.pop("ms"), True)
    return Measured(**(values | changes))
