"""Targets: every shipped file has what a build needs to know, aliases and memory sizes are understood, and malformed files are named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from export import build, configs
from export.configs import build_table, list_targets, load_target_config
from export.precision import SCHEMES, scheme_of
from export.targets import ENGINES, TargetConfig, describe_targets, gib, parse_memory
from runtime.errors import UsageError
from runtime.manifest import RUNS

GIB = 1 << 30
ORINS = {
    "jetson-agx-orin-64gb": (64, 204.8), "jetson-agx-orin-32gb": (32, 204.8), "jetson-orin-nx-16gb": (16, 102.0),
    "jetson-orin-nx-8gb": (8, 102.0), "jetson-orin-nano-8gb": (8, 102.0),
}  # fmt: skip
TARGET: dict[str, Any] = {"name": "t", "description": "", "engine": "onnxruntime", "precisions": ["fp32"], "default_precision": "fp32"}


# ---------------------------------------------------------------- the shipped files


def test_the_targets_are_the_devices_that_are_planned_for() -> None:
    expected = {"cpu", "cuda", "dgx-spark", "jetson-orin", "jetson-thor", "rtx", "rtx-30", "rtx-40", "rtx-50", *ORINS}
    assert set(list_targets()) == expected


@pytest.mark.parametrize("name", sorted(ORINS))
def test_an_orin_has_its_memory_and_no_fp8(name: str) -> None:
    target, (memory, bandwidth) = load_target_config(name), ORINS[name]
    assert (target.memory_bytes, target.bandwidth_gb_s, target.unified) == (memory * GIB, bandwidth, True)
    assert target.compute_capabilities == ("8.7",)
    assert (target.precisions, target.default_precision) == (("fp16", "bf16", "int8", "int4"), "fp16")
    assert [(library.minimum, library.platform) for library in target.libraries] == [
        ("10.3", "JetPack 6.2, CUDA 12.6"), ("10.16.2", "JetPack 7.2, CUDA 13.2")
    ]  # fmt: skip


def test_only_orins_of_8_gb_limit_a_single_allocation() -> None:
    limited = {name for name in list_targets() if load_target_config(name).max_allocation_bytes is not None}
    assert limited == {"jetson-orin-nano-8gb", "jetson-orin-nx-8gb"}
    assert load_target_config("jetson-orin-nano-8gb").max_allocation_bytes == 950 << 20


def test_one_rtx_engine_is_for_all_generations_and_runs_what_all_of_them_run() -> None:
    family = load_target_config("rtx")
    assert family.compute_capabilities == ("8.0", "8.6", "8.9", "12.0")
    for name in ("rtx-30", "rtx-40", "rtx-50"):
        card = load_target_config(name)
        assert set(card.compute_capabilities) < set(family.compute_capabilities)
        assert set(family.precisions) <= set(card.precisions)
    assert "fp8" not in family.precisions


@pytest.mark.parametrize("name", list_targets())
def test_every_target_names_its_library_and_leaves_room_for_the_system(name: str) -> None:
    target = load_target_config(name)
    assert target.libraries
    assert target.engine in ENGINES
    assert target.reserve_bytes >= 512 << 20
    assert target.available_bytes is None or target.available_bytes > 5e9


@pytest.mark.parametrize("path", sorted((Path(configs.__file__).parents[1] / "configs" / "targets").glob("*.toml")), ids=lambda p: p.stem)
def test_every_figure_has_its_source_or_says_that_none_was_found(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if line.startswith(("memory_bytes", "bandwidth_gb_s", "reserve_bytes", "max_allocation_bytes")):
            assert "#" in line or lines[number - 1].startswith("#"), f"{path.name}: {line}"


@pytest.mark.parametrize("name", list_targets())
def test_every_target_says_how_the_cache_is_written(name: str) -> None:
    """TensorRT for RTX has TensorScatter; TensorRT 10.3 has not, and JetPack 7.0's may be older than 10.16."""
    target = load_target_config(name)
    assert target.kv_write == {"tensorrt-rtx": "tensor_scatter", "tensorrt": "append"}.get(target.engine, "in_place")
    assert target.library in RUNS


