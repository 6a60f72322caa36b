"""The memory plan beside what engines were built with: measured rows, one buffer for all, warnings for what the plan missed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from export.build import build_bundle
from export.plan import BuildOptions, make_plan
from runtime import compile as command
from runtime.engine_files import CompileOptions, compile_bundle
from runtime.engine_memory import describe_measured, measured_plan, off
from runtime.engines.tensorrt_builder import BuiltEngine, EngineSpec
from runtime.manifest import read_manifest
from runtime.memory_plan import ACTIVATIONS, BESIDE, ESTIMATED, EXACT, MEASURED, SHARED, WEIGHTS
from runtime.names import MANIFEST_FILE
from tests.runtime.test_compile import FakeBuild

MB = 1_000_000
LOGGED = {"vision": (3 * MB, (2 * MB,)), "pre_ecl": (5 * MB, (9 * MB, 4 * MB)), "post_ecl": (7 * MB, (30 * MB, 4 * MB))}


class Logging(FakeBuild):
    """Builds engines whose log says LOGGED; scores of 10 and 20 MB of activations."""

    def __call__(self, spec: EngineSpec) -> BuiltEngine:
        built = super().__call__(spec)
        weights, activations = LOGGED.get(spec.graph, (0, (10 * MB if spec.graph == "score.4" else 20 * MB,)))
        return dataclasses.replace(built, info=dataclasses.replace(built.info, weights_bytes=weights, activation_bytes=activations))


@pytest.fixture
def bundle(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    plan = make_plan(BuildOptions("llava15", "rtx", checkpoint=str(tiny_checkpoint), keep=(4, 2), split_layer=2, max_context=128))
    build_bundle(plan, tmp_path / "bundle")
    return tmp_path / "bundle"


def compiled(bundle: Path, library: str = "tensorrt_rtx") -> Any:
    compile_bundle(bundle, CompileOptions(library, (86,) if library == "tensorrt_rtx" else ()), build=Logging(bundle))
    memory = read_manifest(bundle).memory
    assert memory is not None
    return memory


def test_the_manifest_says_what_was_measured_and_what_was_planned(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    planned, exported = manifest.memory, manifest.export_sha256()
    assert planned is not None
    memory = compiled(bundle)
    rows = {item.name: item for item in memory.items}
    assert {item.basis for item in memory.measured} == {MEASURED}
    expected = {WEIGHTS.format(name): weights for name, (weights, _) in LOGGED.items()}
    expected |= {ACTIVATIONS.format(name): max(sizes) for name, (_, sizes) in LOGGED.items()}
    expected |= {ACTIVATIONS.format("score"): 20 * MB}
    assert {name: rows[name].bytes for name in expected} == expected
    assert {item.name for item in memory.measured} == {*expected, BESIDE}
    assert rows[BESIDE].bytes == 0, "a fake's file is smaller than the weights that it logs"
    assert all(item.planned_bytes == planned.bytes_of(item.name) for item in memory.measured)
    assert memory.as_planned() == planned
    assert {item.basis for item in planned.items if item.name in expected} == {EXACT, ESTIMATED}
    assert read_manifest(bundle).export_sha256() == exported, "it is still the build that was verified"
    assert compiled(bundle) == memory, "compiling again compares with the plan, not with the last measurement"


def test_engines_take_turns_in_one_buffer(bundle: Path) -> None:
    memory = compiled(bundle)
    assert [item.name for item in memory.items if item.place == SHARED] == [
        ACTIVATIONS.format(name) for name in ("vision", "pre_ecl", "score", "post_ecl")
    ]
    assert memory.shared_bytes == 30 * MB
    assert memory.device_bytes == 30 * MB + sum(item.bytes for item in memory.items if item.place == "device")


def test_engines_of_another_library_than_the_targets_leave_the_plan_alone(bundle: Path) -> None:
    planned = read_manifest(bundle).memory
    assert compiled(bundle, "tensorrt") == planned


def test_a_bundle_of_an_older_schema_stays_readable_by_its_runtimes(tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    compile_bundle(bundle, CompileOptions("tensorrt_rtx", (86,)), build=Logging(bundle))
    raw = json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert raw["schema_version"] == 2
    assert {key for item in raw["memory"]["items"] for key in item} == {"name", "bytes", "place", "basis"}
    assert "head_pieces" not in raw["memory"]


def test_what_the_library_does_not_log_stays_as_planned(bundle: Path) -> None:
    memory = read_manifest(bundle).memory
    assert memory is not None
    build, engines = FakeBuild(bundle), []
    for graph in read_manifest(bundle).graphs:
        spec = EngineSpec(graph, "", str(bundle / f"{graph}.tensorrt_rtx.new.engine"), "tensorrt_rtx")
        built = build(spec)
        engines.append(dataclasses.replace(built, info=dataclasses.replace(built.info, weights_bytes=None, activation_bytes=())))
    assert measured_plan(memory, engines) == memory


def test_rows_that_the_plan_missed_are_named(bundle: Path) -> None:
    planned = read_manifest(bundle).memory
    assert planned is not None
    name, size = ACTIVATIONS.format("pre_ecl"), planned.bytes_of(ACTIVATIONS.format("pre_ecl"))
    near, far = (planned.with_measured({name: size + more}) for more in (7 * MB, 9 * MB))
    assert [off(item) for plan in (near, far) for item in plan.measured] == [False, True]
    large = dataclasses.replace(
        far, items=tuple(dataclasses.replace(i, planned_bytes=i.planned_bytes and 100 * i.bytes) for i in far.items)
    )
    assert [off(item) for item in large.measured] == [True]
    assert "warning" not in "\n".join(describe_measured(near))
    lines = list(describe_measured(far))
    assert lines[-1] == f"  warning: more than 10% and 8.0 MB from the plan: {name}"
    assert f"{(size + 9 * MB) / size:.2f}" in lines[1]
    full = dataclasses.replace(far, memory_bytes=1 << 20, reserve_bytes=0)
    assert list(describe_measured(full))[-1].startswith("  warning: as built it needs ")


def test_the_command_prints_plan_and_measurement(bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.engine_files.compile_bundle.__defaults__", (lambda *_: None, Logging(bundle)))
    monkeypatch.setattr("runtime.engines.tensorrt_library.load_library", lambda name: None)
    assert command.main([str(bundle), "--library", "tensorrt_rtx"]) == 0
    out = capsys.readouterr().out
    assert "  memory                               planned  measured   ratio\n" in out
    assert "activations, post_ecl" in out
    assert "warning: more than 10% and 8.0 MB from the plan: engines beside their weights; activations, score; activations, post_ecl" in out
