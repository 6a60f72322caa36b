"""ONNX Runtime's engine on a device: raw addresses, and what is said where the library cannot use the GPU."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from runtime import names
from runtime.device import onnxruntime as backend
from runtime.device.base import DeviceArray
from runtime.device.onnxruntime import CPU, OnnxRuntimeDeviceEngine
from runtime.errors import EngineError
from runtime.manifest import GraphInfo, Manifest, TensorInfo, read_manifest
from runtime.token_table import bfloat16_bits
from tests.runtime.host_device import HostDevice

ONNX_TYPES = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16,
              "int64": onnx.TensorProto.INT64, "int32": onnx.TensorProto.INT32, "bool": onnx.TensorProto.BOOL}  # fmt: skip


def cast(folder: Path, source: str, target: str) -> tuple[Path, GraphInfo]:
    """A graph that casts x [n] to y [n]."""
    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, ONNX_TYPES[dtype], ["n"]) for name, dtype in (("x", source), ("y", target))]
    node = helper.make_node("Cast", ["x"], ["y"], to=ONNX_TYPES[target])
    model = helper.make_model(helper.make_graph([node], "cast", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    path = folder / "cast.onnx"
    onnx.save(model, path)
    return path, GraphInfo(path.name, (TensorInfo("x", source, ("n",)),), (TensorInfo("y", target, ("n",)),))


def put(device: HostDevice, array: np.ndarray, dtype: str) -> DeviceArray:
    at = DeviceArray(device.allocate(array.nbytes), array.shape, dtype)
    device.upload(at.address, array)
    device.synchronize()
    return at


@pytest.mark.parametrize(
    ("source", "target"),
    [("float32", "float16"), ("float32", "bfloat16"), ("bfloat16", "float32"), ("int64", "int32"), ("bool", "float32")],
)
def test_every_type_is_bound_by_its_address(source: str, target: str, tmp_path: Path) -> None:
    device = HostDevice()
    path, graph = cast(tmp_path, source, target)
    engine = OnnxRuntimeDeviceEngine("cast", path, graph, device, device_type=CPU)
    values = np.array([0, 1, 1, 0, 1], np.float32)

    def held(dtype: str) -> np.ndarray:
        return bfloat16_bits(values) if dtype == "bfloat16" else values.astype(dtype)

    x, y = put(device, held(source), source), put(device, np.zeros_like(held(target)), target)
    engine.enqueue({"x": x, "y": y})
    assert np.array_equal(device.view(y), held(target))
    other = put(device, np.zeros_like(held(target)), target)
    engine.enqueue({"x": x, "y": other})
    assert np.array_equal(device.view(other), held(target)), "another address is bound anew"


def test_a_shape_that_does_not_fit_is_an_error_and_the_engine_goes_on(tmp_path: Path) -> None:
    device = HostDevice()
    path, graph = cast(tmp_path, "float32", "float16")
    engine = OnnxRuntimeDeviceEngine("cast", path, graph, device, device_type=CPU)
    x, y = put(device, np.ones(5, np.float32), "float32"), put(device, np.zeros(5, np.float16), "float16")
    with pytest.raises(EngineError, match="ONNX Runtime could not run cast: "):
        engine.enqueue({"x": x, "y": dataclasses.replace(y, shape=(4,))})
    engine.enqueue({"x": x, "y": y})
    assert (device.view(y) == 1).all()


def test_a_type_that_the_library_does_not_bind_is_named(tmp_path: Path) -> None:
    path, graph = cast(tmp_path, "float32", "float16")
    engine = OnnxRuntimeDeviceEngine("cast", path, graph, HostDevice(), device_type=CPU)

    def bind_input(*_: Any) -> None:
        raise TypeError("incompatible function arguments")

    vars(engine)["_binding"] = SimpleNamespace(bind_input=bind_input)
    with pytest.raises(
        EngineError, match=r"takes no bfloat16 for x of cast: incompatible .*; upgrade onnxruntime-gpu, or export with --pre"
    ):
        engine.enqueue({"x": DeviceArray(256, (5,), "bfloat16")})


def test_a_graph_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    path, graph = cast(tmp_path, "float32", "float16")
    wrong = dataclasses.replace(graph, inputs=(TensorInfo("x", "float16", ("n",)),))
    with pytest.raises(EngineError, match="cast: its inputs are not those of the manifest; export the bundle again"):
        OnnxRuntimeDeviceEngine("cast", path, wrong, HostDevice(), device_type=CPU)
    path.write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"cannot load cast\.onnx: .*; export the bundle again"):
        OnnxRuntimeDeviceEngine("cast", path, graph, HostDevice(), device_type=CPU)


def test_options_name_gpu_and_stream_and_keep_the_score_in_float32() -> None:
    options = backend.provider_options("score.4", 4096, 2)
    assert (options["device_id"], options["user_compute_stream"], options["use_tf32"]) == ("2", "4096", "0")
    assert (options["do_copy_in_default_stream"], options["arena_extend_strategy"]) == ("1", "kSameAsRequested")
    assert backend.provider_options(names.PRE_ECL, 4096, 2)["use_tf32"] == "1"


# ---------------------------------------------------------------- libraries that cannot use the GPU


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A library with a CUDA provider whose file is not there."""
    (tmp_path / "capi").mkdir()
    fake = SimpleNamespace(
        __version__="1.99.0", __file__=str(tmp_path / "__init__.py"), cuda_version="13.0",
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )  # fmt: skip
    monkeypatch.setattr(backend, "ort", fake)
    return fake