# ---------------------------------------------------------------- aliases


def test_jetson_orin_is_the_agx_orin_of_64_gb() -> None:
    assert load_target_config("jetson-orin") == load_target_config("jetson-agx-orin-64gb")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"alias_of": "there"}, "alias.toml: alias_of = 'there' is not another target that is no alias itself"),
        ({"alias_of": "alias"}, "alias_of = 'alias' is not another target"),
        ({"alias_of": "other"}, "alias_of = 'other' is not another target that is no alias itself"),
        ({"alias_of": 3}, "alias_of = 3 is not another target"),
        ({"alias_of": "cpu", "engine": "tensorrt"}, "alias.toml: an alias has no entries of its own; keep alias_of and description"),
    ],
)
def test_an_alias_of_nothing_is_refused(table: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"alias": table, "other": {"alias_of": "cpu"}, "cpu": {k: v for k, v in TARGET.items() if k != "name"}}
    monkeypatch.setattr(configs, "_names", lambda kind: tuple(files))
    monkeypatch.setattr(configs, "_read", lambda kind, word, name: files[name])
    assert load_target_config("other").name == "cpu"
    with pytest.raises(UsageError, match=message):
        load_target_config("alias")


# ---------------------------------------------------------------- malformed files, unknown names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "onnx"}, "target t has engine 'onnx'; known are onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx"),
        ({"precisions": ["fp32", "int3"]}, "has precisions fp32, int3; list each once, of fp32, fp16, bf16, int8, fp8, int4"),
        ({"precisions": ["fp32", "fp32"]}, "has precisions fp32, fp32; list each once"),
        ({"default_precision": "fp16"}, "default_precision 'fp16', which is not among its precisions fp32"),
        ({"compute_capabilities": ["87"]}, "compute capability '87'; write it as NVIDIA does, such as 8.7"),
        ({"compute_capabilities": [8.7]}, "compute_capabilities = 8.7 has the wrong type; expected str"),
        ({"memory_bytes": 0}, "memory_bytes = 0; it must be above 0"),
        ({"memory_bytes": 8e9}, "memory_bytes = 8000000000.0 has the wrong type; expected int"),
        ({"memory_bytes": 10, "reserve_bytes": 10}, "reserve_bytes = 10; it must be from 0 to below the memory, 10"),
        ({"reserve_bytes": -1}, "reserve_bytes = -1"),
        ({"bandwidth_gb_s": -2.5}, "bandwidth_gb_s = -2.5; it must be above 0"),
        ({"opset": 0}, "opset = 0; it must be above 0"),
        ({"kv_write": "somewhere"}, "has kv_write 'somewhere'; known are in_place, tensor_scatter, append"),
        ({"kv_write": "tensor_scatter", "opset": 21}, "has kv_write tensor_scatter and opset 21; the operator needs 24"),
        ({"unified": "yes"}, "unified = 'yes' has the wrong type; expected bool"),
        ({"libraries": [{"name": "x"}]}, "libraries: missing entry minimum, platform"),
        ({"alias": "cpu"}, "unknown entry alias; known: name, description, engine"),
    ],
)
def test_a_malformed_target_file_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_table(TargetConfig, TARGET | changes, "f.toml")


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("orin-nano", "jetson-orin-nano-8gb"), ("jetson_orin", "jetson-orin"), ("rtx4090", "rtx-40"), ("spark", "dgx-spark"),
        ("Jetson-Thor", "jetson-thor"), ("nano", "jetson-orin-nano-8gb"), ("thor", "jetson-thor"),
    ],
)  # fmt: skip
def test_an_unknown_target_is_answered_with_the_one_that_was_meant(name: str, guess: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown target '{name}': did you mean {guess}\? --target takes cpu, cuda, "):
        load_target_config(name)


def test_a_target_like_none_gets_no_suggestion() -> None:
    with pytest.raises(UsageError, match="unknown target 'xyz': --target takes cpu, "):
        load_target_config("xyz")


# ---------------------------------------------------------------- memory sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12GB", 12 * GIB), ("12 GiB", 12 * GIB), ("12g", 12 * GIB), ("11.5GB", int(11.5 * GIB)), ("12288MB", 12 * GIB), (" 1 mib ", 1 << 20)],
)
def test_memory_is_read_as_it_is_sold(text: str, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "12", "GB", "-1GB", "0GB", "12TB", "1e3GB", "12GB more", "nan GB"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--device-memory '.*' is not a size: write it such as 12GB or 12288MB"):
        parse_memory(text)


def test_a_familys_memory_is_a_stated_card_until_another_is_said() -> None:
    target = load_target_config("rtx-40")
    assert (target.memory_bytes, target.memory_of, target.bandwidth_gb_s) == (8 * GIB, "GeForce RTX 4060", 272.0)
    larger = target.with_memory("16GB")
    assert (larger.memory_bytes, larger.memory_of, larger.bandwidth_gb_s) == (16 * GIB, "--device-memory", None)
    assert load_target_config("cpu").with_memory("4GB").available_bytes == 3 * GIB


def test_a_known_modules_memory_cannot_be_said_otherwise() -> None:
    message = r"--device-memory 16GB does not go with target jetson-orin-nano-8gb, whose memory is known \(8 GiB\): choose the target"
    with pytest.raises(UsageError, match=message):
        load_target_config("jetson-orin-nano-8gb").with_memory("16GB")
    with pytest.raises(UsageError, match=r"--device-memory 500MB is not more than what the system keeps, 0\.5 GiB"):
        load_target_config("rtx").with_memory("500MB")


def test_binary_sizes_are_short() -> None:
    assert [gib(8 * GIB), gib(int(1.5 * GIB)), gib(GIB // 3)] == ["8 GiB", "1.5 GiB", "0.33 GiB"]


# ---------------------------------------------------------------- the table, precisions


def test_list_targets_prints_them_all_and_builds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--list-targets"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert set(list_targets()) <= set(rows)
    assert rows["jetson-orin"].split() == ["jetson-orin", "=", "jetson-agx-orin-64gb"]
    for words in ("tensorrt ", "8.7", "8 GiB unified", "102", "fp16, bf16, int8, int4", "graphs here, engines on the device"):
        assert words in rows["jetson-orin-nano-8gb"]
    assert rows["rtx"].endswith("engines built here")
    assert rows["cpu"].endswith("nothing to compile")
    assert "rtx-30: the memory is that of a GeForce RTX 3060 8 GB" in out


def test_list_targets_says_which_file_is_malformed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_read", lambda *_: {"engine": "x"})
    assert build.main(["--list-targets"]) == 2
    assert "configs/targets/cpu.toml: missing entry description" in capsys.readouterr().err


def test_the_table_has_aligned_columns() -> None:
    target = dataclasses.replace(build_table(TargetConfig, TARGET, "f.toml"), name="a-long-name")
    lines = describe_targets([("a-long-name", target), ("b", target)]).splitlines()
    assert lines[1].index("onnxruntime") == lines[0].index("engine") == lines[2].index("= a-long-name")


def test_a_precision_is_bytes_for_a_matrix_and_for_the_rest() -> None:
    assert set(SCHEMES) == {"fp32", "fp16", "bf16", "int8", "fp8", "int4"}
    assert [scheme_of(p).matrix((3, 256)) for p in ("fp32", "fp16", "int8", "int4")] == [3072, 1536, 768 + 6, 384 + 3 * 2 * 2]
    assert scheme_of("int4").matrix((2, 130)) == 130 + 2 * 2 * 2  # the second block is short
    assert [scheme_of(p).plain((3, 256)) for p in ("fp32", "fp16", "int8", "int4")] == [3072, 1536, 1536, 1536]
    assert "0.515625 bytes a weight (4 bits, and 2 bytes for every 128)" in scheme_of("int4").words
    with pytest.raises(UsageError, match="unknown precision 'int3': choose one of fp32, "):
        scheme_of("int3")
