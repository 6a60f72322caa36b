"""The builder against every binding it is meant for: it calls nothing that one of them lacks, and uses what one of them has."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from runtime.engine_info import Profile, ShapeRange
from runtime.engines.tensorrt_builder import BuiltEngine, EngineSpec, build_engine
from runtime.engines.tensorrt_library import installed_library
from runtime.errors import EngineError, EntropyPruneError, StorageError, UsageError
from tests.runtime.fake_tensorrt import ACTIVATIONS, ENGINE, WEIGHTS, fake_library, recorded

ROWS = ShapeRange((1, 1, 8), (1, 4, 8), (1, 9, 8))
PROFILES = (Profile("prefill", {"hidden": ROWS}), Profile("decode", {"hidden": ROWS}))
RTX = next(key for key in recorded() if key.startswith("tensorrt_rtx"))


def use(key: str, monkeypatch: pytest.MonkeyPatch, module: ModuleType | None = None) -> str:
    """Puts the fake in the place of the library; returns the library's name."""
    name = key.split()[0]
    monkeypatch.setitem(sys.modules, name, module or fake_library(key, recorded()[key]))
    return name


def spec_for(library: str, folder: Path, **changes: Any) -> EngineSpec:
    capabilities = (86, 89) if library == "tensorrt_rtx" else ()
    spec = EngineSpec("post_ecl", str(folder / "g.onnx"), str(folder / "out.engine"), library, capabilities, PROFILES)
    return dataclasses.replace(spec, **changes)


def build(key: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> BuiltEngine:
    return build_engine(spec_for(use(key, monkeypatch), folder, **changes))


@pytest.mark.parametrize("key", recorded())
@pytest.mark.parametrize("tf32", [True, False])
def test_builder_calls_only_what_every_binding_has(key: str, tf32: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(key, tmp_path, monkeypatch, tf32=tf32)
    assert (tmp_path / "out.engine").read_bytes() == ENGINE
    assert [path.name for path in tmp_path.iterdir()] == ["out.engine"]
    assert (built.file.bytes, built.file.sha256) == (len(ENGINE), hashlib.sha256(ENGINE).hexdigest())
    assert built.info.library_version == key.split()[1]
    assert built.info.inputs == ("hidden", "past_length")
    assert built.info.outputs == ("logits",)
    assert (built.info.weights_bytes, built.info.activation_bytes) == (WEIGHTS, (ACTIVATIONS, ACTIVATIONS))


@pytest.mark.parametrize("key", recorded())
def test_parser_errors_are_told_with_every_binding(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        EngineError, match=r"cannot build post_ecl: the operator NonZero of node 3 \(find\) is not supported: no such thing"
    ):
        build(key, tmp_path, monkeypatch, onnx="refused.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("owner", "name"),
    [("OnnxParser", "parse_from_file"), ("IBuilderConfig", "profiling_verbosity"), ("BuilderFlag", "TF32"), ("ITensor", "shape"),
     ("Builder", "create_optimization_profile"), ("ProfilingVerbosity", "DETAILED")],
)  # fmt: skip
def test_a_binding_without_a_name_that_the_builder_calls_is_noticed(
    owner: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = copy.deepcopy({cls: list(found) for cls, found in recorded()[RTX].items()})
    names[owner].remove(name)
    library = use(RTX, monkeypatch, fake_library(RTX, names))
    with pytest.raises(AttributeError):
        build_engine(spec_for(library, tmp_path, tf32=False))


def test_a_library_without_streams_builds_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = next(key for key in recorded() if key.startswith("tensorrt 10.3"))
    assert "build_serialized_network_to_stream" not in recorded()[old]["Builder"]
    build(old, tmp_path, monkeypatch)
    assert (tmp_path / "out.engine").read_bytes() == ENGINE


def test_recorded_names_are_those_of_the_installed_library() -> None:
    library = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install tensorrt-rtx-cu13")
    if f"tensorrt_rtx {library.__version__}" not in recorded():
        pytest.skip(f"the names of tensorrt_rtx {library.__version__} are not recorded")
    for cls, names in recorded()[RTX].items():
        assert sorted(a for a in dir(getattr(library, cls)) if not a.startswith("_")) == list(names)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("key", "changes", "kind", "message"),
    [
        (RTX, {"capabilities": (86, 87)}, UsageError, r"tensorrt_rtx .* builds no engine for SM87: it knows SM75, SM80, SM86, SM89, SM120"),
        (RTX, {"capabilities": ()}, UsageError, "builds for named compute capabilities .*: give one or more"),
        ("tensorrt 10.3.0", {"capabilities": (87,)}, UsageError, "tensorrt builds engines for the device it runs on: leave .* out"),
        (RTX, {"profiles": ()}, EngineError, r"post_ecl has inputs of dynamic size \(hidden\) and no profile"),
        (RTX, {"profiles": (Profile("decode", {}),)}, EngineError, "the profile decode gives hidden no shape, the graph has"),
        (RTX, {"profiles": (Profile("decode", {"hidden": ShapeRange((1, 1, 4), (1, 1, 4), (1, 1, 4))}),)}, EngineError,
         r"decode gives hidden \(1, 1, 4\), the graph has \(1, -1, 8\)"),
    ],
)  # fmt: skip
def test_builder_says_what_does_not_fit(
    key: str, changes: dict[str, object], kind: type[EntropyPruneError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(kind, match=message):
        build(key, tmp_path, monkeypatch, **changes)
    assert list(tmp_path.iterdir()) == []


def test_builder_errors_are_the_last_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_library(RTX, recorded()[RTX])

    def fail(self: object, network: object, config: object, writer: object) -> bool:
        self._logger.log(1, "IBuilder::build: Error Code 2: no tactic for {ForeignNode}")  # type: ignore[attr-defined]
        return False

    module.__dict__["Builder"].build_serialized_network_to_stream = fail
    library = use(RTX, monkeypatch, module)
    with pytest.raises(EngineError, match=r"could not build an engine of post_ecl: .*Error Code 2: no tactic for \{ForeignNode\}"):
        build_engine(spec_for(library, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_does_not_exist_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*out\.engine: No such file.*choose a writable directory"):
        build(RTX, tmp_path, monkeypatch, output=str(tmp_path / "missing" / "out.engine"))


@pytest.mark.parametrize("key", [RTX, "tensorrt 10.3.0"])
def test_a_full_disk_is_told_and_leaves_nothing(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource", reason="this system has no limit on a file's size")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    library = use(key, monkeypatch)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(ENGINE) - 1, limits[1]))
        with pytest.raises(StorageError, match=r"cannot write .*out\.engine: File too large; free some space"):
            build_engine(spec_for(library, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"no engine library is installed: .*pip install tensorrt-rtx-cu13.*Jetson.*JetPack"):
        installed_library()
