"""The files of `configs/`, read and validated: one per model, one per target (what a target is stands in `export.targets`).

Found through the installed package, so a wheel outside the clone works too. Knows nothing about checkpoints' contents.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import configs
from export.spec import ClipVisionSpec, DecoderSpec, ModelSpec
from export.targets import TargetConfig
from runtime.errors import CheckpointError, UsageError
from runtime.names import SCORE_MODES


@dataclass(frozen=True, slots=True)
class GeometryConfig:
    """The geometry that random weights are made for; a checkpoint's own config.json always goes first."""

    decoder: DecoderSpec
    vision: ClipVisionSpec
    image_token_id: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One file of `configs/models`; `name` is the file's.

    `family` names the adapter in `export/families`. The default budget is either `keep` (visual tokens after the split) or
    `avg_keep` (averaged over all layers, resolved at `reference_visual_tokens`, N of one image). `score_mode` is one of
    `runtime.names.SCORE_MODES`. `checkpoint` is a directory of
    this repository, relative to its root; `hf_id` a Hugging Face repository. `max_context` counts tokens before the split.
    """

    name: str
    description: str
    family: str
    split_layer: int
    reference_visual_tokens: int
    max_context: int
    keep: int | None = None
    avg_keep: int | None = None
    score_mode: str = "trace"
    hf_id: str | None = None
    checkpoint: str | None = None
    geometry: GeometryConfig | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.avg_keep is None):
            raise UsageError(f"the config of model {self.name} must set exactly one of keep and avg_keep")
        for entry in ("split_layer", "reference_visual_tokens", "max_context", "keep", "avg_keep"):
            value = getattr(self, entry)
            if value is not None and value < 1:
                raise UsageError(f"the config of model {self.name} has {entry} = {value}; it must be at least 1")
        if self.score_mode not in SCORE_MODES:
            raise UsageError(
                f"the config of model {self.name} has score_mode {self.score_mode!r}; expected one of {', '.join(SCORE_MODES)}"
            )
        budget = self.keep or self.avg_keep or 0
        if budget > self.reference_visual_tokens:
            raise UsageError(f"the config of model {self.name} keeps {budget} of {self.reference_visual_tokens} visual tokens; keep fewer")

    @property
    def spec(self) -> ModelSpec | None:
        """The configured geometry as what graph builders take; None where the file gives none."""
        if self.geometry is None:
            return None
        return ModelSpec(self.family, self.geometry.decoder, self.geometry.vision, self.geometry.image_token_id)

    def default_checkpoint(self, root: Path | None = None) -> str:
        """What to open when no checkpoint is named: the shipped directory, or the Hugging Face repository's name.

        Args:
            root: the repository's root; found from the installed package when left out.

        Raises:
            CheckpointError: the model has no default, or its checkpoint does not come with the installed package.
        """
        if self.checkpoint is not None:
            directory = (root or Path(str(resources.files(configs))).parent) / self.checkpoint
            if not directory.is_dir():
                raise CheckpointError(
                    f"{self.name}'s checkpoint ({self.checkpoint}) is only in the repository's clone, and {directory} does not exist: "
                    "clone the repository, or name a checkpoint with --checkpoint DIR"
                )
            return str(directory)
        if self.hf_id is not None:
            return self.hf_id
        raise CheckpointError(f"model {self.name} has no default checkpoint: name one with --checkpoint DIR")


def list_models() -> tuple[str, ...]:
    """The names that `--model` takes, sorted."""
    return _names("models")


def list_targets() -> tuple[str, ...]:
    """The names that `--target` takes, sorted."""
    return _names("targets")


def load_model_config(name: str) -> ModelConfig:
    """Reads one model's config.

    Raises:
        UsageError: there is no such model (the message lists those there are), or its file is malformed.
    """
    config: ModelConfig = build_table(ModelConfig, {"name": name, **_read("models", "model", name)}, f"configs/models/{name}.toml")
    return config


def load_target_config(name: str) -> TargetConfig:
    """Reads one target's config; an alias gives the target it stands for, under that one's name.

    Raises:
        UsageError: there is no such target (the message lists those there are), or its file is malformed.
    """
    table = _read("targets", "target", name)
    if "alias_of" in table:
        where = f"configs/targets/{name}.toml"
        other = table["alias_of"]
        if set(table) - {"alias_of", "description"}:
            raise UsageError(f"{where}: an alias has no entries of its own; keep alias_of and description")
        if other == name or other not in list_targets() or "alias_of" in _read("targets", "target", other):
            raise UsageError(f"{where}: alias_of = {other!r} is not another target that is no alias itself")
        return load_target_config(other)
    config: TargetConfig = build_table(TargetConfig, {"name": name, **table}, f"configs/targets/{name}.toml")
    return config


# ---------------------------------------------------------------- reading


def _folder(kind: str) -> Traversable:
    return resources.files(configs) / kind


def _names(kind: str) -> tuple[str, ...]:
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in _folder(kind).iterdir() if entry.name.endswith(".toml")))


def _read(kind: str, word: str, name: str) -> dict[str, Any]:
    """One file as a table."""
    names = _names(kind)
    if name not in names:
        raise UsageError(f"unknown {word} {name!r}: {_guess(name.lower(), names)}--{word} takes {', '.join(names)}")
    where = f"configs/{kind}/{name}.toml"
    try:
        table = tomllib.loads((_folder(kind) / f"{name}.toml").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{where} is not valid TOML: {error}") from error
    if "name" in table:
        raise UsageError(f"{where}: the entry name is not allowed, a {word} is called as its file is")
    return table


def _guess(text: str, names: tuple[str, ...]) -> str:
    """A question about the name that was probably meant: one spelt alike, or else one that has the text in it."""
    alike = difflib.get_close_matches(text, names, n=1, cutoff=0.5) or [name for name in names if len(text) > 2 and text in name]
    return f"did you mean {alike[0]}? " if alike else ""


def build_table(cls: Any, table: dict[str, Any], where: str) -> Any:
    """Makes a dataclass out of a parsed TOML table.

    Raises:
        UsageError: an entry is unknown, missing or of the wrong type; the message begins with `where` and names it.
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(table) - set(hints))
    if unknown:
        raise UsageError(f"{where}: unknown entry {', '.join(unknown)}; known: {', '.join(hints)}")
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [entry for entry in needed if entry not in table]
    if missing:
        raise UsageError(f"{where}: missing entry {', '.join(missing)}")
    values = {entry: _value(hints[entry], value, f"{where}: {entry}") for entry, value in table.items()}
    try:
        return cls(**values)
    except CheckpointError as error:  # a geometry that no checkpoint could have
        raise UsageError(f"{where}: {error}") from error


def _value(kind: Any, value: Any, where: str) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return build_table(kind, value, where)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_value(typing.get_args(kind)[0], item, where) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(kind, type) or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{where} = {value!r} has the wrong type; expected {getattr(kind, '__name__', kind)}")
    return value
