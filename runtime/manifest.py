"""The contract between exporter and runtime: `bundle.json`, read, validated and checked against the files.

The exporter writes a `Manifest`; the runtime believes nothing else about a bundle. Knows nothing about engines.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.engine_info import EngineInfo
from runtime.errors import BundleError, StorageError, shown
from runtime.memory_plan import MemoryPlan
from runtime.names import MANIFEST_FILE, SCORE_MODES, SCORELESS_MODES, score_graph

SCHEMA_VERSION = 2
AUTO_KEEP_SCHEMA = MEMORY_SCHEMA = 2  # from here on there are `auto_keep` and `memory`
MAX_MANIFEST_BYTES = 16 << 20
MAX_CONTEXT = 1 << 24
MAX_NAME = 200


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One graph input or output: numpy dtype name, and a shape of sizes and symbolic dimension names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class GraphInfo:
    """One engine graph: the ONNX file inside the bundle and its whole I/O table."""

    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of the bundle: its size and SHA-256 (hexadecimal)."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Geometry:
    """The decoder's numbers that the runtime needs; `visual_tokens` is what one image gives (N of one image)."""

    layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    head_size: int
    vocab_size: int
    position_rows: int
    visual_tokens: int

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            _check_positive(entry.name, getattr(self, entry.name))

    def kv_bytes_per_token(self, layers: int, bytes_per_value: int = 4) -> int:
        """Bytes one token takes in the KV cache of `layers` layers."""
        return 2 * layers * self.kv_heads * self.head_size * bytes_per_value


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights came from: checkpoint directory's name, and the SHA-256 over its weight files' own hashes."""

    checkpoint: str
    revision: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a runtime may believe about a bundle.

    `split_layer` is K: layers 0..K-1 see every token. `budgets` are the keep counts built in, the default first. `flops` holds
    counted figures per stage (report.json has the details). `embedding` is the token table's file, [vocab, hidden] float32 row
    after row. `image_token` is the placeholder's text in a rendered prompt. `auto_keep` is the share of the scores' mass that the budget
    chosen for an image must hold (`runtime.budgets`); None where the bundle offers no choice. `memory` is what the
    bundle needs of its target; None in bundles of before. `engines` are what `runtime.compile` made of the graphs.
    """

    schema_version: int
    tool_version: str
    created: str
    family: str
    model: str
    target: str
    precision: str
    source: Source
    geometry: Geometry
    split_layer: int
    score_mode: str
    budgets: tuple[int, ...]
    max_context: int
    image_token: str
    image_token_id: int
    embedding: str
    graphs: dict[str, GraphInfo]
    files: dict[str, FileInfo]
    flops: dict[str, float] = field(default_factory=dict)
    memory: MemoryPlan | None = None
    auto_keep: float | None = None
    engines: tuple[EngineInfo, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.schema_version <= SCHEMA_VERSION:
            raise BundleError(f"schema_version {self.schema_version} is outside 1..{SCHEMA_VERSION}: export the bundle again")
        _check_positive("max_context", self.max_context)
        if self.max_context > MAX_CONTEXT or self.geometry.visual_tokens > self.max_context:
            raise BundleError(
                f"an image has {self.geometry.visual_tokens} visual tokens in a context of {self.max_context}; a context holds an image "
                f"and at most {MAX_CONTEXT} tokens: export the bundle again"
            )
        if self.image_token_id < 0:
            raise BundleError(f"image_token_id is {self.image_token_id}, expected 0 or more: export the bundle again")
        if not 1 <= self.split_layer < self.geometry.layers:
            raise BundleError(f"split_layer {self.split_layer} is outside 1..{self.geometry.layers - 1}: export the bundle again")
        if self.score_mode not in SCORE_MODES:
            raise BundleError(f"unknown score_mode {self.score_mode!r:.60}: export the bundle again, or upgrade")
        missing = [b for b in self.budgets if score_graph(b) not in self.graphs]
        if missing or not self.budgets:
            raise BundleError(f"no score graph for the budgets {missing or '(none listed)'}: export the bundle again")
        if self.auto_keep is not None:
            self._check_auto_keep(self.auto_keep)
        if self.memory is not None and self.schema_version < MEMORY_SCHEMA:
            raise BundleError(
                f"memory is an entry of schema {MEMORY_SCHEMA}, the bundle has {self.schema_version}: export the bundle again"
            )
        for name in (*self.files, *(g.file for g in self.graphs.values()), self.embedding, *(e.file for e in self.engines)):
            _check_inside(name)
        for name in (*(g.file for g in self.graphs.values()), self.embedding, *(e.file for e in self.engines)):
            if name not in self.files:
                raise BundleError(f"{name} is used but not listed among the bundle's files: export the bundle again")
        strangers = [e.graph for e in self.engines if e.graph not in self.graphs]
        if strangers:
            raise BundleError(f"there is an engine of {strangers[0]!r:.60}, and no such graph: export and compile the bundle again")

    def _check_auto_keep(self, threshold: float) -> None:
        if not 0 < threshold <= 1:  # false for NaN
            wrong = f"auto_keep is {shown(threshold)}, expected above 0 and up to 1, or null"
        elif len(set(self.budgets)) < 2 or self.score_mode in SCORELESS_MODES:
            wrong = f"auto_keep chooses among several budgets by score, the bundle has {len(set(self.budgets))} and mode {self.score_mode}"
        elif self.schema_version < AUTO_KEEP_SCHEMA:
            wrong = f"auto_keep is an entry of schema {AUTO_KEEP_SCHEMA}, the bundle has schema {self.schema_version}"
        else:
            return
        raise BundleError(f"{wrong}: export the bundle again")

    def to_json(self) -> str:
        """The text of bundle.json; without the entries that this bundle does not use, as every schema reads it."""
        entries = dataclasses.asdict(self)
        for name in ("auto_keep", "memory", "engines"):
            if not entries[name]:
                del entries[name]
        return json.dumps(entries, indent=2) + "\n"

    def export_sha256(self) -> str:
        """SHA-256 of the manifest as it was exported: compiling engines leaves it as it is."""
        engines = {engine.file for engine in self.engines}
        files = {name: info for name, info in self.files.items() if name not in engines}
        return hashlib.sha256(dataclasses.replace(self, files=files, engines=()).to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parses and validates; unknown keys of a known schema are an error, as are missing ones and wrong types."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST_FILE} is not valid JSON ({error}): export the bundle again") from error
        if isinstance(raw, dict) and isinstance(raw.get("schema_version"), int) and raw["schema_version"] > SCHEMA_VERSION:
            raise BundleError(
                f"the bundle has schema {raw['schema_version']}, this version reads up to {SCHEMA_VERSION}: upgrade, or export it again"
            )
        result: Manifest = build_typed(cls, raw, MANIFEST_FILE)
        return result


def schema_for(auto_keep: float | None, memory: MemoryPlan | None = None) -> int:
    """The schema a bundle is written in: the oldest that has all of its entries, so that no runtime refuses what it could run."""
    return max(1 if auto_keep is None else AUTO_KEEP_SCHEMA, 1 if memory is None else MEMORY_SCHEMA)


def read_manifest(bundle: Path) -> Manifest:
    """Reads a bundle's manifest without touching its other files.

    Raises:
        BundleError: there is no bundle, or its manifest cannot be used.
        StorageError: the file system does not let it be read.
    """
    path = bundle / MANIFEST_FILE
    try:
        if not bundle.is_dir():
            raise BundleError(f"{bundle} is not a directory: name a bundle made by `python -m export.build`")
        if not path.is_file():
            raise BundleError(f"{bundle} holds no {MANIFEST_FILE}: name a bundle made by `python -m export.build`")
        size = path.stat().st_size
        if size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} has {size} bytes, more than any manifest ({MAX_MANIFEST_BYTES}): export the bundle again")
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8 text: export the bundle again") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def check_files(bundle: Path, manifest: Manifest, *, hashes: bool = True) -> None:
    """Compares every listed file with its recorded size and, with `hashes`, its SHA-256.

    Raises:
        BundleError: a file is missing, is a link, or differs; the message names it.
        StorageError: the file system does not let it be read.
    """
    for name, info in manifest.files.items():
        check_file(bundle, name, info, hashes=hashes)


