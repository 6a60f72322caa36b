"""The contract between exporter and runtime: `bundle.json`, read, validated and checked against the files.

The exporter writes a `Manifest`; the runtime believes nothing else about a bundle. Knows nothing about engines.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.engine_info import EngineInfo
from runtime.errors import BundleError, StorageError, UsageError, shown
from runtime.manifest_parts import FileInfo as FileInfo
from runtime.manifest_parts import Geometry as Geometry
from runtime.manifest_parts import GraphInfo as GraphInfo
from runtime.manifest_parts import Source as Source
from runtime.manifest_parts import TensorInfo as TensorInfo
from runtime.manifest_parts import Variant as Variant
from runtime.manifest_parts import check_positive
from runtime.memory_plan import MemoryPlan
from runtime.names import APPEND, IN_PLACE, KV_WRITES, MANIFEST_FILE, SCORE_MODES, SCORELESS_MODES, score_graph
from runtime.typed_json import build_typed as build_typed

SCHEMA_VERSION = 3
AUTO_KEEP_SCHEMA = MEMORY_SCHEMA = 2  # from here on there are `auto_keep` and `memory`
TARGETS_SCHEMA = 3  # from here on there are `engine`, `kv_write` and `variants`, and measured figures in `memory`
RUNS = ("onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt_rtx")  # what `engine` may be
MAX_MANIFEST_BYTES = 16 << 20
MAX_CONTEXT = 1 << 24
MAX_NAME = 200


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a runtime may believe about a bundle.

    `split_layer` is K: layers 0..K-1 see every token. `budgets` are the keep counts built in, the default first. `flops` holds
    counted figures per stage (report.json has the details). `embedding` is the token table's file, [vocab, hidden] float32 row
    after row. `image_token` is the placeholder's text in a rendered prompt. `auto_keep` is the share of the scores' mass that the budget
    chosen for an image must hold (`runtime.budgets`); None where the bundle offers no choice. `memory` is what the
    bundle needs of its target; None in bundles of before. `engines` are what `runtime.compile` made of the graphs.

    `target`, `precision`, `engine`, `kv_write`, `graphs`, `memory` and `engines` are those of the first target, `variants` those of the
    others by name; `variant` gives any of them as a manifest of its own. `engine` is one of `RUNS` (None: ONNX Runtime, or a bundle
    that does not say), `kv_write` one of `runtime.names.KV_WRITES`.
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
    engine: str | None = None
    kv_write: str = IN_PLACE
    variants: dict[str, Variant] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.schema_version <= SCHEMA_VERSION:
            raise BundleError(f"schema_version {self.schema_version} is outside 1..{SCHEMA_VERSION}: export the bundle again")
        check_positive("max_context", self.max_context)
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
        if not self.budgets:
            raise BundleError("no score graph for the budgets (none listed): export the bundle again")
        if self.auto_keep is not None:
            self._check_auto_keep(self.auto_keep)
        if self.memory is not None and self.schema_version < MEMORY_SCHEMA:
            raise BundleError(
                f"memory is an entry of schema {MEMORY_SCHEMA}, the bundle has {self.schema_version}: export the bundle again"
            )
        if self.schema_version < TARGETS_SCHEMA and (self.engine is not None or self.kv_write != IN_PLACE or self.variants):
            raise BundleError(
                f"engine, kv_write and variants are entries of schema {TARGETS_SCHEMA}, the bundle has {self.schema_version}: "
                "export the bundle again"
            )
        if self.target in self.variants:
            raise BundleError(f"the target {self.target!r:.60} is there twice: export the bundle again")
        for name in (*self.files, self.embedding):
            _check_inside(name)
        if self.embedding not in self.files:
            raise BundleError(f"{self.embedding} is used but not listed among the bundle's files: export the bundle again")
        self._check_target(self.engine, self.kv_write, self.graphs, self.engines)
        for variant in self.variants.values():
            self._check_target(variant.engine, variant.kv_write, variant.graphs, variant.engines)

    def _check_target(
        self, engine: str | None, kv_write: str, graphs: Mapping[str, GraphInfo], engines: Sequence[EngineInfo]
    ) -> None:  # fmt: skip
        """What a target of the bundle names must be there."""
        if engine not in (None, *RUNS) or kv_write not in KV_WRITES:
            raise BundleError(f"unknown engine {engine!r:.60} or kv_write {kv_write!r:.60}: export the bundle again, or upgrade")
        missing = [b for b in self.budgets if score_graph(b) not in graphs]
        if missing:
            raise BundleError(f"no score graph for the budgets {missing}: export the bundle again")
        for name in (*(g.file for g in graphs.values()), *(e.file for e in engines)):
            _check_inside(name)
            if name not in self.files:
                raise BundleError(f"{name} is used but not listed among the bundle's files: export the bundle again")
        strangers = [e.graph for e in engines if e.graph not in graphs]
        if strangers:
            raise BundleError(f"there is an engine of {strangers[0]!r:.60}, and no such graph: export and compile the bundle again")

    # ------------------------------------------------------------ targets

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the targets that the bundle was built for, the first one's entries at the manifest's top."""
        return (self.target, *self.variants)

    def variant(self, target: str) -> Manifest:
        """The bundle as one target sees it: a manifest with that target's entries at its top, and no others.

        Raises:
            UsageError: the bundle was not built for it; the message lists what it was built for.
        """
        if target == self.target:
            return dataclasses.replace(self, variants={}) if self.variants else self
        if target not in self.variants:
            raise UsageError(f"the bundle was not built for target {target!r:.60}: choose {' or '.join(self.targets)}, or export it again")
        own = self.variants[target]
        return dataclasses.replace(
            self, target=target, engine=own.engine, precision=own.precision, kv_write=own.kv_write, graphs=own.graphs, memory=own.memory,
            engines=own.engines, variants={},
        )  # fmt: skip

    def with_variant(self, changed: Manifest) -> Manifest:
        """The whole manifest again, with one target's memory and engines, and the files, as a caller changed them in its `variant`."""
        if changed.target == self.target:
            return dataclasses.replace(self, files=changed.files, memory=changed.memory, engines=changed.engines)
        own = dataclasses.replace(self.variants[changed.target], memory=changed.memory, engines=changed.engines)
        return dataclasses.replace(self, files=changed.files, variants={**self.variants, changed.target: own})

    def for_engine(self, engine: str) -> Manifest | None:
        """The target to run with an engine: one made for it, else one with compiled engines of it, else graphs that it can run as they are.

        Args:
            engine: one of `RUNS`.

        Raises:
            UsageError: there is no such engine.
        """
        if engine not in RUNS:
            raise UsageError(f"unknown engine {engine!r:.60}: choose one of {', '.join(RUNS)}")
        all_of_them = [self.variant(target) for target in self.targets]
        made = [m for m in all_of_them if m.engine == engine or (engine == "onnxruntime" and m.engine is None and m.target == "cpu")]
        compiled = [m for m in all_of_them if any(e.library == engine for e in m.engines)]
        runnable = [m for m in all_of_them if engine == "onnxruntime" and m.precision in ("fp32", "fp16")]
        if engine == "onnxruntime-cuda":
            runnable = [m for m in all_of_them if m.kv_write != APPEND]
            runnable.sort(key=lambda m: m.precision == "fp32")  # a GPU is made for 16 bits
        return next(iter((*made, *compiled, *runnable)), None)

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The files that hold the first target's weights, the token table left out."""
        files = [name for name in self.files if name.endswith(".bin") and name != self.embedding]
        own = [name for name in files if f".{self.precision}." in name]
        return tuple(own or files)

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
        unused: dict[str, object] = {"auto_keep": None, "memory": None, "engines": (), "engine": None, "kv_write": IN_PLACE, "variants": {}}
        for name, default in unused.items():
            if entries[name] == default:
                del entries[name]
        for own in (entries, *entries.get("variants", {}).values()):
            _leave_out_unused(own.get("memory"))
        return json.dumps(entries, indent=2) + "\n"

    def export_sha256(self) -> str:
        """SHA-256 of the manifest as it was exported: compiling engines, for whatever target, leaves it as it is."""
        engines = {engine.file for name in self.targets for engine in self.variant(name).engines}
        files = {name: info for name, info in self.files.items() if name not in engines}
        variants = {
            name: dataclasses.replace(variant, engines=(), memory=variant.memory and variant.memory.as_planned())
            for name, variant in self.variants.items()
        }
        memory = self.memory and self.memory.as_planned()
        exported = dataclasses.replace(self, files=files, engines=(), memory=memory, variants=variants)
        return hashlib.sha256(exported.to_json().encode()).hexdigest()

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


