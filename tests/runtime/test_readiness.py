"""Whether a machine can run a bundle with each engine library: one line each, with what is there or what to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from runtime.device import readiness as module
from runtime.device.cuda_api import Gpu
from runtime.device.readiness import Readiness, readiness
from runtime.engine_info import EngineInfo
from runtime.errors import EngineError
from runtime.manifest import FileInfo, Manifest, read_manifest
from tests.runtime.fake_cuda import FakeGpu

CARD = Gpu("NVIDIA GeForce RTX 4070", 89, 12_000_000_000, integrated=False)
VERSIONS = {"tensorrt": "10.3.0", "tensorrt_rtx": "1.7.1.116"}


def judged(manifest: Manifest, library: str = "tensorrt_rtx", gpu: Gpu = CARD) -> Readiness:
    return next(found for found in readiness(manifest, lambda: (gpu, "12.6")) if found.library == library)


@pytest.fixture(autouse=True)
def installed_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries are installed."""
    monkeypatch.setattr(module, "_version", VERSIONS.get)


@pytest.fixture
def manifest(tiny_bundle: Path) -> Manifest:
    """A bundle with engines of both libraries."""
    bare = read_manifest(tiny_bundle)
    engines = tuple(
        EngineInfo(
            graph=graph, file=f"{graph}.{library}.engine", library=library, library_version=version,
            capabilities=(86, 89) if library == "tensorrt_rtx" else (), profiles=(), inputs=(), outputs=(), weights_bytes=None,
            activation_bytes=(), attention_kernels=(), build_seconds=1.0, peak_rss_bytes=None,
        )
        for library, version in VERSIONS.items()
        for graph in bare.graphs
    )  # fmt: skip
    files = {**bare.files, **{engine.file: FileInfo(1, "0" * 64) for engine in engines}}
    return dataclasses.replace(bare, files=files, engines=engines)


def test_a_machine_that_can_is_described(manifest: Manifest) -> None:
    found = readiness(manifest, lambda: (CARD, "12.6"))
    assert [backend.ready for backend in found] == [True, True]
    assert found[1].words == "1.7.1.116 on NVIDIA GeForce RTX 4070 (SM89, 12.0 GB), driver of CUDA 12.6"
    jetson = Gpu("Orin", 87, 8_000_000_000, integrated=True)
    assert "Orin (SM87, 8.0 GB, shared with the host)" in judged(manifest, "tensorrt", jetson).words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engines": ()}, "the bundle holds no engines for it: python -m runtime.compile BUNDLE --library tensorrt_rtx"),
        ({"capabilities": (75, 86)}, "the engines were built for SM75, SM86: python -m runtime.compile"),
        ({"library_version": "1.6.0"}, "the engines were built by 1.6.0: python -m runtime.compile"),
    ],
)
def test_engines_that_do_not_fit_are_told(change: dict[str, object], words: str, manifest: Manifest) -> None:
    if "engines" in change:
        manifest = dataclasses.replace(manifest, engines=())
    else:
        manifest = dataclasses.replace(manifest, engines=tuple(dataclasses.replace(e, **change) for e in manifest.engines))  # type: ignore[arg-type]
    found = judged(manifest)
    assert not found.ready
    assert words in found.words


def test_a_library_that_is_not_installed_says_what_to_install(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_version", lambda library: None)
    found = judged(manifest)
    assert (found.ready, found.words) == (False, "not installed: pip install tensorrt-rtx-cu13")


def test_a_machine_without_a_gpu_gives_the_drivers_reason(manifest: Manifest) -> None:
    def none() -> tuple[Gpu, str]:
        raise EngineError("no NVIDIA driver is installed")

    found = readiness(manifest, none)
    assert [backend.ready for backend in found] == [False, False]
    assert found[1].words == "1.7.1.116 is installed, and cannot run engines here: no NVIDIA driver is installed"


def test_the_driver_is_asked_without_making_a_context(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(total=8_000_000_000)
    gpu.install(monkeypatch)
    assert [backend.ready for backend in readiness(manifest)] == [True, True]
    assert "cuDevicePrimaryCtxRetain" not in gpu.calls
