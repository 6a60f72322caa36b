"""Why selections differ on the shipped scenes: what of each object they keep, and what tells object from ground.

The held-out scenes are known (their layout follows from their number), so every visual token is of an object or of the ground.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from benchmarks.accuracy.evaluation import Evaluation
from benchmarks.accuracy.report import MAIN, table
from calibration.pruned_forward import DensePass, pack
from calibration.questions import Question, by_image, encode
from calibration.selection import Selector, rank
from runtime.images import image_hash, image_seed, load_image
from tiny_llava.heldout import FOLDER
from tiny_llava.scenes import GRID, random_scene


@dataclass(frozen=True, slots=True)
class Coverage:
    """Means over images, of one selection: shares of 1, and the mean cosine similarity between kept hidden states (centred)."""

    objects_seen: float
    tokens_on_objects: float
    similarity: float


def object_map(number: int, side: int) -> np.ndarray:
    """int64 [side * side]: 0 for ground, i + 1 for the scene's object i; `number` counts the held-out images."""
    seed = json.loads((FOLDER / "questions.json").read_text(encoding="utf-8"))["seed"]
    cells = np.zeros((side, side), np.int64)
    step = side // GRID
    for i, thing in enumerate(random_scene(np.random.default_rng(seed + number))):
        cells[(thing.row - 1) * step : thing.row * step, (thing.column - 1) * step : thing.column * step] = i + 1
    return cells.reshape(-1)


def markdown(evaluation: Evaluation, questions: Sequence[Question], split: int, keep: int) -> str:
    """Two tables: what is kept of objects, and how scores of object and ground tokens differ."""
    side = round(evaluation.visual_tokens**0.5)
    selectors = [Selector(m) for m in MAIN]
    coverage: dict[str, list[Coverage]] = {m: [] for m in MAIN}
    standing: dict[str, list[float]] = {m: [] for m in MAIN}
    for path, group in tqdm(list(by_image(questions)), desc="objects", disable=None, file=sys.stderr):
        image = load_image(path)
        encoded, pixels = encode(group[0], image, evaluation.processor)
        forward = evaluation.forward
        dense = forward.dense(pack([encoded], forward.model.config.image_token_id), forward.image_embeds(pixels))
        objects, seed = object_map(int(path.stem), side), image_seed(image_hash(image))
        for selector in selectors:
            ranking = rank(forward, dense, split, selector, seed)
            coverage[selector.mode].append(_coverage(dense, split, ranking.kept(keep), objects))
            standing[selector.mode].append(_standing(ranking.scores, objects))
    rows = [
        [f"`{m}`", *(f"{100 * np.mean([getattr(c, f) for c in coverage[m]]):.1f}" for f in ("objects_seen", "tokens_on_objects")),
         f"{np.mean([c.similarity for c in coverage[m]]):.3f}", f"{np.mean(standing[m]):.2f}"]
        for m in MAIN
    ]  # fmt: skip
    share = np.mean([(object_map(int(path.stem), side) > 0).mean() for path, _ in by_image(questions)])
    head = ["", "objects with a kept token, %", "kept tokens on objects, %", "similarity among kept", "an object's token scores higher"]
    return (
        f"## Why (K = {split}, keep {keep})\n\n{table(head, rows)}\n\n"
        f"{100 * share:.0f} % of the tokens are of objects. Similarity: mean cosine between the kept tokens' centred hidden states. "
        "Last column: how often a token of an object scores higher than one of the ground (0.5: the score does not tell them apart).\n"
    )


def _coverage(dense: DensePass, split: int, kept: np.ndarray, objects: np.ndarray) -> Coverage:
    present = set(objects.tolist()) - {0}
    x = dense.entering[split][dense.prompt.visual_rows].double().numpy()
    x = x - x.mean(0)
    x = x[kept] / np.linalg.norm(x[kept], axis=1, keepdims=True)
    others = (x @ x.T)[~np.eye(len(kept), dtype=bool)]
    seen = set(objects[kept].tolist()) - {0}
    return Coverage(len(seen) / max(1, len(present)), float((objects[kept] > 0).mean()), float(others.mean()) if len(others) else 0.0)


def _standing(scores: np.ndarray, objects: np.ndarray) -> float:
    """The share of (object token, ground token) pairs in which the object's scores higher; ties count half."""
    mine, ground = scores[objects > 0], scores[objects == 0]
    larger = (mine[:, None] > ground[None, :]).mean() + 0.5 * (mine[:, None] == ground[None, :]).mean()
    return float(larger)
