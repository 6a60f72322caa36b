"""Which backend runs: a named one or an error; without a name, what the bundle was made for, or the CPU with one warning."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export import build
from runtime import backends, explain, generate, profile
from runtime.device.base import DeviceEngine
from runtime.engine_info import EngineInfo
from runtime.errors import BundleError, EngineError, UsageError
from runtime.manifest import Manifest, read_manifest
from runtime.pipeline import load
from tests.runtime.host_device import HostDevice, host_engines
from tests.site import Site

NO_DRIVER = "there is no NVIDIA driver: install it"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What backends import: a GPU that is there, engines that load. Set `error` or `refusal` to change that."""
    state = SimpleNamespace(error=None, refusal=None, devices=[], libraries=[])

    def make_device(index: int) -> HostDevice:
        if state.error:
            raise EngineError(state.error)
        device = HostDevice()
        state.devices.append((index, device))
        return device

    def engines(bundle: Path, manifest: Manifest, device: HostDevice) -> dict[str, DeviceEngine]:
        if state.refusal:
            raise EngineError(state.refusal)
        return host_engines(bundle, manifest, device)

    def load_tensorrt(bundle: Path, manifest: Manifest, library: str, device: HostDevice) -> dict[str, DeviceEngine]:
        state.libraries.append(library)
        return engines(bundle, manifest, device)

    def load_cuda(bundle: Path, manifest: Manifest, device: HostDevice, index: int, threads: int | None) -> dict[str, DeviceEngine]:
        state.libraries.append("cuda")
        return engines(bundle, manifest, device)

    fakes = {
        "cuda": SimpleNamespace(CudaDevice=make_device), "tensorrt": SimpleNamespace(load_engines=load_tensorrt),
        "onnxruntime": SimpleNamespace(load_engines=load_cuda),
    }  # fmt: skip
    monkeypatch.setattr(backends, "_module", fakes.__getitem__)
    return state


@pytest.fixture
def made_for(site: Site) -> Callable[..., Path]:
    """The site's bundle as if it were exported for a target, and compiled with libraries."""

    def make(target: str = "cpu", *libraries: str) -> Path:
        manifest = read_manifest(site.bundle)
        engines = tuple(
            EngineInfo(
                "vision",
                manifest.graphs["vision"].file,
                library,
                "10.3.0",
                (),
                (),
                (),
                (),
                None,
                (),
                (),
                build_seconds=1.0,
                peak_rss_bytes=None,
            )
            for library in libraries
        )
        changed = dataclasses.replace(manifest, target=target, engines=engines)
        (site.bundle / "bundle.json").write_text(changed.to_json())
        return site.bundle

    return make


def answer(model: Any) -> tuple[int, ...]:
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    tokens: tuple[int, ...] = model.generate("read row 1.", [image], max_new_tokens=6).token_ids
    return tokens


# ---------------------------------------------------------------- which is chosen


def test_a_bundle_for_the_cpu_tries_nothing_else(made_for: Callable[..., Path], modules: SimpleNamespace, caplog: Any) -> None:
    model = load(made_for())
    assert model.backend == "cpu"
    assert model.chain.executor.label.startswith("ONNX Runtime ")
    assert (modules.devices, caplog.messages) == ([], [])


@pytest.mark.parametrize(
    ("target", "libraries", "backend"),
    [
        ("cuda", (), "cuda"),
        ("rtx", ("tensorrt_rtx",), "tensorrt_rtx"),
        ("jetson-orin", ("tensorrt",), "tensorrt"),
        ("cuda", ("tensorrt",), "tensorrt"),
    ],
)
@pytest.mark.parametrize("wanted", [None, "auto"])
def test_what_the_bundle_was_made_for_runs(
    target: str,
    libraries: tuple[str, ...],
    backend: str,
    wanted: str | None,
    made_for: Callable[..., Path],
    modules: SimpleNamespace,
    caplog: Any,
) -> None:
    bundle = made_for(target, *libraries)
    model = load(bundle, backend=wanted, device_index=1)
    assert model.backend == backend
    assert ([index for index, _ in modules.devices], modules.libraries) == ([1], [backend])
    assert answer(model) == answer(load(bundle, backend="cpu"))
    assert caplog.messages == []


def test_where_it_cannot_run_the_cpu_does_with_one_warning(made_for: Callable[..., Path], modules: SimpleNamespace, caplog: Any) -> None:
    modules.error = NO_DRIVER
    bundle = made_for("cuda", "tensorrt")
    model = load(bundle)
    assert model.backend == "cpu"
    assert answer(model) == answer(load(bundle, backend="cpu"))
    assert caplog.messages == [
        f"this bundle runs on the CPU, the backend it was made for cannot be used here (tensorrt: {NO_DRIVER}; cuda: {NO_DRIVER})"
    ]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_engines_that_do_not_fit_give_the_device_back(made_for: Callable[..., Path], modules: SimpleNamespace, caplog: Any) -> None:
    modules.refusal = "the engines are for compute capability 8.7, this device has 9.0: compile the bundle again"
    assert load(made_for("rtx", "tensorrt_rtx")).backend == "cpu"
    assert [device.closed for _, device in modules.devices] == [True]
    assert "compute capability 8.7" in caplog.messages[0]


