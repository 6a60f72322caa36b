"""The shipped config files are valid and found anywhere; a malformed one or an unknown name ends with a clear line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from export.configs import ModelConfig, build_table, list_models, list_targets, load_model_config, load_target_config
from export.families.llava15 import FAMILY
from runtime.errors import CheckpointError, UsageError

ROOT = Path(__file__).resolve().parents[2]

MODEL: dict[str, Any] = {
    "name": "m", "description": "", "family": "llava15", "split_layer": 2, "reference_visual_tokens": 64, "max_context": 512, "keep": 16
}  # fmt: skip


@pytest.mark.parametrize("name", list_models())
def test_every_model_file_is_valid(name: str) -> None:
    config = load_model_config(name)
    assert config.name == name
    assert config.description


@pytest.mark.parametrize("name", list_targets())
def test_every_target_file_is_valid(name: str) -> None:
    config = load_target_config(name)
    assert config.name == (name if name != "jetson-orin" else "jetson-agx-orin-64gb")
    assert config.description


def test_the_two_models_and_the_cpu_are_there() -> None:
    assert {"tiny-llava", "llava15"} <= set(list_models())
    assert "cpu" in list_targets()
    assert load_target_config("cpu").precisions == ("fp32",)
    assert (load_model_config("llava15").avg_keep, load_model_config("llava15").split_layer) == (192, 2)


def test_the_7bs_geometry_is_what_its_config_says(model_configs: Path) -> None:
    published = json.loads((model_configs / "llava-1.5-7b-hf" / "config.json").read_text())
    spec = load_model_config("llava15").spec
    assert spec == FAMILY.describe(published)
    assert spec is not None
    assert spec.vision.visual_tokens == load_model_config("llava15").reference_visual_tokens
    assert load_model_config("tiny-llava").spec is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llava-15", r"unknown model 'llava-15': did you mean llava15\? --model takes .*llava15, .*tiny-llava"),
        ("Tiny-LLaVA", r"did you mean tiny-llava\?"),
        ("zzz", r"unknown model 'zzz': --model takes "),
        ("../targets/cpu", r"unknown model '../targets/cpu'"),
    ],
)
def test_an_unknown_model_lists_those_there_are(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model_config(name)


def test_an_unknown_target_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"unknown target 'cpus': did you mean cpu\? --target takes .*cpu"):
        load_target_config("cpus")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splitlayer": 1}, "f.toml: unknown entry splitlayer; known: name, description"),
        ({"family": None}, "f.toml: missing entry family"),
        ({"split_layer": "2"}, "f.toml: split_layer = '2' has the wrong type; expected int"),
        ({"split_layer": True}, "f.toml: split_layer = True has the wrong type"),
        ({"split_layer": 0}, "split_layer = 0; it must be at least 1"),
        ({"avg_keep": 3}, "exactly one of keep and avg_keep"),
        ({"keep": None}, "exactly one of keep and avg_keep"),
        ({"keep": 65}, "keeps 65 of 64 visual tokens"),
        ({"geometry": {"image_token_id": 1}}, "f.toml: geometry: missing entry decoder, vision"),
        ({"geometry": 3}, "f.toml: geometry = 3 has the wrong type; expected GeometryConfig"),
    ],
)
def test_a_malformed_model_file_is_named(changes: dict[str, Any], message: str) -> None:
    table = {key: value for key, value in (MODEL | changes).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        build_table(ModelConfig, table, "f.toml")


def test_a_geometry_that_cannot_be_is_named() -> None:
    spec = load_model_config("llava15").spec
    assert spec is not None
    decoder = {name: getattr(spec.decoder, name) for name in spec.decoder.__slots__}
    vision = {name: getattr(spec.vision, name) for name in spec.vision.__slots__}
    table = MODEL | {"geometry": {"image_token_id": 1, "decoder": decoder | {"kv_heads": 5}, "vision": vision}}
    with pytest.raises(UsageError, match=r"f.toml: geometry: decoder: 32 query heads cannot share 5"):
        build_table(ModelConfig, table, "f.toml")


def test_whole_numbers_are_taken_where_fractions_are_expected() -> None:
    spec = load_model_config("llava15").spec
    assert spec is not None
    assert isinstance(spec.decoder.rope_theta, float)


def test_the_default_checkpoint_is_the_shipped_directory_or_the_hubs_name(tmp_path: Path) -> None:
    (tmp_path / "tiny_llava" / "checkpoint").mkdir(parents=True)
    assert Path(load_model_config("tiny-llava").default_checkpoint(tmp_path)) == tmp_path / "tiny_llava" / "checkpoint"
    assert load_model_config("llava15").default_checkpoint() == "llava-hf/llava-1.5-7b-hf"
    with pytest.raises(CheckpointError, match="model m has no default checkpoint: name one with --checkpoint DIR"):
        build_table(ModelConfig, MODEL, "f.toml").default_checkpoint()


def test_an_installed_package_finds_its_configs_and_says_that_the_checkpoint_is_elsewhere(tmp_path: Path) -> None:
    for package in ("configs", "export", "runtime"):
        shutil.copytree(ROOT / package, tmp_path / "site" / package, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "from export.configs import *; from runtime.errors import CheckpointError\n"
        "print(*list_models(), *list_targets())\n"
        "try: load_model_config('tiny-llava').default_checkpoint()\n"
        "except CheckpointError as error: print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.stderr == ""
    assert ran.stdout.splitlines()[0] == " ".join((*list_models(), *list_targets()))
    assert "tiny-llava's checkpoint (tiny_llava/checkpoint) is only in the repository's clone" in ran.stdout
    assert "--checkpoint DIR" in ran.stdout
