"""Exact answers of a checkpoint under many settings, image by image; stopped and called again, it goes on where it was.

Greedy decoding gives a label exactly when every label token is the most likely one after those before it, so one teacher-forced pass
answers all of an image's questions at once (`calibration.pruned_forward`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from benchmarks.accuracy import neighbours
from benchmarks.accuracy.settings import Setting, budgets, equal_cost, selectors
from calibration.pruned_forward import DensePass, PrunedForward, exact, pack
from calibration.questions import EncodedQuestion, Question, by_image, encode
from calibration.selection import Selector, rank
from runtime.images import image_hash, image_seed, load_image

MASS_SELECTORS = (Selector("trace"), Selector("row"), Selector("dpp"))  # per-image budgets are tried with these
UNPRUNED = Setting("unpruned", 0, 0)
DEFINITIONS = 2  # raised with the definition of any setting: what was measured before it does not count


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """Right answers: `right` bool [settings, questions] with `images` int64 [questions], the image that each question is about.

    `masses` float64 [images, splits, MASS_SELECTORS, keeps] are kept score masses; `text_tokens` the mean prompt length besides the image.
    """

    settings: tuple[Setting, ...]
    right: np.ndarray
    images: np.ndarray
    kinds: tuple[str, ...]
    masses: np.ndarray
    splits: tuple[int, ...]
    keeps: tuple[int, ...]
    text_tokens: float

    def of(self, setting: Setting) -> np.ndarray:
        """bool [questions]."""
        row: np.ndarray = self.right[self.settings.index(setting)]
        return row


@dataclass(frozen=True, slots=True, eq=False)
class _ImageOutcome:
    """One image's share of `Outcomes`; `text_tokens` int64 [questions]."""

    right: np.ndarray
    masses: np.ndarray
    text_tokens: np.ndarray


