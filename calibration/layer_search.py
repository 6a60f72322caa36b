"""Finding the split layer, from a model and a directory of images to a plan: what `python -m calibration.ecl` runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from calibration.activations import Probe
from calibration.audit import PrecisionAudit
from calibration.collapse import CollapseRule, find_collapse
from calibration.collapse_picture import draw_collapse
from calibration.collection import Collection, collect
from calibration.ecl_report import describe_collapse, make_evidence, short_subject
from calibration.image_set import CalibrationImage, find_images, read_prompts
from calibration.journal import Journal, fingerprint_of
from calibration.plan_files import PlanFiles
from calibration.progress import resumable_progress
from calibration.subject import Subject, check_sample
from export.budget import check_split
from export.calibration_plan import CalibrationPlan
from runtime.files import write_file

__all__ = ["FoundLayer", "LayerSearch", "find_layer"]

JOURNAL_VERSION = 1  # raised when the same settings would give other numbers


@dataclass(frozen=True, slots=True)
class LayerSearch:
    """The command line's wishes.

    Attributes:
        model: a model of configs/models.
        checkpoint: a directory or Hugging Face id; None for the model's own.
        images, prompts: a directory, and a text file with one prompt a line (None: one default prompt).
        limit: how many different images, drawn by `seed`; None for all.
        split_layer: K given by hand; None for what the rule chooses.
        device, dtype: where the model runs, and torch's name of its type.
    """

    model: str
    images: Path
    checkpoint: str | None = None
    prompts: Path | None = None
    limit: int | None = None
    seed: int = 0
    split_layer: int | None = None
    rule: CollapseRule = CollapseRule()  # noqa: RUF009 (frozen)
    probe: Probe = Probe()  # noqa: RUF009 (frozen)
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_sample(self.limit, self.seed)


@dataclass(frozen=True, slots=True)
class FoundLayer:
    """The plan as it was written, and the report in words."""

    plan: CalibrationPlan
    text: str


def _open(search: LayerSearch) -> Subject:
    """Validates checkpoint and options against each other, reading headers alone."""
    subject = Subject.open(search.model, search.checkpoint)
    decoder = subject.spec.decoder
    if search.split_layer is not None:
        check_split(search.split_layer, layers=decoder.layers)
    search.probe.check(decoder.query_heads, decoder.kv_heads)
    return subject


def find_layer(search: LayerSearch, files: PlanFiles) -> FoundLayer:
    """Measures the images that are not in the journal yet, chooses the layer, and writes plan and picture.

    Raises:
        UsageError: an option is out of range, or does not fit the model.
        CheckpointError: the checkpoint cannot be used.
        InputError: no image can be used, or an activation is not finite.
        StorageError: a file cannot be written, or another run is writing it.
        KeyboardInterrupt: with a message; what was measured is in the journal.
    """
    files.check()
    prompts = read_prompts(search.prompts)
    images = find_images(search.images, None if search.limit is None else search.seed, leave_out=files.picture)
    measured = _open(search)
    with files.locked():
        collection = _collect(search, files, measured, images, prompts)
        found = find_collapse([record.curve for record in collection.records], measured.spec.decoder.layers, search.rule, search.seed)
        audit = PrecisionAudit.over([record.largest for record in collection.records])
        settings = _settings(search) | {"prompts": list(prompts), "limit": search.limit, "seed": search.seed, **_versions()}
        evidence = make_evidence(found, search.rule, search.split_layer, collection, audit, settings)
        plan = measured.plan(found.layer if search.split_layer is None else search.split_layer, evidence)
        picture = draw_collapse(found, plan.split_layer, f"{plan.model}: {short_subject(search.probe)}, {len(collection.records)} images")
        plan.write(files.plan)
        write_file(files.picture, picture)
    return FoundLayer(plan, describe_collapse(found, search.rule, search.split_layer, collection, audit, search.probe))


def _collect(search: LayerSearch, files: PlanFiles, model: Subject, images: list[CalibrationImage], prompts: tuple[str, ...]) -> Collection:
    fingerprint = fingerprint_of({"version": JOURNAL_VERSION, "revision": model.checkpoint.revision, **_settings(search)})
    total = len(images) if search.limit is None else min(search.limit, len(images))
    with Journal(files.journal, fingerprint) as journal, resumable_progress(total, files.journal) as step:
        return collect(
            images, prompts, search.probe, journal, lambda: model.load(search.device, search.dtype), limit=search.limit, progress=step
        )


def _settings(search: LayerSearch) -> dict[str, Any]:
    """What an image's numbers depend on, besides the image, its prompt and the weights."""
    probe = search.probe
    return {
        "tensor": probe.tensor, "matrix": probe.matrix, "centre": probe.entropy.centre, "normalise_rows": probe.entropy.normalise_rows,
        "normalise_trace": probe.entropy.normalise_trace, "device": search.device, "dtype": search.dtype,
    }  # fmt: skip


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}
