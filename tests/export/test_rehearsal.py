"""Bundles for a Jetson: graphs are held against its TensorRT's operators, and rehearsed with TensorRT for RTX; on the device, built."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from export import build, rehearsal
from export.operator_table import OperatorTable
from export.plan import BuildOptions, BuildPlan, make_plan
from export.targets import TargetConfig
from runtime.engines.tensorrt_builder import build_engine
from runtime.errors import EngineError
from runtime.manifest import Manifest, check_files, read_manifest
from runtime.names import REPORT_FILE, SCORE_MODES
from tests.runtime.fake_tensorrt import recorded
from tests.runtime.test_compile import FakeBuild
from tests.runtime.test_tensorrt_names import use
from tests.site import Site

JETSON = "tensorrt 10.3.0"


def plan_for(checkpoint: Path, target: str = "jetson-orin", **more: Any) -> BuildPlan:
    return make_plan(BuildOptions("llava15", target, checkpoint=str(checkpoint), keep=(4,), split_layer=2, max_context=128, **more))


def command(site: Site, *more: str, target: str = "jetson-orin") -> list[str]:
    return site.build("--target", target, "--keep", "4", "--split-layer", "2", "--max-context", "128", *more, output="orin")


def graph_of(folder: Path, operator: str, kind: int, opset: int = 20, domain: str = "", **attributes: Any) -> Path:
    """A graph of one node, from one tensor to another."""
    x, y = (helper.make_tensor_value_info(name, of, [4, 4]) for name, of in (("x", kind), ("y", attributes.get("to", kind))))
    axis = [helper.make_tensor("axis", TensorProto.INT64, [], [1])] if operator == "CumSum" else []
    node = helper.make_node(operator, ["x", *(tensor.name for tensor in axis)], ["y"], name="odd", domain=domain, **attributes)
    graph = helper.make_graph([node], "g", [x], [y], axis)
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets), folder / "g.onnx")
    return folder / "g.onnx"


# ---------------------------------------------------------------- the operators


@pytest.mark.parametrize("mode", SCORE_MODES)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_all_graphs_use_operators_and_types_of_the_jetpacks_tensorrt(
    mode: str, precision: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    manifest = build.build_bundle(plan_for(tiny_checkpoint, score_mode=mode, precision=precision), tmp_path / "b")
    table = OperatorTable.load()
    for name, graph in manifest.graphs.items():
        assert list(table.refusals(tmp_path / "b" / graph.file, name)) == []


@pytest.mark.parametrize(
    ("operator", "kind", "more", "message"),
    [("Det", TensorProto.FLOAT, {}, r"the operator Det of node 0 \(odd\) in score\.4 is not one of TensorRT 10\.1's"),
     ("CumSum", TensorProto.INT64, {}, r"CumSum of node 0 \(odd\) in score\.4 works on int64, and TensorRT 10\.1 lists bf16, fp16, fp32"),
     ("Mish", TensorProto.BFLOAT16, {"opset": 22}, r"score\.4 has opset 22, and up to 21 is taken to be known to TensorRT 10\.1"),
     ("Relu", TensorProto.FLOAT, {"domain": "com.microsoft"}, r"score\.4 uses operators of com\.microsoft, which TensorRT 10\.1 does not"),
     ("Cast", TensorProto.FLOAT, {"to": TensorProto.DOUBLE}, r"Cast of node 0 \(odd\) in score\.4 works on double")],
)  # fmt: skip
def test_what_the_table_does_not_have_is_named(operator: str, kind: int, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    import re

    found = list(OperatorTable.load().refusals(graph_of(tmp_path, operator, kind, **more), "score.4"))
    assert any(re.search(message, line) for line in found), found


def test_indices_and_conditions_are_not_taken_for_an_operators_type(tmp_path: Path) -> None:
    """Where's condition is bool and Gather's indices are int64; the table speaks of their values."""
    table = OperatorTable("a library", {"Where": frozenset({"fp16"}), "Gather": frozenset({"fp16"}), "Less": frozenset({"int64"})})
    values = [
        helper.make_tensor_value_info(*v)
        for v in (("x", TensorProto.FLOAT16, [4]), ("i", TensorProto.INT64, [4]), ("n", TensorProto.INT64, [4]))
    ]
    nodes = [
        helper.make_node("Less", ["i", "n"], ["c"]),
        helper.make_node("Gather", ["x", "i"], ["g"]),
        helper.make_node("Where", ["c", "g", "x"], ["y"]),
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [4])
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", values, [out]), opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "g.onnx"
    )
    assert list(table.refusals(tmp_path / "g.onnx", "g")) == []


def scattering(target: TargetConfig) -> TargetConfig:
    return dataclasses.replace(target, kv_write="tensor_scatter")


def test_graphs_that_the_device_would_refuse_are_not_published(site: Site) -> None:
    plan = plan_for(site.checkpoint)
    before = {path.name: path.read_bytes() for path in site.bundle.iterdir()}
    message = r"target jetson-agx-orin-64gb could not be compiled on the device: pre_ecl has opset 24, .*; nothing was written"
    for output in (site.folder / "orin", site.bundle):
        with pytest.raises(EngineError, match=message):
            build.build_bundle(dataclasses.replace(plan, target=scattering(plan.target)), output)
    assert not (site.folder / "orin").exists()
    assert {path.name: path.read_bytes() for path in site.bundle.iterdir()} == before, "an earlier bundle stays"


# ---------------------------------------------------------------- the rehearsal


def fake_rehearsal(monkeypatch: pytest.MonkeyPatch, **failing: Any) -> None:
    """Rehearses with a builder that writes a few bytes."""
    monkeypatch.setattr(rehearsal, "obstacle_here", lambda *_: None)
    rehearse = rehearsal.rehearse
    monkeypatch.setattr(rehearsal, "rehearse", lambda bundle, m: rehearse(bundle, m, FakeBuild(bundle, **failing)))


def test_graphs_are_rehearsed_and_the_report_says_how_it_went(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux and Windows on x86-64 only")
    assert build.main(command(site)) == 0
    output = site.folder / "orin"
    manifest = read_manifest(output)
    check_files(output, manifest)
    found = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))["targets"]["jetson-agx-orin-64gb"]["rehearsal"]
    assert (found["rehearsed"], found["library"], found["capability"], found["failed"]) == (True, "tensorrt_rtx", 86, None)
    assert set(found["engines"]) == set(manifest.graphs)
    halves = [found["engines"][name] for name in ("pre_ecl", "post_ecl")]
    assert [half["attention_kernels"] for half in halves] == [[2, 2, 2]] * 2
    assert all(half["engine_bytes"] > half["weights_bytes"] > 0 and half["activation_bytes"] for half in halves)
    assert manifest.engines == ()
    assert not list(site.folder.rglob("*.engine")), "they are thrown away"
    out = capfd.readouterr().out
    assert "rehearsal for jetson-agx-orin-64gb (" in out
    assert out.endswith(f"copy {output} there, then run\n  python3 -m runtime.compile orin\n")


def test_a_rehearsal_that_fails_keeps_the_bundle_and_is_exit_2(
    site: Site, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_rehearsal(monkeypatch, at="post_ecl", error=EngineError("tensorrt_rtx cannot build post_ecl: the operator Foo of node 3 (f)"))
    assert build.main(command(site)) == 2
    output, told = site.folder / "orin", capfd.readouterr()
    assert (
        "error: the rehearsal for jetson-agx-orin-64gb failed: tensorrt_rtx cannot build post_ecl: the operator Foo of node 3" in told.err
    )
    assert f"the bundle is kept in {output}" in told.err
    assert "--no-rehearsal leaves the rehearsal out" in told.err
    check_files(output, read_manifest(output))
    found = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))["targets"]["jetson-agx-orin-64gb"]["rehearsal"]
    assert found["failed"].startswith("tensorrt_rtx cannot build post_ecl")
    assert list(found["engines"]) == ["vision", "pre_ecl"]
    assert {path.name for path in site.folder.iterdir()} == {"bundle", "checkpoint", "orin", "scene.png"}, "nothing is left behind"


def test_a_rehearsal_that_is_not_wanted_or_not_possible_is_one_line(
    site: Site, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*more: str) -> str:
        assert build.main(command(site, *more)) == 0
        return capfd.readouterr().out

    assert "were not rehearsed" not in told("--no-rehearsal")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "were not rehearsed: TensorRT for RTX is not installed (pip install tensorrt-rtx-cu13" in told()
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setattr(rehearsal, "available_memory", lambda: 5_000_000)
    out = told()
    assert "were not rehearsed: building the largest engine takes about 35" in out
    assert "of memory, and 5.0 MB are free here" in out
    found = json.loads((site.folder / "orin" / REPORT_FILE).read_text(encoding="utf-8"))["targets"]["jetson-agx-orin-64gb"]["rehearsal"]
    assert found["rehearsed"] is False
    monkeypatch.setattr(rehearsal, "available_memory", lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    manifest: Manifest = read_manifest(site.folder / "orin")
    large = {name: dataclasses.replace(info, bytes=1 << 21) for name, info in manifest.files.items()}
    reason = rehearsal.obstacle_here(site.folder / "orin", dataclasses.replace(manifest, files=large))
    assert reason is not None
    assert "an engine may take 2.1 MB, and 1.0 MB are free beside" in reason


# ---------------------------------------------------------------- on the device


def test_on_the_device_a_build_ends_with_engines(site: Site, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a TensorRT that has the names of 10.3's bindings."""
    key = next(key for key in recorded() if key.startswith("tensorrt 10.3"))
    name = use(key, monkeypatch)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *more: object() if module == name else find(module, *more))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr("runtime.engine_files.compile_bundle.__defaults__", (lambda *_: None, build_engine))
    assert build.main(command(site)) == 0
    manifest = read_manifest(site.folder / "orin")
    check_files(site.folder / "orin", manifest)
    assert {engine.graph for engine in manifest.engines} == set(manifest.graphs)
    assert {(engine.library, engine.library_version, engine.capabilities) for engine in manifest.engines} == {
        ("tensorrt", key.split()[1], ())
    }
    out = capfd.readouterr().out
    assert "for this device" in out
    assert "copy" not in out
    assert "rehearsal for" not in out


def test_a_workstation_with_tensorrt_builds_no_engines_for_a_jetson(
    site: Site, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *more: object() if module == "tensorrt" else find(module, *more))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert build.main(command(site, "--no-rehearsal")) == 0
    assert "engines are built on the device" in capfd.readouterr().out
    assert read_manifest(site.folder / "orin").engines == ()
