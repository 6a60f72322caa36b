"""The file that carries a calibration into a build: `plan.json`, written by `calibration`, taken by `export.build --plan`.

Holds what was decided (split layer; budgets and score mode, where they were), what it was decided for (model, geometry, weights), and
the evidence, which no build reads. Knows nothing about how the decisions were made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.budget import check_keep, check_split
from export.checkpoint import Checkpoint
from export.configs import build_table
from export.spec import ModelSpec
from runtime.errors import StorageError, UsageError, shown
from runtime.files import write_file
from runtime.manifest import Source
from runtime.names import SCORE_MODES

__all__ = ["SCHEMA_VERSION", "CalibrationPlan", "PlanGeometry"]

SCHEMA_VERSION = 1
MAX_PLAN_BYTES = 64 << 20
AGAIN = "calibrate again, with python -m calibration.ecl"


@dataclass(frozen=True, slots=True)
class PlanGeometry:
    """The decoder's shape, and N, the visual tokens of one image."""

    layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    head_size: int
    visual_tokens: int

    @classmethod
    def of(cls, spec: ModelSpec) -> PlanGeometry:
        d = spec.decoder
        return cls(d.layers, d.hidden_size, d.query_heads, d.kv_heads, d.head_size, spec.vision.visual_tokens)

    def describe(self) -> str:
        """One line, for messages."""
        return (
            f"{self.layers} layers of {self.hidden_size}, {self.query_heads} query and {self.kv_heads} key-value heads of "
            f"{self.head_size}, {self.visual_tokens} visual tokens"
        )


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """What a calibration decided, and for what.

    Attributes:
        created: date and time, ISO 8601.
        model, family: names in configs/models and export/families.
        source: the checkpoint's name, and the SHA-256 over its weights.
        split_layer: K; layers 0..K-1 see every token.
        budgets: keep counts, the default first; None until they are calibrated.
        score_mode: None until it is calibrated.
        auto_keep: share of the entropy mass, above 0 and up to 1, that a budget chosen per image has to keep; None until calibrated.
        evidence: JSON data for people and pictures.
    """

    schema_version: int
    tool_version: str
    created: str
    model: str
    family: str
    source: Source
    geometry: PlanGeometry
    split_layer: int
    budgets: tuple[int, ...] | None = None
    score_mode: str | None = None
    auto_keep: float | None = None
    evidence: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(getattr(self.geometry, entry.name) < 1 for entry in dataclasses.fields(self.geometry)):
            raise UsageError(f"the plan's geometry has an entry below 1 ({self.geometry.describe()}): {AGAIN}")
        check_split(self.split_layer, layers=self.geometry.layers)
        for keep in self.budgets or ():
            check_keep(keep, visual_tokens=self.geometry.visual_tokens)
        if self.budgets == ():
            raise UsageError(f"budgets are an empty list, expected keep counts or no entry at all: {AGAIN}")
        if self.score_mode is not None and self.score_mode not in SCORE_MODES:
            raise UsageError(f"unknown score_mode {shown(self.score_mode)}, expected one of {', '.join(SCORE_MODES)}: {AGAIN}")
        if self.auto_keep is not None and not 0 < self.auto_keep <= 1:
            raise UsageError(f"auto_keep is {self.auto_keep:g}, expected a share above 0 and up to 1: {AGAIN}")

    def to_json(self) -> str:
        """The file's text; equal plans give equal texts."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Writes the file whole or not at all.

        Raises:
            StorageError: it cannot be written; what was there is unchanged.
        """
        write_file(path, self.to_json().encode())

    @classmethod
    def read(cls, path: Path) -> CalibrationPlan:
        """Reads and validates a plan.

        Raises:
            UsageError: there is none, or it is not one that this version reads.
            StorageError: the file system does not let it be read.
        """
        return cls.parse(read_bytes(path), path.name)

    @classmethod
    def parse(cls, data: bytes, name: str) -> CalibrationPlan:
        """The same from the file's bytes; messages begin with `name`."""
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{name} is not valid JSON ({error}): copy the plan again, or {AGAIN}") from error
        if not isinstance(raw, dict) or "schema_version" not in raw:
            raise UsageError(f"{name} is not a plan (it is no JSON object with a schema_version): {AGAIN}")
        if raw["schema_version"] != SCHEMA_VERSION:
            raise UsageError(f"{name} has schema {shown(raw['schema_version'])}, this version reads {SCHEMA_VERSION}: {AGAIN}")
        evidence = raw.pop("evidence", {})
        if not isinstance(evidence, dict):
            raise UsageError(f"{name}: evidence is {shown(evidence)}, expected an object: {AGAIN}")
        try:
            plan: CalibrationPlan = build_table(cls, {key: value for key, value in raw.items() if value is not None}, name)
        except UsageError as error:
            raise UsageError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
        return dataclasses.replace(plan, evidence=evidence)

    def check(self, model: str, spec: ModelSpec, checkpoint: Checkpoint) -> None:
        """Compares what the plan is for with what it is about to be used for; reads every weight file, for their hash.

        Raises:
            UsageError: another model, geometry or other weights; the message names both.
        """
        if (self.model, self.family) != (model, spec.family):
            raise UsageError(
                f"the plan is for model {self.model} (family {self.family}), this is {model} (family {spec.family}): "
                "use the plan of this model"
            )
        geometry = PlanGeometry.of(spec)
        if self.geometry != geometry:
            raise UsageError(
                f"the plan is for {self.geometry.describe()}; the checkpoint {checkpoint.name} has {geometry.describe()}: {AGAIN}"
            )
        if self.source.revision != checkpoint.revision:
            raise UsageError(
                f"the plan is for the weights of {self.source.checkpoint} (revision {self.source.revision:.12}), the checkpoint "
                f"{checkpoint.name} has others (revision {checkpoint.revision:.12}): {AGAIN}"
            )


def read_bytes(path: Path) -> bytes:
    """A plan's bytes.

    Raises:
        UsageError: there is no such file, or it is larger than any plan.
        StorageError: it cannot be read.
    """
    try:
        if not path.is_file():
            raise UsageError(f"there is no plan {path}: check the path, or make one with python -m calibration.ecl")
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise UsageError(f"{path} has {path.stat().st_size} bytes, more than any plan ({MAX_PLAN_BYTES}): name a plan.json")
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def sha256(data: bytes) -> str:
    """SHA-256 of a plan's bytes, hexadecimal."""
    return hashlib.sha256(data).hexdigest()
