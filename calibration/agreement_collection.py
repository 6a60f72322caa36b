"""Measures the questions of many images, one image at a time, those that a journal does not hold yet.

Images are told apart by their contents: names, copies and the order of the questions change nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from calibration.agreement import Agreement
from calibration.grid import Grid
from calibration.image_set import CalibrationImage, open_image
from calibration.journal import LineJournal, finite_floats
from calibration.questions import Question, by_image
from runtime.errors import InputError, StorageError

__all__ = ["AgreementJournal", "AgreementRecord", "Collected", "collect_agreement"]


@dataclass(frozen=True, slots=True)
class AgreementRecord:
    """One image's numbers; `key` is of the image and its questions, `image` the file's SHA-256."""

    key: str
    image: str
    name: str
    found: Agreement


class AgreementJournal(LineJournal[AgreementRecord]):
    """The journal of `calibration.budget`."""

    def record_from(self, raw: dict[str, Any]) -> AgreementRecord:
        found = raw["found"]
        questions, labelled, positions, text_tokens, unpruned_right = (
            int(found[name]) for name in ("questions", "labelled", "positions", "text_tokens", "unpruned_right")
        )
        agreeing, unchanged, right = (tuple(int(value) for value in found[name]) for name in ("agreeing", "unchanged", "right"))
        kl, mass = finite_floats(found["kl"]), finite_floats(found["mass"])
        if len(set(map(len, (kl, agreeing, unchanged, right, mass)))) != 1:
            raise ValueError("as many entries as settings")
        sums = Agreement(questions, labelled, positions, text_tokens, unpruned_right, kl, agreeing, unchanged, right, mass)
        return AgreementRecord(str(raw["key"]), str(raw["image"]), str(raw["name"]), sums)


class Measurer(Protocol):
    """What runs one image; see `calibration.agreement.AgreementReader`."""

    def measure(self, image: Image.Image, questions: Sequence[Question], grid: Grid) -> Agreement: ...


@dataclass(frozen=True, slots=True)
class Collected:
    """`records` ascend by the images' contents; `skipped` are names and reasons, `repeated` files with an earlier one's contents."""

    records: tuple[AgreementRecord, ...]
    skipped: tuple[tuple[str, str], ...]
    repeated: tuple[str, ...]
    resumed: int


@dataclass(frozen=True, slots=True)
class _Asked:
    """An image, by its contents, and everything that is asked about it, in an order of its own."""

    image: CalibrationImage
    digest: str
    questions: tuple[Question, ...]

    @property
    def key(self) -> str:
        asked = json.dumps([self.digest, [(question.text, question.answer) for question in self.questions]])
        return hashlib.sha256(asked.encode()).hexdigest()


def collect_agreement(
    questions: Sequence[Question], folder: Path, grid: Grid, journal: AgreementJournal, load: Callable[[], Measurer], *,
    limit: int | None = None, seed: int = 0, progress: Callable[[int], None] = lambda _: None,
) -> Collected:  # fmt: skip
    """Measures all images, or `limit` of them drawn by `seed`.

    Args:
        folder: that the images' names are shown relative to.
        load: called once, before the first image that the journal does not hold.
        progress: called with 1 for each image that counts.

    Raises:
        InputError: no image can be used, or a number is not finite (image, and layer or setting, are named).
        StorageError: the journal cannot be written.
    """
    asked, skipped, repeated = _gather(questions, folder)
    order = np.arange(len(asked)) if limit is None else np.random.default_rng(seed).permutation(len(asked))
    measurer: Measurer | None = None
    records: list[AgreementRecord] = []
    resumed = 0
    for one in (asked[index] for index in order):
        if limit is not None and len(records) >= limit:
            break
        record = journal.get(one.key)
        if record is None:
            try:
                pixels = open_image(one.image)
            except (InputError, StorageError) as error:
                skipped.append((one.image.name, str(error)))
                continue
            measurer = measurer or load()
            try:
                record = AgreementRecord(one.key, one.digest, one.image.name, measurer.measure(pixels, one.questions, grid))
            except InputError as error:
                raise InputError(f"image {one.image.name}, {error}") from error
            journal.append(record)
        else:
            resumed += 1
        records.append(record)
        progress(1)
    if not records:
        raise InputError(f"none of {len(asked) + len(skipped)} images can be used; the first: {min(skipped)[1]}")
    return Collected(tuple(sorted(records, key=lambda record: record.image)), tuple(sorted(skipped)), tuple(repeated), resumed)


def _gather(questions: Sequence[Question], folder: Path) -> tuple[list[_Asked], list[tuple[str, str]], list[str]]:
    """Images by their contents, ascending, with their questions; those that cannot be read; those that repeat another."""
    found: dict[str, tuple[CalibrationImage, list[Question]]] = {}
    skipped, repeated = [], []
    for path, group in sorted(by_image(questions), key=lambda pair: str(pair[0])):
        image = CalibrationImage(path, path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path))
        try:
            digest = image.sha256()
        except StorageError as error:
            skipped.append((image.name, str(error)))
            continue
        if digest in found:
            repeated.append(image.name)
            found[digest][1].extend(group)
        else:
            found[digest] = (image, list(group))
    asked = []
    for digest, (image, group) in sorted(found.items()):
        different = {(question.text, question.answer or ""): question for question in group}
        asked.append(_Asked(image, digest, tuple(different[key] for key in sorted(different))))
    return asked, skipped, repeated
