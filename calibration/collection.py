"""Measures images one at a time, those that a journal does not hold yet, and gives all records in an order of their contents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from calibration.activations import Measurement, Probe
from calibration.image_set import CalibrationImage, example_key, open_image, prompt_for
from calibration.journal import Journal, Record
from runtime.errors import InputError, StorageError

__all__ = ["Collection", "Reader", "collect"]


class Reader(Protocol):
    """What runs one image; see `calibration.activations.VisionLanguageReader`."""

    def measure(self, image: Image.Image, prompt: str, probe: Probe) -> Measurement: ...


@dataclass(frozen=True, slots=True)
class Collection:
    """`records` ascend by their keys; `skipped` holds names and reasons, `repeated` names of files with an earlier one's contents."""

    records: tuple[Record, ...]
    skipped: tuple[tuple[str, str], ...]
    repeated: tuple[str, ...]
    resumed: int


def collect(
    images: Sequence[CalibrationImage],
    prompts: Sequence[str],
    probe: Probe,
    journal: Journal,
    load_reader: Callable[[], Reader],
    *,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Collection:
    """Measures images until `limit` different ones are done, or all are.

    Args:
        load_reader: called once, before the first image that the journal does not hold.
        progress: called with 1 for each image that counts.

    Raises:
        InputError: no image can be used, or an activation is not finite; the message names image and layer.
        StorageError: the journal cannot be written.
    """
    reader: Reader | None = None
    records: dict[str, Record] = {}
    skipped: list[tuple[str, str]] = []
    repeated: list[str] = []
    resumed, seen = 0, set[str]()
    for image in images:
        if limit is not None and len(records) >= limit:
            break
        try:
            digest = image.sha256()
            if digest in seen:
                repeated.append(image.name)
                continue
            prompt = prompt_for(digest, prompts)
            key = example_key(digest, prompt)
            record = journal.get(key)
            pixels = open_image(image) if record is None else None
        except (InputError, StorageError) as error:
            skipped.append((image.name, str(error)))
            continue
        seen.add(digest)
        if pixels is not None:
            reader = reader or load_reader()
            record = _measured(reader, pixels, prompt, probe, key, digest, image.name)
            journal.append(record)
        else:
            resumed += 1
        assert record is not None
        records[key] = record
        progress(1)
    if not records:
        raise InputError(f"none of {len(images)} images can be used; the first: {skipped[0][1]}")
    return Collection(tuple(records[key] for key in sorted(records)), tuple(sorted(skipped)), tuple(sorted(repeated)), resumed)


def _measured(reader: Reader, pixels: Image.Image, prompt: str, probe: Probe, key: str, digest: str, name: str) -> Record:
    try:
        found = reader.measure(pixels, prompt, probe)
    except InputError as error:
        raise InputError(f"image {name}, {error}") from error
    return Record(key, digest, name, found.visual_tokens, found.curve, found.largest)
