"""Typed values out of parsed JSON: dataclasses, tuples, dictionaries and optional entries, strict about what is unknown or missing."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from runtime.errors import BundleError


def build_typed(kind: Any, value: Any, where: str) -> Any:
    """Makes a typed value out of parsed JSON; raises BundleError, which says which entry is wrong."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType) and type(None) in typing.get_args(kind):  # an optional entry
        (kind,) = (member for member in typing.get_args(kind) if member is not type(None))
        return None if value is None else build_typed(kind, value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise BundleError(f"{where}: expected an object, got {type(value).__name__}: export the bundle again")
        hints = typing.get_type_hints(kind)
        needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
        wrong = sorted(needed - set(value)) or sorted(set(value) - set(hints))
        if wrong:
            raise BundleError(f"{where}: missing or unknown entries {wrong}: export the bundle again")
        return kind(**{k: build_typed(hints[k], v, f"{where}: {k}") for k, v in value.items()})
    if origin is tuple and isinstance(value, list):
        return tuple(build_typed(typing.get_args(kind)[0], v, where) for v in value)
    if origin is dict and isinstance(value, dict):
        return {k: build_typed(typing.get_args(kind)[1], v, f"{where}: {k}") for k, v in value.items()}
    accepted = typing.get_args(kind) if origin in (typing.Union, types.UnionType) else (kind,)
    accepted = (*accepted, int) if float in accepted else accepted
    if origin in (tuple, dict) or not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise BundleError(f"{where}: {value!r:.60} has the wrong type: export the bundle again")
    return value
