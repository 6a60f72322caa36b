"""Bundles whose manifest and files do not belong together are refused when they are loaded, or at the latest when they run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import BundleError, EngineError
from runtime.names import MANIFEST_FILE
from runtime.pipeline import load


def signed(bundle: Path, folder: Path, change: Callable[[dict[str, Any]], object], **texts: str) -> Path:
    """A copy of a bundle with its manifest changed, and files replaced with hashes that fit."""
    shutil.copytree(bundle, folder)
    raw = json.loads((folder / MANIFEST_FILE).read_text())
    for name, text in texts.items():
        name = name.replace("_json", ".json").replace("_jinja", ".jinja")
        (folder / name).write_text(text)
        raw["files"][name] = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    change(raw)
    (folder / MANIFEST_FILE).write_text(json.dumps(raw))
    return folder


def inputs(raw: dict[str, Any], graph: str) -> list[dict[str, Any]]:
    tensors: list[dict[str, Any]] = raw["graphs"][graph]["inputs"]
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: inputs(m, "vision")[0].update(name="pixels"), "vision: its inputs are not those of the manifest"),
        (lambda m: inputs(m, "pre_ecl").reverse(), "pre_ecl: its inputs are not those of the manifest"),
        (lambda m: m["graphs"]["post_ecl"]["outputs"].pop(0), "post_ecl: its outputs are not those of the manifest"),
        (lambda m: inputs(m, "pre_ecl")[0].update(dtype="float16"), "pre_ecl: its inputs are not those of the manifest"),
        (lambda m: inputs(m, "pre_ecl")[0]["shape"].append(1), "pre_ecl: its inputs are not those of the manifest"),
        (lambda m: inputs(m, "score.4")[0].update(shape=["N", 99]), "score.4: its inputs are not those of the manifest"),
        (lambda m: m["graphs"].update(vision=m["graphs"]["pre_ecl"] | {"file": "vision.onnx"}), "vision: its inputs are not those of"),
    ],
)  # fmt: skip
def test_a_graph_that_is_not_what_the_manifest_says_is_refused(
    tiny_bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(EngineError, match=f"{message}.*export the bundle again"):
        load(signed(tiny_bundle, tmp_path / "b", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["geometry"].update(kv_heads=2), "pre_ecl's caches are not those of layers 0 to 1 with 2 key-value heads of 16"),
        (lambda m: m["geometry"].update(head_size=8), "pre_ecl's caches are not those of layers 0 to 1 with 4 key-value heads of 8"),
        (lambda m: m["geometry"].update(layers=5), "post_ecl's caches are not those of layers 2 to 4"),
        (lambda m: m.update(split_layer=1), "pre_ecl's caches are not those of layers 0 to 0"),
        (lambda m: m["graphs"].pop("vision"), "the manifest has no graph vision"),
        (lambda m: m["graphs"].pop("post_ecl"), "the manifest has no graph post_ecl"),
        (lambda m: m["graphs"].update({"score.4": m["graphs"]["score.2"]}), "the graph score.4 does not keep 4 tokens"),
        (lambda m: m["geometry"].update(vocab_size=10), r"embed_tokens.fp32.bin has \d+ bytes, a table of \(10, 64\) needs 2560"),
        (lambda m: m.update(embedding="vision.onnx"), r"vision.onnx has \d+ bytes, a table"),
        (lambda m: m["graphs"]["vision"].update(file="score.4.onnx"), "."),
    ],
)  # fmt: skip
def test_a_geometry_that_is_not_the_graphs_is_refused(
    tiny_bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises((BundleError, EngineError), match=message):
        load(signed(tiny_bundle, tmp_path / "b", change))


def test_another_number_of_visual_tokens_is_noticed(tiny_bundle: Path, tmp_path: Path) -> None:
    vlm = load(signed(tiny_bundle, tmp_path / "b", lambda m: m["geometry"].update(visual_tokens=9)))
    with pytest.raises(BundleError, match="the vision graph gave 16 rows for 9 visual tokens: export the bundle again"):
        vlm.generate("what is this?", [np.zeros((56, 56, 3), np.uint8)])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"generation_config_json": "{"}, "generation_config.json is not valid JSON"),
        ({"generation_config_json": "[]"}, "generation_config.json must hold a JSON object"),
        ({"generation_config_json": '{"num_beams": 4}'}, "generation_config.json asks for num_beams = 4"),
        ({"special_tokens_json": "{"}, "special_tokens.json is not valid JSON"),
        ({"special_tokens_json": "[]"}, "special_tokens.json must hold a JSON object"),
        ({"tokenizer_json": "{}"}, "tokenizer.json is not a tokenizer this version reads"),
        ({"preprocessor_config_json": "{"}, "preprocessor_config.json is not valid JSON"),
        ({"chat_template_jinja": "{% if %}"}, "the chat template is not valid"),
    ],
)
def test_a_text_file_that_cannot_be_used_is_named(tiny_bundle: Path, tmp_path: Path, texts: dict[str, str], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        load(signed(tiny_bundle, tmp_path / "b", lambda m: None, **texts))


@pytest.mark.parametrize(
    "name", ["generation_config.json", "special_tokens.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"]
)
def test_a_text_file_that_is_neither_listed_nor_there_is_named(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    folder = signed(tiny_bundle, tmp_path / "b", lambda m: m["files"].pop(name))
    (folder / name).unlink()
    with pytest.raises(BundleError, match=name.replace("chat_template", "template")):
        load(folder)
