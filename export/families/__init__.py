"""Model families: each module here is one adapter that turns a Hugging Face checkpoint into this project's own terms.

An adapter describes the checkpoint's config as a `ModelSpec` and gives its tensors *canonical names*, which are all that graph
builders ever ask for: the decoder's as in a plain Llama (`embed_tokens.weight`, `layers.{i}.self_attn.q_proj.weight`,
`norm.weight`, `lm_head.weight`), the tower's under `vision.`, the projector's under `projector.`.

A new family is a new module with a `FAMILY` object; nothing else names it.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from export.checkpoint import CONFIG_FILE, FLOAT_TYPES, Checkpoint
from export.spec import ModelSpec
from runtime.errors import CheckpointError, UsageError

IGNORED_SUFFIXES = ("embeddings.position_ids", "rotary_emb.inv_freq")  # buffers that older versions saved
QUANTISED_SUFFIXES = (".qweight", ".qzeros", ".scales", ".weight_scale", ".weight_packed", ".absmax", ".quant_map", ".SCB")
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


class Family(Protocol):
    """What an adapter module's `FAMILY` offers."""

    name: str

    def matches(self, config: dict[str, Any]) -> bool:
        """Whether a config.json is of this family, by its architecture alone."""
        ...

    def describe(self, config: dict[str, Any]) -> ModelSpec:
        """The model in plain numbers; CheckpointError names the entry that is not implemented."""
        ...

    def canonical(self, stored: str) -> str | None:
        """The canonical name of a checkpoint's tensor; None where the name is not of this family."""
        ...

    def shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        """Every tensor the graphs need: canonical name and shape."""
        ...

    def is_unused(self, name: str, spec: ModelSpec) -> bool:
        """Whether a canonical name is of a known part of the model that never runs."""
        ...

    def only_if_zero(self, name: str) -> bool:
        """Whether a canonical name is of a term that is not implemented, and harmless when it is all zero."""
        ...