def schema_for(auto_keep: float | None, memory: MemoryPlan | None = None, *, targets: bool = False) -> int:
    """The schema a bundle is written in: the oldest that has all of its entries, so that no runtime refuses what it could run.

    Args:
        targets: whether it has an entry of `TARGETS_SCHEMA`.
    """
    return max(1 if auto_keep is None else AUTO_KEEP_SCHEMA, 1 if memory is None else MEMORY_SCHEMA, TARGETS_SCHEMA if targets else 1)


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


def _leave_out_unused(memory: dict[str, Any] | None) -> None:
    """Takes those entries out of a memory plan that runtimes of before `TARGETS_SCHEMA` do not know, where they say nothing."""
    if memory is None:
        return
    if memory["head_pieces"] == 1:
        del memory["head_pieces"]
    for item in memory["items"]:
        if item["planned_bytes"] is None:
            del item["planned_bytes"]


def _check_inside(name: str) -> None:
    parts = name.replace("\\", "/").split("/")
    odd = len(name) > MAX_NAME or not name.isprintable()  # control characters, and what is no Unicode text
    if odd or os.path.isabs(name) or ":" in name or {"", ".", ".."} & set(parts):
        raise BundleError(f"the manifest names {name!r:.80}, which is not a path inside the bundle: export the bundle again")
