"""What can be told of a bundle without loading an engine: its files, its memory, its FLOPs, and whether it was verified."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import names
from runtime.device.readiness import Readiness, readiness
from runtime.errors import BundleError, StorageError
from runtime.flops import COUNTED_TEXT_TOKENS, HEAD, decoder_flops
from runtime.machine import installed
from runtime.manifest import Manifest, TensorInfo, check_file, read_manifest, sha256_of

ENGINE_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
MAX_VERIFY_BYTES = 16 << 20
CACHE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of one value
SCORE_WORDS = {
    "trace": "matrix entropy of a token's query heads, their spectrum divided by its sum; the highest are kept",
    "row": "matrix entropy of a token's query heads, each divided by its norm; the highest are kept",
    "raw": "matrix entropy of a token's query heads as they are; the highest are kept",
    "dpp": "how much of a token's hidden state those kept before it leave open (greedy determinant); the highest are kept",
    "random": "a control: tokens drawn at random, the same for the same image",
    "energy-high": "a control: the energy of a token's query heads; the highest are kept",
    "energy-low": "a control: the energy of a token's query heads; the lowest are kept",
    "uniform": "a control: tokens at even distances over the image",
}
_CACHE_TENSOR = re.compile(rf"({re.escape(names.PAST)}|{re.escape(names.PRESENT)})(\d+)(\.\w+)")
STAGE_WORDS = {
    names.VISION: "vision tower and projector", names.PRE_ECL: "decoder before the split", names.SCORE: "score",
    names.POST_ECL: "decoder after the split", HEAD: "language-model head",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileCheck:
    """One file, its recorded size, and what is wrong with it (None: nothing)."""

    name: str
    bytes: int
    problem: str | None


@dataclass(frozen=True, slots=True)
class Budget:
    """Visual tokens kept after the split, and averaged over all layers (the paper's measure)."""

    keep: int
    average_keep: float


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes for one conversation with one image at the full context, under one budget (None: all kept)."""

    keep: int | None
    weights_bytes: int
    embedding_bytes: int
    kv_pre_bytes: int
    kv_post_bytes: int
    total_bytes: int

    @classmethod
    def of(cls, manifest: Manifest, keep: int | None) -> MemoryNeed:
        g, k, context = manifest.geometry, manifest.split_layer, manifest.max_context
        dropped = 0 if keep is None else max(0, g.visual_tokens - keep)
        weights = sum(manifest.files[name].bytes for name in manifest.weight_files)
        table = manifest.files[manifest.embedding].bytes
        value = CACHE_BYTES[next(t.dtype for t in manifest.graphs[names.PRE_ECL].inputs if t.name.startswith(names.PAST))]
        kept = max(1, context - dropped)
        if manifest.kv_write != names.IN_PLACE:  # engines take caches of one length alone
            context = kept = -(-context // names.ROUND_TO) * names.ROUND_TO
        pre = context * g.kv_bytes_per_token(k, value)
        post = kept * g.kv_bytes_per_token(g.layers - k, value)
        return cls(keep, weights, table, pre, post, weights + table + pre + post)


@dataclass(frozen=True, slots=True)
class StageFlops:
    """FLOPs of one stage of a prefill; None where it does not run."""

    words: str
    flops: float | None


@dataclass(frozen=True, slots=True)
class FlopsColumn:
    """A prefill under one budget (None: all kept); `decoder_share` is its decoder's share of keeping all."""

    keep: int | None
    stages: tuple[StageFlops, ...]
    decoder_share: float

    @classmethod
    def of(cls, manifest: Manifest, keep: int | None) -> FlopsColumn:
        suffix = "" if keep is None else f".{keep}"
        stages = tuple(
            StageFlops(words, manifest.flops.get(stage + suffix, manifest.flops.get(stage))) for stage, words in STAGE_WORDS.items()
        )
        share = decoder_flops(manifest, keep, COUNTED_TEXT_TOKENS) / decoder_flops(manifest, None, COUNTED_TEXT_TOKENS)
        return cls(keep, stages, share)


@dataclass(frozen=True, slots=True)
class Verification:
    """What verify.json says. `passed` is None without a readable one; `matches`: whether it was about this very build (None: not told)."""

    words: str
    passed: bool | None = None
    matches: bool | None = None
    date: str | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything about one bundle. `hashes`: files were compared with their SHA-256, not only with their sizes.

    `memory` is of the first target, `memory_of_others` of the rest by name.
    """

    bundle: str
    manifest: Manifest
    hashes: bool
    files: tuple[FileCheck, ...]
    budgets: tuple[Budget, ...]
    memory: tuple[MemoryNeed, ...]
    flops: tuple[FlopsColumn, ...]
    verification: Verification
    engine_version: str | None
    backends: tuple[Readiness, ...]
    memory_of_others: dict[str, tuple[MemoryNeed, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def inspect_bundle(bundle: Path, *, hashes: bool = True) -> Inspection:
    """Reads a bundle's manifest and verify.json, and compares its files with what is recorded.

    Raises:
        BundleError: there is no bundle, or its manifest cannot be used. A wrong file is told in `files` instead.
    """
    manifest = read_manifest(bundle)
    g, k = manifest.geometry, manifest.split_layer
    n, settings = g.visual_tokens, (None, *manifest.budgets)
    engine = next((version for version in map(installed, ENGINE_DISTRIBUTIONS) if version), None)
    return Inspection(
        bundle=str(bundle), manifest=manifest, hashes=hashes,
        files=tuple(_check(bundle, manifest, name, hashes) for name in manifest.files),
        budgets=tuple(Budget(keep, (k * n + (g.layers - k) * min(keep, n)) / g.layers) for keep in manifest.budgets),
        memory=tuple(MemoryNeed.of(manifest, keep) for keep in settings),
        flops=_flops(manifest, settings), verification=_verification(bundle, manifest, engine), engine_version=engine,
        backends=readiness(manifest),
        memory_of_others={t: tuple(MemoryNeed.of(manifest.variant(t), keep) for keep in settings) for t in manifest.targets[1:]},
    )  # fmt: skip


def tensor_rows(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """One row for each tensor, but one for all layers' cache tensors of the same name, type and shape."""
    rows: dict[TensorInfo, list[str]] = {}
    for tensor in tensors:
        match = _CACHE_TENSOR.fullmatch(tensor.name)
        row = dataclasses.replace(tensor, name=f"{match[1]}*{match[3]}") if match else tensor
        rows.setdefault(row, []).extend([match[2]] if match else [])
    return [dataclasses.replace(row, name=row.name.replace("*", _range(found))) if found else row for row, found in rows.items()]


def _range(numbers: Sequence[str]) -> str:
    return f"{numbers[0]}..{numbers[-1]}" if len(numbers) > 1 else numbers[0]


def _flops(manifest: Manifest, settings: Sequence[int | None]) -> tuple[FlopsColumn, ...]:
    try:
        return tuple(FlopsColumn.of(manifest, keep) for keep in settings)
    except BundleError:  # recorded in part, or not at all
        return ()


def _check(bundle: Path, manifest: Manifest, name: str, hashes: bool) -> FileCheck:
    info = manifest.files[name]
    try:
        check_file(bundle, name, info, hashes=hashes)
    except (BundleError, StorageError) as error:
        return FileCheck(name, info.bytes, str(error))
    return FileCheck(name, info.bytes, None)


def _verification(bundle: Path, manifest: Manifest, engine_here: str | None) -> Verification:
    path = bundle / names.VERIFY_FILE
    again = f"python -m export.verify {bundle}"
    if not path.is_file():
        return Verification(f"there is none: {again} makes the comparison")
    try:
        if path.stat().st_size > MAX_VERIFY_BYTES:
            raise ValueError("too large")
        report = json.loads(path.read_text(encoding="utf-8"))
        passed, date, checks = bool(report["passed"]), str(report["date"]), report["checks"]
        failed = [str(check["name"]) for check in checks if not check["passed"]]
        recorded, engine = report["bundle"].get("manifest_sha256"), str(report["onnxruntime"])
        libraries = f"transformers {report['transformers']}, torch {report['torch']}, ONNX Runtime {engine}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Verification(f"it cannot be read: {again} writes it anew")
    matches = None if recorded is None else recorded in (sha256_of(bundle / names.MANIFEST_FILE), manifest.export_sha256())
    result = f"all {len(checks)} checks passed" if passed else f"{len(failed)} of {len(checks)} checks FAILED ({', '.join(failed)})"
    about = {None: "it does not record which build it was about", True: "about this very build", False: f"about ANOTHER build: {again}"}
    now = f"; ONNX Runtime here is {engine_here}" if engine_here not in (None, engine) else ""
    return Verification(f"{result} on {date} ({libraries}){now}; {about[matches]}", passed, matches, date)