def families() -> tuple[str, ...]:
    """The names of the families that have an adapter here."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def adapter_for(config: dict[str, Any], family: str) -> Family:
    """The family's adapter, if the checkpoint's config.json is of that family.

    Raises:
        UsageError: there is no adapter of that name.
        CheckpointError: the config is of another architecture.
    """
    adapter = find_adapter(family)
    if not adapter.matches(config):
        fitting = [name for name in families() if find_adapter(name).matches(config)]
        hint = f"choose a --model of family {fitting[0]}" if fitting else "this architecture is not implemented"
        raise CheckpointError(
            f"the checkpoint is not of family {family}: its {CONFIG_FILE} has model_type {config.get('model_type')!r} "
            f"and architectures {config.get('architectures')!r}; {hint}"
        )
    return adapter


def find_adapter(family: str) -> Family:
    """The adapter of a family by its name; UsageError where there is none."""
    if family not in families():
        raise UsageError(f"there is no model family {family!r}: known are {', '.join(families())}")
    adapter: Family = importlib.import_module(f"{__name__}.{family}").FAMILY
    return adapter


class FamilyWeights:
    """A checkpoint's tensors under their canonical names, in float32."""

    def __init__(self, checkpoint: Checkpoint, adapter: Family, spec: ModelSpec) -> None:
        self._checkpoint = checkpoint
        self._adapter = adapter
        self._spec = spec
        self._shapes = adapter.shapes(spec)
        self._stored: dict[str, str] = {}
        self._foreign: list[str] = []
        for stored in checkpoint.names():
            name = adapter.canonical(stored)
            if stored.endswith(IGNORED_SUFFIXES):
                continue
            if name is None:
                self._foreign.append(stored)
            elif name in self._stored:
                raise CheckpointError(
                    f"the checkpoint holds {self._stored[name]} and {stored}, which are the same tensor: remove one of them"
                )
            else:
                self._stored[name] = stored

    def names(self) -> tuple[str, ...]:
        """The canonical names of all tensors that the graphs need."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape the spec gives a tensor."""
        return self._shapes[self._source(name)]

    def bytes_to_write(self, bytes_per_value: int = 4) -> int:
        """Size of all tensors as a bundle stores them: every one once, and a tied head beside its embedding table."""
        tied = [EMBEDDING] if self._spec.decoder.tied_embeddings else []
        return bytes_per_value * sum(math.prod(self._shapes[name]) for name in (*self._shapes, *tied))

    def stored_name(self, name: str) -> str:
        """The checkpoint's own name of a tensor; a tied head's is the embedding's.

        Raises:
            CheckpointError: the checkpoint does not hold it.
        """
        source = self._source(name)
        if source not in self._stored:
            raise CheckpointError(f"the checkpoint {self._checkpoint.directory} has no tensor {source}: fetch it again")
        return self._stored[source]

    def read(self, name: str) -> np.ndarray:
        """One tensor by its canonical name, float32, owned by the caller. A tied head reads as the embedding."""
        return self._checkpoint.read(self.stored_name(name))

    def validate(self) -> None:
        """Checks that every expected tensor exists with its shape and a floating-point type, and nothing unknown besides.

        Raises:
            CheckpointError: names what is missing, unexpected or wrong (the first few of each, and how many).
        """
        present = [name for name in self._shapes if name in self._stored]
        problems = [
            _listed("missing", [name for name in self._shapes if name not in self._stored]),
            _listed("of the wrong shape", [text for name in present if (text := self._shape_problem(name))]),
            _listed("of a type that is not read", [text for name in present if (text := self._type_problem(name))]),
            _listed("unexpected", self._unexpected()),
        ]
        found = [problem for problem in problems if problem]
        if found:
            quantised = any(name.endswith(QUANTISED_SUFFIXES) for name in self._checkpoint.names())
            advice = (
                "it looks already quantised: use the original checkpoint"
                if quantised
                else "use the checkpoint as published, with its own config"
            )
            raise CheckpointError(f"the tensors of {self._checkpoint.directory} do not fit its {CONFIG_FILE}: {'; '.join(found)}; {advice}")
        self._check_values()

    def _source(self, name: str) -> str:
        return EMBEDDING if name == HEAD and self._spec.decoder.tied_embeddings else name

    def _shape_problem(self, name: str) -> str | None:
        shape = self._checkpoint.shape(self._stored[name])
        return None if shape == self._shapes[name] else f"{self._stored[name]} {list(shape)} (expected {list(self._shapes[name])})"

    def _type_problem(self, name: str) -> str | None:
        dtype = self._checkpoint.dtype(self._stored[name])
        return None if dtype in (known for known, _ in FLOAT_TYPES.values()) else f"{self._stored[name]} ({dtype})"

    def _unexpected(self) -> list[str]:
        known = {
            n
            for n in self._stored
            if n in self._shapes or self._adapter.is_unused(n, self._spec) or self._adapter.only_if_zero(n) or n == HEAD
        }
        return [*self._foreign, *(stored for name, stored in self._stored.items() if name not in known)]

    def _check_values(self) -> None:
        for name, stored in self._stored.items():
            if name not in self._shapes and self._adapter.only_if_zero(name) and self._checkpoint.read(stored).any():
                raise CheckpointError(
                    f"the checkpoint's {stored} is not zero, and such a term is not implemented: use a checkpoint without it"
                )
        if self._spec.decoder.tied_embeddings and HEAD in self._stored:
            head, table = self._checkpoint.read(self._stored[HEAD]), self.read(EMBEDDING)
            if not np.array_equal(head, table):
                raise CheckpointError(
                    f"{CONFIG_FILE} says tie_word_embeddings, but {self._stored[HEAD]} differs from the embedding: set the entry to false"
                )


def _listed(what: str, names: list[str], shown: int = 3) -> str | None:
    if not names:
        return None
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {what} ({', '.join(names[:shown])}{more})"


@dataclass(frozen=True, slots=True)
class ConfigEntries:
    """One object of a config.json, read entry by entry; every error names the entry in full. `null` counts as absent."""

    values: dict[str, Any]
    where: str = ""

    def section(self, name: str) -> ConfigEntries:
        """A nested object, empty where there is none."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "an object")
        return ConfigEntries(value or {}, f"{self.where}{name}.")

    def count(self, name: str, default: int, minimum: int = 1) -> int:
        """A whole number of at least `minimum`."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(name, f"a whole number of at least {minimum}")
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.error(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def choice(self, name: str, default: str, accepted: Collection[str]) -> str:
        """A text that must be one of those implemented."""
        value = self._get(name, default)
        if value not in accepted:
            raise self.error(name, " or ".join(repr(text) for text in accepted))
        return str(value)

    def require(self, name: str, *accepted: object) -> None:
        """Refuses an entry that is there with any other value."""
        value = self.values.get(name)
        if value is not None and value not in accepted:
            raise self.error(name, " or ".join(repr(value) for value in accepted) or "no such entry")

    def error(self, name: str, expected: str) -> CheckpointError:
        """The error that an entry has a value which is not implemented."""
        return CheckpointError(f"{CONFIG_FILE}: {self.where}{name} = {self.values.get(name)!r} is not implemented; expected {expected}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value
