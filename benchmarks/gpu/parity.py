"""Pieces `parity-BACKEND`: a backend against the CPU chain on the shipped model: kept tokens, logits, greedy tokens.

The same bundle runs on both, in fp32 and in fp16. Logits are compared with the CPU's kept tokens given to both, so that a near tie in one
selection does not hide what the graphs compute; answers are compared where both keep the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.gpu.settings import ROOT, Settings

if TYPE_CHECKING:
    from runtime.pipeline import VisionLanguageModel

IMAGES: Final = ROOT / "tiny_llava" / "heldout"
QUESTION: Final = "read row 2."


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far one image's answers agree; `tokens` is None where other visual tokens were kept."""

    overlap: float
    logits_error: float
    tokens: bool | None


def piece(backend: str) -> Callable[[Settings], dict[str, Any]]:
    """The piece of one backend."""

    def run(settings: Settings) -> dict[str, Any]:
        from benchmarks.gpu.bundles import compile_engines, has_engines, tiny_bundle
        from benchmarks.gpu.pieces import runnable

        reason = runnable(settings, backend)
        if reason is not None:
            return {"skipped": reason, "said": f"left out: {reason}"}
        found = {}
        for precision in dict.fromkeys(("fp32", settings.precision)):
            bundle = tiny_bundle(settings, precision)
            if backend.startswith("tensorrt") and not has_engines(bundle, backend):
                compile_engines(settings, bundle, backend)
            found[precision] = compare(bundle, backend, settings.device_index, heldout_images(settings.parity_images))
        agrees = all(f["agrees"] for f in found.values())
        worst = {precision: f"{f['largest_logits_error']:.1e}" for precision, f in found.items()}
        return {**found, "agrees": agrees, "said": f"{'agrees' if agrees else 'DIFFERS'}; largest logits error {worst}"}

    return run


def heldout_images(count: int) -> list[Path]:
    """Scenes of the shipped model that it was not trained on, in order."""
    return sorted(IMAGES.glob("*.png"))[:count]


def compare(bundle: Path, backend: str, device_index: int, images: Sequence[Path]) -> dict[str, Any]:
    """Compares a backend with the CPU chain on some images.

    Returns:
        Plain data; `agrees` where the mean overlap of the kept tokens, every logits error and every comparable answer are within tolerance.
    """
    from benchmarks.gpu.device import open_model
    from export.tolerances import MIN_OVERLAP

    host, device = open_model(bundle, "cpu", device_index), open_model(bundle, backend, device_index)
    rows = [_agreement(host, device, image) for image in images]
    tolerance = tolerance_of(backend, host.manifest.precision)
    comparable = [row.tokens for row in rows if row.tokens is not None]
    overlap, error = float(np.mean([row.overlap for row in rows])), max(row.logits_error for row in rows)
    return {
        "images": len(rows), "keep": host.manifest.budgets[0], "score_mode": host.manifest.score_mode,
        "same_kept_tokens": sum(row.overlap == 1 for row in rows), "mean_overlap": overlap, "least_overlap": MIN_OVERLAP,
        "largest_logits_error": error, "tolerance": tolerance,
        "same_answers": sum(comparable), "comparable_answers": len(comparable),
        "agrees": bool(overlap >= MIN_OVERLAP and error <= tolerance and comparable and all(comparable)),
    }  # fmt: skip


def tolerance_of(backend: str, precision: str) -> float:
    """The relative error of logits allowed: a GPU rounds float32 products to TF32, whose fraction is as long as float16's."""
    from export.tolerances import RELATIVE

    return RELATIVE["logits", "fp32" if backend == "cpu" and precision == "fp32" else "fp16"]


def _agreement(host: VisionLanguageModel, device: VisionLanguageModel, image: Path) -> Agreement:
    from export.tolerances import GREEDY_TOKENS

    answers = [m.generate(QUESTION, [image], max_new_tokens=GREEDY_TOKENS, do_sample=False, eos_token_ids=()) for m in (host, device)]
    kept = np.array(answers[0].kept_indices, np.int64)
    logits = [_logits(model, image, kept) for model in (host, device)]
    overlap = len(np.intersect1d(kept, answers[1].kept_indices)) / len(kept)
    error = float(np.abs(logits[1] - logits[0]).max() / np.abs(logits[0]).max())
    return Agreement(
        overlap, error if np.isfinite(error) else float("inf"), answers[0].token_ids == answers[1].token_ids if overlap == 1 else None
    )


def _logits(model: VisionLanguageModel, image: Path, kept: np.ndarray) -> np.ndarray:
    """Of the token after the prompt, float32 [vocab], with these visual tokens kept."""
    prompt = model.prompts.build(QUESTION, [image])
    ids = prompt.ids
    _, logits = model.chain.prefill(ids.input_ids, ids.visual_mask, prompt.pixel_values, keep=None, kept_indices=kept)
    return np.asarray(logits, np.float64)
