"""The model that a calibration is about: its config, its checkpoint, its geometry, and a plan for exactly these."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from calibration.activations import VisionLanguageReader, load_reader
from export import TOOL_VERSION
from export.calibration_plan import SCHEMA_VERSION, CalibrationPlan, PlanGeometry
from export.checkpoint import Checkpoint
from export.configs import ModelConfig, load_model_config
from export.families import FamilyWeights, adapter_for
from export.spec import ModelSpec
from runtime.errors import UsageError
from runtime.manifest import Source

__all__ = ["Subject", "check_sample", "now"]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model of configs/models with its checkpoint, headers checked, no weights read."""

    model: ModelConfig
    checkpoint: Checkpoint
    spec: ModelSpec

    @classmethod
    def open(cls, model_name: str, checkpoint_name: str | None) -> Subject:
        """Opens a checkpoint (None: the model's own).

        Raises:
            UsageError: unknown model.
            CheckpointError: the checkpoint is missing, incomplete or not implemented.
        """
        model = load_model_config(model_name)
        checkpoint = Checkpoint.open(checkpoint_name or model.default_checkpoint())
        adapter = adapter_for(checkpoint.config, model.family)
        spec = adapter.describe(checkpoint.config)
        FamilyWeights(checkpoint, adapter, spec).validate()
        return cls(model, checkpoint, spec)

    @property
    def visual_tokens(self) -> int:
        """N, of one image."""
        return self.spec.vision.visual_tokens

    def load(self, device: str, dtype: str) -> VisionLanguageReader:
        """Model and processor; see `calibration.activations.load_reader`."""
        return load_reader(self.checkpoint.directory, self.spec.family, device, dtype)

    def plan(self, split_layer: int, evidence: dict[str, Any]) -> CalibrationPlan:
        """A new plan, without budgets or score mode; reads every weight file, for their hash."""
        return CalibrationPlan(
            schema_version=SCHEMA_VERSION, tool_version=TOOL_VERSION, created=now(), model=self.model.name, family=self.spec.family,
            source=Source(self.checkpoint.name, self.checkpoint.revision), geometry=PlanGeometry.of(self.spec), split_layer=split_layer,
            evidence=evidence,
        )  # fmt: skip


def now() -> str:
    """Date and time, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def check_sample(limit: int | None, seed: int) -> None:
    """Raises UsageError unless a sample of `limit` images (None: all), drawn by `seed`, can be taken."""
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}, expected at least 1 image")
    if seed < 0:
        raise UsageError(f"--seed is {seed}, expected 0 or more")