def test_the_package_for_cpus_says_what_to_install_instead(library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    library.get_available_providers = lambda: ["CPUExecutionProvider"]
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    message = r"ONNX Runtime 1\.99\.0 is the package for CPUs: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
    with pytest.raises(EngineError, match=message):
        backend.check_cuda_provider()


def not_installed(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_both_packages_over_each_other_are_told(library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    library.get_available_providers = lambda: ["CPUExecutionProvider"]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.99.0")
    with pytest.raises(
        EngineError, match=r"lie over each other, .*: pip uninstall onnxruntime onnxruntime-gpu, then pip install onnxruntime-"
    ):
        backend.check_cuda_provider()


@pytest.mark.parametrize(
    ("missing", "advice"),
    [
        ("libcublasLt.so.13", r"this build needs CUDA 13 and cuDNN 9: pip install 'onnxruntime-gpu\[cuda,cudnn\]'"),
        ("libcuda.so.1", "it comes with NVIDIA's driver: install the driver"),
    ],
)
def test_a_missing_library_is_named(
    missing: str, advice: str, library: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the loader of this system says it: a shared object that needs another one, which is gone."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to make a shared object with")
    needed, provider = tmp_path / missing, tmp_path / "capi" / "libonnxruntime_providers_cuda.so"
    (tmp_path / "empty.c").write_text("int unused;\n")
    subprocess.run(["cc", "-shared", "-o", needed, f"-Wl,-soname,{missing}", tmp_path / "empty.c"], check=True)
    subprocess.run(["cc", "-shared", "-o", provider, "-Wl,--no-as-needed", tmp_path / "empty.c", needed], check=True)
    needed.unlink()
    library.preload_dlls = lambda: print("Failed to load something")
    with pytest.raises(EngineError, match=rf"1\.99\.0 cannot use the GPU: {missing.replace('.', '[.]')} is not found; {advice}"):
        backend.check_cuda_provider()
    assert capsys.readouterr().out == "", "what the library prints would be the answer's beginning"


def test_a_library_that_falls_back_to_the_cpu_is_an_error(tiny_bundle: Path) -> None:
    """The installed one, or one with a GPU, whichever is here: it must not run on the CPU unnoticed."""
    manifest = read_manifest(tiny_bundle)
    graph = manifest.graphs["score.4"]
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this library may use a GPU")
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(EngineError, match="left the GPU for the CPU when it loaded"),
    ):
        OnnxRuntimeDeviceEngine("score.4", tiny_bundle / graph.file, graph, HostDevice())


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("CUDNN failure 1001: CUDNN_STATUS_NOT_INITIALIZED", "this build needs CUDA"),
        ("Failed to allocate memory for requested buffer of size 123", "the GPU's memory is full: close other programs"),
        ("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for Gelu(20)", "export with another --precision"),
        ("something else", "something else; export the bundle again"),
    ],
)
def test_what_the_library_says_comes_with_what_to_do(said: str, advice: str) -> None:
    assert advice in backend._explained(RuntimeError(said))


def test_engines_of_all_graphs_are_loaded_in_the_manifests_order(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest: Manifest = read_manifest(tiny_bundle)
    monkeypatch.setattr(backend, "check_cuda_provider", lambda: None)
    made: list[tuple[Any, ...]] = []

    def make(name: str, path: Path, graph: GraphInfo, device: Any, **options: Any) -> str:
        made.append((name, path.name, options["device_index"]))
        return name

    monkeypatch.setattr(backend, "OnnxRuntimeDeviceEngine", make)
    assert list(backend.load_engines(tiny_bundle, manifest, HostDevice(), 3)) == list(manifest.graphs)
    assert made == [(name, graph.file, 3) for name, graph in manifest.graphs.items()]
