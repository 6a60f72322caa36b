"""bundle.json: read back as written, and nothing believed that is malformed, altered, too new or leads out of the bundle."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import BundleError, StorageError
from runtime.manifest import (
    MAX_MANIFEST_BYTES,
    SCHEMA_VERSION,
    FileInfo,
    Geometry,
    GraphInfo,
    Manifest,
    Source,
    TensorInfo,
    check_files,
    read_manifest,
    schema_for,
    sha256_of,
)
from runtime.names import MANIFEST_FILE

CONTENTS = {"vision.onnx": b"graph one", "score.4.onnx": b"graph two", "table.bin": bytes(range(256)) * 1000, "notes.json": b"{}"}
Change = Callable[[dict[str, Any]], object]


def manifest() -> Manifest:
    graph = GraphInfo("vision.onnx", (TensorInfo("x", "float32", (1, "n")),), (TensorInfo("y", "int64", (4,)),))
    return Manifest(
        schema_version=SCHEMA_VERSION, tool_version="0.1.0", created="2026-01-01T00:00:00+00:00", family="llava15", model="tiny",
        target="cpu", precision="fp32", source=Source("checkpoint", "0" * 64), geometry=Geometry(4, 64, 4, 2, 16, 400, 1, 16),
        split_layer=2, score_mode="trace", budgets=(4,), max_context=512, image_token="<image>", image_token_id=4, embedding="table.bin",
        graphs={"vision": graph, "score.4": dataclasses.replace(graph, file="score.4.onnx")},
        files={name: FileInfo(len(data), hashlib.sha256(data).hexdigest()) for name, data in CONTENTS.items()}, flops={"vision": 1.5e9},
    )  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name, data in CONTENTS.items():
        (folder / name).write_bytes(data)
    (folder / MANIFEST_FILE).write_text(manifest().to_json())
    return folder


def rewritten(bundle: Path, change: Change) -> Path:
    raw = json.loads((bundle / MANIFEST_FILE).read_text())
    change(raw)
    (bundle / MANIFEST_FILE).write_text(json.dumps(raw))
    return bundle


def refused(bundle: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        check_files(bundle, read_manifest(bundle))


# ---------------------------------------------------------------- reading


def test_a_manifest_reads_back_as_it_was_written(bundle: Path) -> None:
    read = read_manifest(bundle)
    assert read == manifest()
    assert Manifest.from_json(read.to_json()) == read
    check_files(bundle, read)


def offering(threshold: Any = 0.9) -> Manifest:
    """A manifest that offers a budget for each image."""
    graphs = manifest().graphs
    return dataclasses.replace(manifest(), budgets=(4, 2), graphs={**graphs, "score.2": graphs["score.4"]}, auto_keep=threshold)


@pytest.mark.parametrize("threshold", [0.9, 1.0, 1, 1e-9])
def test_a_threshold_reads_back_and_is_of_schema_2(threshold: float) -> None:
    text = offering(threshold).to_json()
    assert Manifest.from_json(text) == offering(threshold)
    assert schema_for(threshold) == 2
    with pytest.raises(BundleError, match="auto_keep is an entry of schema 2, the bundle has schema 1: export the bundle again"):
        Manifest.from_json(text.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 1'))


@pytest.mark.parametrize("version", [1, 2])
def test_a_bundle_without_a_threshold_is_what_it_was_in_schema_1(version: int) -> None:
    assert schema_for(None) == 1
    old = dataclasses.replace(manifest(), schema_version=version)
    assert "auto_keep" not in json.loads(old.to_json()), "a runtime that reads schema 1 refuses entries that it does not know"
    assert Manifest.from_json(old.to_json()) == old
    assert Manifest.from_json(json.dumps({**json.loads(old.to_json()), "auto_keep": None})) == old


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "0", "0.0", "2", "-0.5", "1.0000001", "1e400", "9" * 4000])
def test_a_threshold_out_of_range_is_refused(value: str) -> None:
    text = offering().to_json().replace('"auto_keep": 0.9', f'"auto_keep": {value}')
    with pytest.raises(BundleError, match=r"^auto_keep is .{1,90}, expected above 0 and up to 1, or null: export the bundle again$"):
        Manifest.from_json(text)


@pytest.mark.parametrize("value", ["true", "false", '"0.9"', '""', "[0.9]", "[]", "{}"])
def test_a_threshold_of_the_wrong_type_is_refused(value: str) -> None:
    text = offering().to_json().replace('"auto_keep": 0.9', f'"auto_keep": {value}')
    with pytest.raises(BundleError, match=r"bundle.json: auto_keep: .* has the wrong type: export the bundle again"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": (4,)}, "the bundle has 1 and mode trace"),
        ({"budgets": (4, 4)}, "the bundle has 1 and mode trace"),
        ({"score_mode": "random"}, "the bundle has 2 and mode random"),
        ({"score_mode": "uniform"}, "the bundle has 2 and mode uniform"),
    ],
)
def test_a_threshold_without_a_choice_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=f"auto_keep chooses among several budgets by score, {message}: export the bundle again"):
        dataclasses.replace(offering(), **changes)


def test_bytes_of_a_cached_token_follow_from_the_geometry() -> None:
    assert manifest().geometry.kv_bytes_per_token(3) == 2 * 3 * 2 * 16 * 4


def test_hashes_are_sha256_of_the_whole_file(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes((1 << 20) + 17)
    (tmp_path / "x").write_bytes(data)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    with pytest.raises(StorageError, match=r"cannot read .*/nothing: No such file"):
        sha256_of(tmp_path / "nothing")


# ---------------------------------------------------------------- no manifest


def test_a_place_without_a_bundle_names_the_command(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "nowhere", "nowhere is not a directory: name a bundle made by `python -m export.build`")
    refused(tmp_path / "file", "file is not a directory")
    refused(tmp_path, "holds no bundle.json: name a bundle made by `python -m export.build`")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bundle.json is not valid JSON .*: export the bundle again"),
        (b'{"schema_version": 1,', "is not valid JSON"),
        (b"\xff\xfe{}", "is not UTF-8 text"),
        (b"[]", "expected an object, got list"),
        (b"null", "expected an object, got NoneType"),
        (b"{}", "missing or unknown entries"),
        (b"[" * 200_000, "is not valid JSON"),
        (b'{"schema_version": ' + b"9" * 6000 + b"}", "bundle.json is not valid JSON|has schema"),
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(bundle: Path, content: bytes, message: str) -> None:
    (bundle / MANIFEST_FILE).write_bytes(content)
    refused(bundle, message)


def test_a_huge_manifest_is_not_even_read(bundle: Path) -> None:
    os.truncate(bundle / MANIFEST_FILE, MAX_MANIFEST_BYTES + 1)
    refused(bundle, f"has {MAX_MANIFEST_BYTES + 1} bytes, more than any manifest")


# ---------------------------------------------------------------- its entries


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 99])
def test_a_newer_schema_asks_for_an_upgrade_whatever_else_it_holds(bundle: Path, version: int) -> None:
    message = f"the bundle has schema {version}, this version reads up to {SCHEMA_VERSION}: upgrade, or export it again"
    refused(rewritten(bundle, lambda m: m.update(schema_version=version)), message)
    (bundle / MANIFEST_FILE).write_text(json.dumps({"schema_version": version, "something": "else"}))
    refused(bundle, message)


PATHS = [field.name for field in dataclasses.fields(Manifest)]


@pytest.mark.parametrize(
    "name", [n for n in PATHS if n not in ("flops", "auto_keep", "memory", "engines", "engine", "kv_write", "variants")]
)
def test_a_missing_entry_is_named(bundle: Path, name: str) -> None:
    refused(rewritten(bundle, lambda m: m.pop(name)), rf"missing or unknown entries \['{name}'\]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(extra=1), r"bundle.json: missing or unknown entries \['extra'\]"),
        (lambda m: m["geometry"].update(depth=3), r"bundle.json: geometry: missing or unknown entries \['depth'\]"),
        (lambda m: m["graphs"]["vision"].pop("inputs"), r"bundle.json: graphs: vision: missing or unknown entries \['inputs'\]"),
        (lambda m: m["graphs"]["vision"]["inputs"][0].update(kind="x"), r"graphs: vision: inputs: missing or unknown entries \['kind'\]"),
    ],
)  # fmt: skip
def test_an_unknown_entry_is_named_with_its_place(bundle: Path, change: Change, message: str) -> None:
    refused(rewritten(bundle, change), message)


ENTRIES = ("split_layer", "model", "budgets", "graphs", "files", "geometry", "source", "flops")
VALUES: tuple[Any, ...] = (None, True, 1.5, "2", [2], {"a": 2})
WELL_TYPED = (("budgets", [2]), ("flops", {"a": 2}), ("model", "2"))


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in ENTRIES for v in VALUES if (n, v) not in WELL_TYPED])
def test_an_entry_of_the_wrong_type_is_named(bundle: Path, name: str, value: Any) -> None:
    refused(rewritten(bundle, lambda m: m.update({name: value})), f"bundle.json: {name}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(budgets=[4, "4"]), r"budgets: '4' has the wrong type"),
        (lambda m: m.update(budgets=[True]), r"budgets: True has the wrong type"),
        (lambda m: m["files"]["table.bin"].update(bytes=1.0), r"files: table.bin: bytes: 1.0 has the wrong type"),
        (lambda m: m["graphs"]["vision"]["inputs"][0]["shape"].append(None), r"shape: None has the wrong type"),
        (lambda m: m["graphs"]["vision"]["inputs"][0]["shape"].append(True), r"shape: True has the wrong type"),
        (lambda m: m.update(model="x" * 10**6 + "\n", split_layer="y" * 10**6), r"split_layer: 'y{20,70} has the wrong type"),
    ],
)
def test_a_wrong_type_deep_inside_is_named(bundle: Path, change: Change, message: str) -> None:
    refused(rewritten(bundle, change), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=0), "schema_version 0"),
        (lambda m: m.update(schema_version=-1), "schema_version -1"),
        (lambda m: m.update(split_layer=0), r"split_layer 0 is outside 1\.\.3"),
        (lambda m: m.update(split_layer=4), r"split_layer 4 is outside 1\.\.3"),
        (lambda m: m.update(score_mode="magic"), "unknown score_mode 'magic'"),
        (lambda m: m.update(budgets=[]), r"no score graph for the budgets \(none listed\)"),
        (lambda m: m.update(budgets=[4, 5]), r"no score graph for the budgets \[5\]"),
        (lambda m: m.update(max_context=0), "max_context is 0, expected 1 or more"),
        (lambda m: m.update(image_token_id=-1), "image_token_id is -1"),
        (lambda m: m["geometry"].update(kv_heads=0), "kv_heads is 0, expected 1 or more"),
        (lambda m: m["geometry"].update(head_size=-16), "head_size is -16, expected 1 or more"),
        (lambda m: m["geometry"].update(visual_tokens=0), "visual_tokens is 0, expected 1 or more"),
        (lambda m: m["files"]["table.bin"].update(bytes=-1), "table.bin"),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_named(bundle: Path, change: Change, message: str) -> None:
    refused(rewritten(bundle, change), message)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "a/../../b",
        "..",
        "",
        "a//b",
        "C:\\windows",
        "c:x",
        "\\\\server\\share",
        "a\\..\\b",
        "nul\0byte",
        "line\nbreak",
        "\ud800",
        ".",
    ],
)
@pytest.mark.parametrize("where", ["files", "graph", "embedding"])
def test_a_path_that_leads_out_of_the_bundle_is_refused(bundle: Path, name: str, where: str) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["files"][name] = raw["files"]["table.bin"]
        if where == "graph":
            raw["graphs"]["vision"]["file"] = name
        if where == "embedding":
            raw["embedding"] = name

    refused(rewritten(bundle, change), "which is not a path inside the bundle: export the bundle again")


@pytest.mark.parametrize("where", ["graph", "embedding"])
def test_a_file_that_is_used_must_be_listed(bundle: Path, where: str) -> None:
    def change(raw: dict[str, Any]) -> None:
        if where == "graph":
            raw["graphs"]["vision"]["file"] = "unlisted.onnx"
        else:
            raw["embedding"] = "unlisted.onnx"

    (bundle / "unlisted.onnx").write_bytes(b"x")
    refused(rewritten(bundle, change), "unlisted.onnx is used but not listed among the bundle's files")


# ---------------------------------------------------------------- its files


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_flipped_bit_anywhere_is_noticed(bundle: Path, name: str, place: float) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[round(place * (len(data) - 1))] ^= 1
    (bundle / name).write_bytes(data)
    refused(bundle, rf"{name} was altered \(its SHA-256 differs from the manifest\): copy the bundle again, or export it again")
    check_files(bundle, read_manifest(bundle), hashes=False)  # sizes alone cannot tell


@pytest.mark.parametrize("size", [0, 1, -1, 5000])
@pytest.mark.parametrize("hashes", [True, False])
def test_another_size_is_noticed_even_without_hashes(bundle: Path, size: int, hashes: bool) -> None:
    size = size if size >= 0 else len(CONTENTS["table.bin"]) - 1
    os.truncate(bundle / "table.bin", size)
    with pytest.raises(BundleError, match=f"table.bin has {size} bytes, the manifest says 256000: copy the bundle again"):
        check_files(bundle, read_manifest(bundle), hashes=hashes)


def test_a_missing_file_and_a_directory_in_its_place_are_named(bundle: Path) -> None:
    (bundle / "table.bin").unlink()
    refused(bundle, "table.bin is missing from .*/bundle: copy the bundle again, or export it again")
    (bundle / "table.bin").mkdir()
    refused(bundle, "table.bin is missing from")


@pytest.mark.parametrize("inside", [True, False])
def test_a_link_is_refused_wherever_it_leads(bundle: Path, inside: bool) -> None:
    real = (bundle if inside else bundle.parent) / "elsewhere.bin"
    (bundle / "table.bin").rename(real)
    (bundle / "table.bin").symlink_to(real)
    refused(bundle, "table.bin is a link or leads out of the bundle: copy the bundle's files themselves")


def test_a_linked_folder_inside_is_refused(bundle: Path) -> None:
    outside = bundle.parent / "outside"
    outside.mkdir()
    shutil.copy(bundle / "table.bin", outside)
    (bundle / "sub").symlink_to(outside, target_is_directory=True)

    def change(raw: dict[str, Any]) -> None:
        raw["files"]["sub/table.bin"] = raw["files"]["table.bin"]

    refused(rewritten(bundle, change), "sub/table.bin is a link or leads out of the bundle")


def test_a_linked_bundle_is_fine(bundle: Path) -> None:
    link = bundle.parent / "link"
    link.symlink_to(bundle, target_is_directory=True)
    check_files(link, read_manifest(link))


def test_a_name_too_long_for_the_file_system_is_refused(bundle: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["files"]["x" * 5000] = copy.deepcopy(raw["files"]["table.bin"])

    refused(rewritten(bundle, change), "the manifest names 'x{40,90}, which is not a path inside the bundle")


def test_a_manifest_that_is_a_folder_is_no_manifest(bundle: Path) -> None:
    (bundle / MANIFEST_FILE).unlink()
    (bundle / MANIFEST_FILE).mkdir()
    refused(bundle, "holds no bundle.json")
