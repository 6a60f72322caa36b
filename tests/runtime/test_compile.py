"""`runtime.compile` around the builder: the manifest and the files of a bundle, whatever happens to a build."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import compile as command
from runtime.engine_files import CompileOptions, compile_bundle
from runtime.engine_info import EngineInfo
from runtime.engines.tensorrt_builder import BuiltEngine, EngineSpec
from runtime.errors import BundleError, EngineError, StorageError
from runtime.inspection import inspect_bundle
from runtime.manifest import FileInfo, Manifest, check_files, read_manifest
from runtime.names import MANIFEST_FILE
from runtime.pipeline import load
from tests.site import Refused, Site, changes, tree

GRAPHS = ["vision", "pre_ecl", "post_ecl", "score.4", "score.2"]
RTX = CompileOptions("tensorrt_rtx", (86, 89))


class FakeBuild:
    """Builds an "engine" with `text` in it; raises `error` at the graph `at`."""

    def __init__(
        self, bundle: Path, text: str = "", at: str | None = None, error: BaseException | None = None,
        manifest: Callable[[Manifest], Manifest] = lambda manifest: manifest,
    ) -> None:  # fmt: skip
        self.bundle, self.text, self.at, self.error, self.manifest = bundle, text, at, error, manifest
        self.specs: list[EngineSpec] = []

    def __call__(self, spec: EngineSpec) -> BuiltEngine:
        self.specs.append(spec)
        data = f"{spec.graph} {spec.library} {self.text}".encode()
        Path(spec.output).write_bytes(data)
        if spec.graph == self.at and self.error is not None:
            raise self.error
        graph = self.manifest(read_manifest(self.bundle)).graphs[spec.graph]
        info = EngineInfo(
            graph=spec.graph, file=Path(spec.output).name, library=spec.library, library_version="1.0", capabilities=spec.capabilities,
            profiles=spec.profiles, inputs=tuple(t.name for t in graph.inputs), outputs=tuple(t.name for t in graph.outputs),
            weights_bytes=10, activation_bytes=(5, 7), attention_kernels=(), build_seconds=0.5, peak_rss_bytes=None,
        )  # fmt: skip
        return BuiltEngine(info, FileInfo(len(data), hashlib.sha256(data).hexdigest()))


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_engines_of_all_graphs_enter_the_manifest_and_the_hash_check(bundle: Path) -> None:
    before = tree(bundle)
    build = FakeBuild(bundle)
    compile_bundle(bundle, RTX, build=build)
    manifest = read_manifest(bundle)
    assert [engine.graph for engine in manifest.engines] == GRAPHS
    assert all(engine.file in manifest.files and engine.capabilities == (86, 89) for engine in manifest.engines)
    assert [spec.tf32 for spec in build.specs] == [True, True, True, False, False]
    assert manifest.engines[1].profiles == build.specs[1].profiles
    assert changes(before, tree(bundle)) == sorted([MANIFEST_FILE, *(engine.file for engine in manifest.engines)])
    check_files(bundle, manifest)
    (bundle / manifest.engines[2].file).write_bytes(b"x" * manifest.files[manifest.engines[2].file].bytes)
    with pytest.raises(BundleError, match=r"post_ecl\.tensorrt_rtx\..* was altered"):
        check_files(bundle, manifest)


def test_a_compiled_bundle_still_runs_on_onnx_runtime_and_is_still_the_build_that_was_verified(bundle: Path) -> None:
    exported = read_manifest(bundle).export_sha256()
    assert exported == hashlib.sha256((bundle / MANIFEST_FILE).read_bytes()).hexdigest()
    report = {
        "passed": True, "checks": [], "bundle": {"manifest_sha256": exported}, "date": "2026-01-31", "onnxruntime": "1", "torch": "2",
        "transformers": "5",
    }  # fmt: skip
    (bundle / "verify.json").write_text(json.dumps(report), encoding="utf-8")
    compile_bundle(bundle, RTX, build=FakeBuild(bundle))
    assert read_manifest(bundle).export_sha256() == exported
    assert inspect_bundle(bundle).verification.matches is True
    assert load(bundle).generate("hello", max_new_tokens=2).text is not None


def test_a_bundle_without_engines_is_written_as_before_there_were_any(bundle: Path) -> None:
    text = (bundle / MANIFEST_FILE).read_text(encoding="utf-8")
    assert "engines" not in json.loads(text)
    assert read_manifest(bundle).to_json() == text


def test_compiling_again_replaces_the_librarys_engines_and_leaves_the_others(bundle: Path) -> None:
    compile_bundle(bundle, CompileOptions("tensorrt"), build=FakeBuild(bundle))
    compile_bundle(bundle, RTX, build=FakeBuild(bundle, "old"))
    old = {engine.file for engine in read_manifest(bundle).engines if engine.library == "tensorrt_rtx"}
    compile_bundle(bundle, RTX, build=FakeBuild(bundle, "new"))
    manifest = read_manifest(bundle)
    assert [engine.library for engine in manifest.engines] == ["tensorrt"] * 5 + ["tensorrt_rtx"] * 5
    assert not old & {path.name for path in bundle.iterdir()}
    assert {path.name for path in bundle.iterdir()} == {*manifest.files, MANIFEST_FILE, "report.json"}
    check_files(bundle, manifest)


def test_compiling_again_to_the_same_bytes_changes_nothing(bundle: Path) -> None:
    compile_bundle(bundle, RTX, build=FakeBuild(bundle))
    before = tree(bundle)
    compile_bundle(bundle, RTX, build=FakeBuild(bundle))
    assert changes(before, tree(bundle)) == []


@pytest.mark.parametrize(
    "error", [EngineError("no such operator"), KeyboardInterrupt(), StorageError("disk full")], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("compiled", [False, True], ids=["exported", "compiled before"])
def test_a_compile_that_fails_leaves_the_bundle_as_it_was(bundle: Path, error: BaseException, compiled: bool) -> None:
    if compiled:
        compile_bundle(bundle, RTX, build=FakeBuild(bundle, "old"))
    before = tree(bundle)
    with pytest.raises(type(error)):
        compile_bundle(bundle, RTX, build=FakeBuild(bundle, "new", "post_ecl", error))
    assert changes(before, tree(bundle)) == []


def test_what_a_killed_compile_left_is_removed_by_the_next(bundle: Path) -> None:
    left = ("pre_ecl.tensorrt_rtx.0123456789ab.engine", "vision.tensorrt_rtx.new.engine", ".vision.tensorrt_rtx.new.engine.999999999.part")
    other = ("notes.engine", "pre_ecl.tensorrt_rtx.engine", ".vision.tensorrt_rtx.new.engine.1.part")  # process 1 runs
    for name in (*left, *other):
        (bundle / name).write_bytes(b"x")
    compile_bundle(bundle, RTX, build=FakeBuild(bundle))
    found = {path.name for path in bundle.iterdir()}
    assert not found & set(left)
    assert found >= set(other)


def test_engines_are_built_from_unaltered_graphs_only(bundle: Path) -> None:
    data = bytearray((bundle / "weights.fp32.bin").read_bytes())
    data[100] ^= 1
    (bundle / "weights.fp32.bin").write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.fp32\.bin was altered"):
        compile_bundle(bundle, RTX, build=FakeBuild(bundle))


def test_a_manifest_that_changed_meanwhile_is_not_overwritten(bundle: Path) -> None:
    build = FakeBuild(bundle)

    def change(graph: str, built: BuiltEngine | None) -> None:
        if built is not None and graph == "vision":
            manifest = dataclasses.replace(read_manifest(bundle), tool_version="another")
            (bundle / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")

    with pytest.raises(BundleError, match="was changed by another program while its engines were built"):
        compile_bundle(bundle, RTX, change, build)
    assert read_manifest(bundle).tool_version == "another"
    assert not list(bundle.glob("*.engine"))


def test_two_compiles_of_one_bundle_do_not_run_at_once(bundle: Path) -> None:
    pytest.importorskip("fcntl", reason="no locks on directories on this system")

    def second(graph: str, built: BuiltEngine | None) -> None:
        with pytest.raises(BundleError, match="is being compiled by another program: wait for it"):
            compile_bundle(bundle, RTX, build=FakeBuild(bundle))

    compile_bundle(bundle, RTX, second, FakeBuild(bundle))
    assert len(read_manifest(bundle).engines) == 5


def test_an_engine_with_other_tensors_than_the_graph_is_refused(bundle: Path) -> None:
    class Renamed(FakeBuild):
        def __call__(self, spec: EngineSpec) -> BuiltEngine:
            built = super().__call__(spec)
            return BuiltEngine(dataclasses.replace(built.info, inputs=(*built.info.inputs, "extra")), built.file)

    before = tree(bundle)
    with pytest.raises(EngineError, match="the engine of vision and the manifest differ in extra"):
        compile_bundle(bundle, RTX, build=Renamed(bundle))
    assert changes(before, tree(bundle)) == []


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("file", "../out.engine", "is not a path inside the bundle"),
        ("file", "gone.engine", "gone.engine is used but not listed"),
        ("graph", "score.9", "there is an engine of 'score.9', and no such graph"),
        ("capabilities", ["86"], "'86' has the wrong type"),
    ],
)
def test_a_manifest_whose_engines_cannot_be_is_refused(bundle: Path, entry: str, value: Any, message: str) -> None:
    compile_bundle(bundle, RTX, build=FakeBuild(bundle))
    raw = json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    raw["engines"][0][entry] = value
    (bundle / MANIFEST_FILE).write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        read_manifest(bundle)


def test_an_export_replaces_a_compiled_bundle(site: Site) -> None:
    from export import build

    compile_bundle(site.bundle, RTX, build=FakeBuild(site.bundle))
    assert build.main(site.build("--keep", "3")) == 0
    assert read_manifest(site.bundle).engines == ()
    assert not list(site.bundle.glob("*.engine"))


# ---------------------------------------------------------------- the command


def test_without_a_library_the_command_says_what_to_install(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(command, [str(refused.site.bundle)], "no engine library is installed: for RTX cards, pip install tensorrt-rtx-cu13")


def test_the_command_refuses_what_it_cannot_use(refused: Refused, capfd: pytest.CaptureFixture[str]) -> None:
    refused(command, [str(refused.site.folder / "nothing")], "is not a directory")
    refused(command, [str(refused.site.bundle), "--text-tokens", "0"], "text tokens is 0, expected 1 or more")
    refused(command, [str(refused.site.bundle), "--capability", "ada"], "'ada' is not a list of compute capabilities such as 86")


def test_the_command_tells_what_it_built(bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    build = FakeBuild(bundle)
    monkeypatch.setattr("runtime.engine_files.build_in_child", build)
    monkeypatch.setattr("runtime.engine_files.compile_bundle.__defaults__", (lambda *_: None, build))
    monkeypatch.setattr("runtime.engines.tensorrt_library.load_library", lambda name: None)
    assert command.main([str(bundle), "--library", "tensorrt_rtx", "--capability", "8.6,SM89,86", "--json"]) == 0
    out = capsys.readouterr()
    assert out.err.split() == [word for graph in GRAPHS for word in (f"{graph}:", "building")]
    assert out.out.startswith("tensorrt_rtx 1.0 for SM86, SM89\n")
    told = json.loads(out.out.splitlines()[-1])
    assert [engine["graph"] for engine in told["engines"]] == GRAPHS
    assert told["engines"][0]["sha256"] == read_manifest(bundle).files[told["engines"][0]["file"]].sha256
    assert told["weights_ratio"] == pytest.approx(50 / (bundle / "weights.fp32.bin").stat().st_size)