@pytest.mark.parametrize("backend", ["cuda", "tensorrt", "tensorrt_rtx"])
def test_a_named_backend_never_falls_back(backend: str, made_for: Callable[..., Path], modules: SimpleNamespace, caplog: Any) -> None:
    modules.error = NO_DRIVER
    bundle = made_for("cpu", "tensorrt", "tensorrt_rtx")
    with pytest.raises(EngineError, match=NO_DRIVER):
        load(bundle, backend=backend)
    assert caplog.messages == []
    modules.error = None
    assert load(bundle, backend=backend).backend == backend


def test_a_library_without_engines_says_how_to_compile(made_for: Callable[..., Path], modules: SimpleNamespace) -> None:
    bundle = made_for("rtx", "tensorrt_rtx")
    with pytest.raises(
        EngineError, match=r"the bundle holds no engines of tensorrt: python -m runtime.compile .* --library tensorrt, on the"
    ):
        load(bundle, backend="tensorrt")
    assert modules.devices == []


def test_a_damaged_bundle_is_no_reason_to_run_it_on_the_cpu(made_for: Callable[..., Path], modules: SimpleNamespace) -> None:
    bundle = made_for("cuda")
    manifest = read_manifest(bundle)
    graphs = {name: graph for name, graph in manifest.graphs.items() if name != "post_ecl"}
    (bundle / "bundle.json").write_text(dataclasses.replace(manifest, graphs=graphs).to_json())
    with pytest.raises(BundleError, match="the manifest has no graph post_ecl"):
        load(bundle)
    assert [device.closed for _, device in modules.devices] == [True]


def test_a_module_that_cannot_be_imported_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError(f"{name}: libsomething.so.1 is missing")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(EngineError, match=r"the backend cannot be loaded \(runtime\.device\.cuda: libsomething.* see docs/backends\.md"):
        backends._module("cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "vulkan"}, "backend is 'vulkan'; give auto or one of cpu, cuda, tensorrt, tensorrt_rtx"),
        ({"backend": 3}, "backend is 3; give auto"),
        ({"device_index": -1}, "device_index is -1; give the number of a GPU, 0 for the first"),
        ({"device_index": "0"}, "device_index is '0'; give the number"),
        ({"device_index": True}, "device_index is True; give the number"),
    ],
)
def test_options_that_cannot_be_meant_are_told(options: dict[str, Any], message: str, tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load(tiny_bundle, **options)


def test_a_closed_model_on_the_cpu_says_so(tiny_bundle: Path) -> None:
    model = load(tiny_bundle, cache_bytes=1 << 20)
    answer(model)
    model.close()
    assert model.cache.nbytes == 0
    with pytest.raises(EngineError, match="the model was closed: load the bundle again"):
        answer(model)


# ---------------------------------------------------------------- the commands


@pytest.fixture
def scene(site: Site) -> Path:
    path = site.folder / "scene.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)).save(path)
    return path


def test_generate_says_what_ran(
    made_for: Callable[..., Path], modules: SimpleNamespace, scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--bundle", str(made_for("cuda")), "--image", str(scene), "--prompt", "read row 1.", "--max-new-tokens", "4", "--json"]
    for backend, more in (("cuda", ["--device", "2"]), ("cpu", ["--backend", "cpu"])):
        assert generate.main([*argv, *more]) == 0
        said = capsys.readouterr()
        assert f"\nbackend: {backend}, ONNX Runtime " in said.err
        assert json.loads(said.out.splitlines()[-1])["backend"] == backend
    assert [index for index, _ in modules.devices] == [2]
    modules.error = NO_DRIVER
    assert generate.main([*argv, "--backend", "cuda"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"python -m runtime.generate: error: {NO_DRIVER}"


def test_profile_and_explain_take_the_same_options(
    made_for: Callable[..., Path], modules: SimpleNamespace, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(made_for("cuda"))
    output = ["--output", str(tmp_path), "--runs", "3", "--warmup", "0", "--max-new-tokens", "3"]
    assert profile.main(["--bundle", bundle, "--backend", "cuda", *output]) == 0
    assert "; runs on: cuda, ONNX Runtime " in capsys.readouterr().out
    subject = json.loads((tmp_path / "profile.json").read_text())["subject"]
    assert subject["backend"].startswith("cuda, ONNX Runtime ")
    assert explain.main(["--bundle", bundle, "--image", str(scene), "--html", str(tmp_path / "kept.html"), "--device", "1"]) == 0
    assert [index for index, _ in modules.devices] == [0, 1]


# ---------------------------------------------------------------- bundles for GPUs


def test_a_cuda_bundle_is_exported_in_fp16_and_runs_on_the_cpu_too(site: Site, caplog: Any, capsys: pytest.CaptureFixture[str]) -> None:
    output = site.folder / "cuda"
    argv = ["--model", "llava15", "--checkpoint", str(site.checkpoint), "--target", "cuda", "--keep", "4", "--split-layer", "2"]
    assert build.main([*argv, "--max-context", "512", "--output", str(output)]) == 0
    manifest = read_manifest(output)
    assert (manifest.target, manifest.precision, manifest.engines) == ("cuda", "fp16", ())
    present = next(t for t in manifest.graphs["pre_ecl"].outputs if t.name == "present.0.key")
    assert (present.dtype, present.shape[2]) == ("float16", "capacity")
    model = load(output, backend="cpu")
    assert len(answer(model)) > 0
    assert caplog.messages == []
    capsys.readouterr()