def check_file(bundle: Path, name: str, info: FileInfo, *, hashes: bool = True) -> None:
    """The same for one file."""
    try:
        _check_file(bundle, name, info, hashes=hashes)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot read {bundle / name}: {error.strerror}") from error


def _check_file(bundle: Path, name: str, info: FileInfo, *, hashes: bool) -> None:
    path = bundle / name
    if path.is_symlink() or not path.resolve().is_relative_to(bundle.resolve()):
        raise BundleError(f"{name} is a link or leads out of the bundle: copy the bundle's files themselves")
    if not path.is_file():
        raise BundleError(f"{name} is missing from {bundle}: copy the bundle again, or export it again")
    size = path.stat().st_size
    if size != info.bytes:
        raise BundleError(f"{name} has {size} bytes, the manifest says {info.bytes}: copy the bundle again, or export it again")
    if hashes and sha256_of(path) != info.sha256:
        raise BundleError(f"{name} was altered (its SHA-256 differs from the manifest): copy the bundle again, or export it again")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def _check_inside(name: str) -> None:
    parts = name.replace("\\", "/").split("/")
    odd = len(name) > MAX_NAME or not name.isprintable()  # control characters, and what is no Unicode text
    if odd or os.path.isabs(name) or ":" in name or {"", ".", ".."} & set(parts):
        raise BundleError(f"the manifest names {name!r:.80}, which is not a path inside the bundle: export the bundle again")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise BundleError(f"{name} is {value}, expected 1 or more: export the bundle again")


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
