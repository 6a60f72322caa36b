"""Checkpoints are read tensor by tensor, exactly, and a damaged or incomplete one ends with a line that says what to do."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export.checkpoint import Checkpoint, find_checkpoint
from runtime.errors import CheckpointError
from runtime.manifest import sha256_of

VALUES = [0.0, -0.0, 1.0, -1.5, 3.1415927, 65504.0, 6e-8, float("inf"), float("-inf"), float("nan")]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint of three tensors in one file."""
    folder = tmp_path / "a-model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "none"}')
    values = torch.tensor(VALUES).reshape(2, 5)
    save_file({"a": values, "b": values.to(torch.float16), "c": values.to(torch.bfloat16)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def sharded(directory: Path) -> Path:
    """The same tensors in two files with an index."""
    whole = Checkpoint.open(directory)
    tensors = {name: torch.from_numpy(whole.read(name)) for name in whole.names()}
    (directory / "model.safetensors").unlink()
    save_file({"a": tensors["a"], "c": tensors["c"]}, directory / "model-00001-of-00002.safetensors")
    save_file({"b": tensors["b"]}, directory / "model-00002-of-00002.safetensors")
    files = {"a": 1, "b": 2, "c": 1}
    write_index(directory, {name: f"model-0000{i}-of-00002.safetensors" for name, i in files.items()})
    return directory


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(path: Path, header: object, data_bytes: int) -> None:
    """A safetensors file with any header; the data is a hole, which takes no space."""
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + data_bytes)


# ---------------------------------------------------------------- reading


def test_every_float_type_reads_as_the_float32_that_torch_makes_of_it(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    values = torch.tensor(VALUES).reshape(2, 5)
    for name, dtype in (("a", torch.float32), ("b", torch.float16), ("c", torch.bfloat16)):
        read = checkpoint.read(name)
        assert read.dtype == np.float32
        assert read.flags.writeable
        expected = values.to(dtype).float().numpy()
        assert np.array_equal(read, expected, equal_nan=True)
        assert np.array_equal(np.signbit(read), np.signbit(expected))
        assert checkpoint.shape(name) == (2, 5)
        assert checkpoint.dtype(name) == str(dtype).removeprefix("torch.")


def test_shards_read_as_one_checkpoint(directory: Path, sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    assert set(checkpoint.names()) == {"a", "b", "c"}
    assert len(checkpoint.weight_files) == 2
    values = torch.tensor(VALUES).reshape(2, 5)
    assert np.array_equal(checkpoint.read("c"), values.to(torch.bfloat16).float().numpy(), equal_nan=True)
    assert np.array_equal(checkpoint.read("b"), values.to(torch.float16).float().numpy(), equal_nan=True)


def test_reading_a_tensor_takes_its_own_memory_only(directory: Path) -> None:
    large, small = 1 << 28, 1 << 16  # a quarter of a GB in front
    header = {
        "large": {"dtype": "F32", "shape": [large // 4], "data_offsets": [0, large]},
        "small": {"dtype": "BF16", "shape": [small // 2], "data_offsets": [large, large + small]},
    }
    write_raw(directory / "model.safetensors", header, large + small)
    tracemalloc.start()
    try:
        assert not Checkpoint.open(directory).read("small").any()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * small + 200_000


def test_an_empty_and_a_scalar_tensor_can_be_read(directory: Path) -> None:
    save_file({"none": torch.empty(0, 3), "one": torch.tensor(2.5)}, directory / "model.safetensors")
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.read("none").shape == (0, 3)
    assert checkpoint.read("one") == np.float32(2.5)


def test_the_revision_follows_the_weights_and_is_not_computed_on_opening(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def recorded(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr("export.checkpoint.sha256_of", recorded)
    checkpoint = Checkpoint.open(directory)
    assert hashed == []
    first = checkpoint.revision
    assert len(first) == 64
    assert checkpoint.revision == first
    assert hashed == ["model.safetensors"]
    copy = shutil.copytree(directory, tmp_path / "elsewhere")
    assert Checkpoint.open(copy).revision == first
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert Checkpoint.open(copy).revision != first


def test_the_size_and_the_name_are_the_directorys(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory / "." / ".." / directory.name)
    assert checkpoint.name == "a-model"
    assert checkpoint.weight_bytes == (directory / "model.safetensors").stat().st_size


# ---------------------------------------------------------------- what is missing


def test_a_missing_directory_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no directory .*/nowhere: name a Hugging Face checkpoint with --checkpoint DIR"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_file_is_not_a_checkpoint(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a directory: name the directory that holds config.json"):
        Checkpoint.open(directory / "model.safetensors")


def test_a_missing_config_is_named(directory: Path) -> None:
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"a-model holds no config.json: name a Hugging Face checkpoint's directory"):
        Checkpoint.open(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json holds a JSON list, expected an object"),
        ("\xff", "config.json is not valid JSON"),
    ],
)
def test_a_malformed_config_is_named(directory: Path, text: str, message: str) -> None:
    (directory / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(directory)


def test_missing_weights_are_named(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds neither model.safetensors nor model.safetensors.index.json: fetch the checkpoint's weights"
    ):
        Checkpoint.open(directory)


def test_pickled_weights_are_to_be_converted(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model.bin\).*convert to safetensors"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("section", [None, "text_config"])
def test_a_quantised_checkpoint_is_refused(directory: Path, section: str | None) -> None:
    entry = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (directory / "config.json").write_text(json.dumps({section: entry} if section else entry))
    where = f"{section}." if section else ""
    with pytest.raises(
        CheckpointError, match=rf"already quantised \(config.json has {where}quantization_config\): use the original checkpoint"
    ):
        Checkpoint.open(directory)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 2 weight files, but model-00002-of-00002.safetensors is missing"):
        Checkpoint.open(sharded)


def test_a_tensor_that_is_not_in_its_shard_is_named(sharded: Path) -> None:
    write_index(sharded, {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"says that b is in model-00001-of-00002.safetensors, but it is not"):
        Checkpoint.open(sharded)


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        ({"a": "../model.safetensors"}, r"gives '\.\./model.safetensors' as the file of a"),
        ({"a": 3}, "gives 3 as"),
    ],
)
def test_a_malformed_index_is_named(sharded: Path, weight_map: object, message: str) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(sharded)


# ---------------------------------------------------------------- damaged weight files


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: cut(p, 0), r"\(0 bytes\) is truncated or not a safetensors file: fetch it again"),
        (lambda p: cut(p, 5), r"\(5 bytes\) is truncated or not a safetensors file"),
        (lambda p: cut(p, 60), r"\(60 bytes\) is truncated or not a safetensors file"),
        (lambda p: cut(p, p.stat().st_size - 1), r"is truncated: it has \d+ bytes, and tensor . ends at byte \d+; fetch the file again"),
        (lambda p: p.write_bytes(b"\xff" * 64), "is truncated or not a safetensors file"),
        (lambda p: p.write_bytes((5).to_bytes(8, "little") + b"{abc}"), "its header cannot be understood"),
        (lambda p: write_raw(p, [1], 0), "its header cannot be understood"),
        (lambda p: write_raw(p, {"a": {"dtype": "F32"}}, 0), "its header cannot be understood"),
        (lambda p: write_raw(p, {"a": TENSOR | {"shape": [3]}}, 8), r"is damaged: tensor a of type F32 and shape \[3\] cannot take 8"),
        (lambda p: write_raw(p, {"a": TENSOR | {"shape": [-1, -2]}}, 8), r"is damaged: tensor a .* shape \[-1, -2\]"),
        (lambda p: write_raw(p, {"a": TENSOR | {"data_offsets": [8, 0]}}, 8), "is damaged: tensor a"),
        (lambda p: write_raw(p, {"__metadata__": {}}, 0), "hold no tensors"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer, .* `git lfs pull`"),
    ],
)  # fmt: skip
def test_a_damaged_weight_file_is_named(directory: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(directory)


def test_a_file_that_shrinks_after_opening_is_noticed(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    path = directory / "model.safetensors"
    cut(path, path.stat().st_size - 70)  # of 80 bytes of tensors
    with pytest.raises(CheckpointError, match="ended within tensor a: it was changed while being read"):
        checkpoint.read("a")


def test_integers_are_known_but_not_read(directory: Path) -> None:
    save_file({"ids": torch.arange(3)}, directory / "model.safetensors")
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.dtype("ids") == "I64"
    with pytest.raises(CheckpointError, match="tensor ids has type I64; only F32, F16, BF16 can be read"):
        checkpoint.read("ids")


def test_an_unknown_tensor_is_named(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="a-model has no tensor nothing"):
        Checkpoint.open(directory).read("nothing")


# ---------------------------------------------------------------- the hub's cache


def test_a_repository_is_found_in_the_local_cache(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    snapshot = cache / "models--some--model" / "snapshots" / ("0" * 40)
    shutil.copytree(directory, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    assert find_checkpoint("some/model", cache) == snapshot
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    checkpoint = Checkpoint.open("some/model")
    assert checkpoint.directory == snapshot
    assert checkpoint.name == "some/model"


def test_a_repository_that_is_not_in_the_cache_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"llava-hf/llava-1.5-7b-hf is neither a directory nor .* cache .*name a local one with --checkpoint DIR"
    ):
        find_checkpoint("llava-hf/llava-1.5-7b-hf", tmp_path)


@pytest.mark.parametrize("text", ["a/b/c", "owner/na me", "x", "-bad-/--name--"])
def test_other_texts_name_the_option(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match="--checkpoint DIR"):
        find_checkpoint(text, tmp_path)


# ---------------------------------------------------------------- tokenizer and processor


@pytest.fixture
def with_texts(directory: Path) -> Path:
    tokenizer = {"added_tokens": [{"id": 0, "content": "<s>"}, {"id": 7, "content": "<picture>"}]}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "preprocessor_config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ 'é' }}", encoding="utf-8")
    (directory / "README.md").write_text("not a part of it")
    return directory


def test_text_files_are_those_that_exist(with_texts: Path) -> None:
    texts = Checkpoint.open(with_texts).text_files()
    assert sorted(texts) == ["chat_template.jinja", "preprocessor_config.json", "tokenizer.json"]
    assert texts["chat_template.jinja"] == "{{ 'é' }}"


def test_missing_generation_settings_are_made_from_the_config(with_texts: Path) -> None:
    (with_texts / "config.json").write_text('{"eos_token_id": [3, 4], "text_config": {"bos_token_id": 1, "eos_token_id": 2}}')
    assert json.loads(Checkpoint.open(with_texts).text_files()["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": [3, 4]}
    (with_texts / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert json.loads(Checkpoint.open(with_texts).text_files()["generation_config.json"]) == {"eos_token_id": 9}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.json", "holds no tokenizer.json"),
        ("preprocessor_config.json", "holds no preprocessor_config.json or processor_config.json"),
    ],
)
def test_a_missing_text_file_is_named(with_texts: Path, name: str, message: str) -> None:
    (with_texts / name).unlink()
    with pytest.raises(CheckpointError, match=f"{message}: fetch it"):
        Checkpoint.open(with_texts).text_files()


def test_a_text_file_that_is_not_text_is_named(with_texts: Path) -> None:
    (with_texts / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja is not UTF-8 text"):
        Checkpoint.open(with_texts).text_files()


def test_the_image_token_is_looked_up_by_its_id(with_texts: Path) -> None:
    checkpoint = Checkpoint.open(with_texts)
    assert checkpoint.image_token(7) == "<picture>"
    with pytest.raises(CheckpointError, match=r"has no added token 8, which config.json names as the image token"):
        checkpoint.image_token(8)