NEIGHBOUR_SPLIT = 2  # where FastV prunes, in its paper too


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What is evaluated: a model, its splits and budgets.

    Attributes:
        extra_keeps: budgets besides those of `settings`.
        neighbour_split: the layer at which FastV prunes, and whose costs the others are compared at; always among `splits`.
        revision: of the weights.
    """

    forward: PrunedForward
    processor: Any
    visual_tokens: int
    splits: tuple[int, ...]
    extra_keeps: tuple[int, ...] = ()
    neighbour_split: int = NEIGHBOUR_SPLIT
    revision: str = ""

    def budgets(self, split: int) -> tuple[int, ...]:
        return budgets(self.visual_tokens, self.forward.layers, split, self.extra_keeps)

    def settings(self) -> tuple[Setting, ...]:
        """Every setting, in the order that results are stored in."""
        grid = [Setting(s.name, k, keep, s.seed) for k in self.splits for keep in self.budgets(k) for s in selectors()]
        pairs = list(equal_cost(self.visual_tokens, self.forward.layers, self.neighbour_split, self.extra_keeps))
        fastv = [Setting("fastv", self.neighbour_split, keep) for keep, _ in pairs]
        before = [Setting(name, 0, keep) for name in ("divprune", "cdpruner") for keep in dict.fromkeys(early for _, early in pairs)]
        return (UNPRUNED, *grid, *fastv, *before)

    def run(self, questions: Sequence[Question], folder: Path) -> Outcomes:
        """Evaluates what `folder` does not hold yet, one file for each image, and reads it all."""
        folder.mkdir(parents=True, exist_ok=True)
        groups = list(by_image(questions))
        settings = self.settings()
        files = [folder / f"{self._fingerprint(path, group)}.npz" for path, group in groups]
        for (path, group), file in zip(tqdm(groups, desc="images", disable=None, file=sys.stderr), files, strict=True):
            if not file.exists():
                found = self._image(path, group, settings)
                partial = file.with_suffix(".partial.npz")
                np.savez_compressed(partial, right=found.right, masses=found.masses, text_tokens=found.text_tokens)
                os.replace(partial, file)
        stored = [dict(np.load(file)) for file in files]
        return Outcomes(
            settings,
            np.concatenate([s["right"] for s in stored], axis=1),
            np.repeat(np.arange(len(groups)), [len(group) for _, group in groups]),
            tuple(q.kind or "" for _, group in groups for q in group),
            np.stack([s["masses"] for s in stored]),
            self.splits,
            self._mass_keeps(),
            float(np.concatenate([s["text_tokens"] for s in stored]).mean()),
        )

    def _mass_keeps(self) -> tuple[int, ...]:
        return tuple(sorted({keep for split in self.splits for keep in self.budgets(split)}))

    def _fingerprint(self, path: Path, group: Sequence[Question]) -> str:
        """Names an image's file: everything that its results depend on, the weights by a digest of the embedding table."""
        asked = [(q.text, q.answer) for q in group]
        what = [DEFINITIONS, path.name, hashlib.sha256(path.read_bytes()).hexdigest(), asked, [asdict(s) for s in self.settings()]]
        return hashlib.sha256(json.dumps([*what, self.revision]).encode()).hexdigest()[:24]

    def _image(self, path: Path, group: Sequence[Question], settings: Sequence[Setting]) -> _ImageOutcome:
        image = load_image(path)
        seed = image_seed(image_hash(image))
        encoded, pixels = zip(*(encode(q, image, self.processor) for q in group), strict=True)
        embeds = self.forward.image_embeds(pixels[0])
        image_token = self.forward.model.config.image_token_id
        dense = self.forward.dense(pack(encoded, image_token), embeds)
        right = {UNPRUNED: exact(dense.logits, dense.prompt).numpy()}
        masses = np.zeros((len(self.splits), len(MASS_SELECTORS), len(self._mass_keeps())))
        for number, split in enumerate(self.splits):
            self._selectors(dense, split, seed, right, masses[number])
        self._neighbours(encoded, dense, embeds, image_token, right)
        lengths = np.array([len(e.prompt_ids) - len(dense.prompt.visual_rows) for e in encoded])
        return _ImageOutcome(np.stack([right[s] for s in settings]), masses, lengths)

    def _selectors(self, dense: DensePass, split: int, seed: int, right: dict[Setting, np.ndarray], masses: np.ndarray) -> None:
        chosen = selectors()
        rankings = {s: rank(self.forward, dense, split, s, seed, max(self.budgets(split))) for s in chosen}
        for keep in self.budgets(split):
            kept = np.stack([rankings[s].kept(keep) for s in chosen])
            found = exact(self.forward.pruned(dense, split, kept), dense.prompt).numpy()
            right.update({Setting(s.name, split, keep, s.seed): row for s, row in zip(chosen, found, strict=True)})
        masses[:] = [[rankings[s].kept_mass(keep) for keep in self._mass_keeps()] for s in MASS_SELECTORS]

    def _neighbours(
        self, encoded: Sequence[EncodedQuestion], dense: DensePass, embeds: Tensor, image_token: int, right: dict[Setting, np.ndarray]
    ) -> None:
        pairs = list(equal_cost(self.visual_tokens, self.forward.layers, self.neighbour_split, self.extra_keeps))
        divprune = neighbours.divprune_order(embeds)
        for early in dict.fromkeys(early for _, early in pairs):
            logits = self.forward.pruned(dense, 0, np.sort(divprune[:early])[None])[0]
            right[Setting("divprune", 0, early)] = exact(logits, dense.prompt).numpy()
        for question in encoded:
            single = self.forward.dense(pack([question], image_token), embeds)
            for setting, kept in self._of_question(question, single, embeds, pairs):
                logits = self.forward.pruned(single, setting.split_layer, kept[None])[0]
                answer = exact(logits, single.prompt).numpy()
                right[setting] = np.concatenate([right[setting], answer]) if setting in right else answer

    def _of_question(
        self, question: EncodedQuestion, single: DensePass, embeds: Tensor, pairs: Sequence[tuple[int, int]]
    ) -> list[tuple[Setting, np.ndarray]]:
        """The selections that look at the question."""
        fastv = neighbours.fastv_order(self.forward, single, self.neighbour_split)
        last = int(single.prompt.visual_rows[-1])
        own = single.entering[0][last + 1 : int(single.prompt.answer_rows[0]) + 1]
        early = list(dict.fromkeys(early for _, early in pairs))
        cdpruner = neighbours.cdpruner_order(embeds, own, max(early))
        return [
            *((Setting("fastv", self.neighbour_split, keep), np.sort(fastv[:keep])) for keep, _ in pairs),
            *((Setting("cdpruner", 0, keep), np.sort(cdpruner[:keep])) for keep in early),
        ]


def open_evaluation(checkpoint: Path, splits: Sequence[int] | None = None, extra_keeps: Sequence[int] = ()) -> Evaluation:
    """A checkpoint ready to be evaluated; `splits` are 1..L/2 unless given.

    Raises:
        UsageError: a split is out of range.
    """
    from transformers import AutoProcessor

    from export.budget import check_split
    from export.checkpoint import Checkpoint
    from export.eager import load_llava

    forward = PrunedForward(load_llava(checkpoint, "sdpa"))
    vision = forward.model.config.vision_config
    visual = (vision.image_size // vision.patch_size) ** 2
    chosen = tuple(splits) if splits else tuple(range(1, forward.layers // 2 + 1))
    for split in chosen:
        check_split(split, layers=forward.layers)
    chosen = tuple(sorted({*chosen, NEIGHBOUR_SPLIT}))
    revision = Checkpoint.open(str(checkpoint)).revision
    return Evaluation(forward, AutoProcessor.from_pretrained(checkpoint), visual, chosen, tuple(extra_keeps), revision=revision)
