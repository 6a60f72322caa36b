"""The CUDA device on a GPU that is none: every call is one the real packages have, and the bytes end up where they should, in order."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest

from runtime.device import scatter
from runtime.device.base import DeviceArray
from runtime.device.cuda import CudaDevice
from runtime.device.cuda_api import load_driver
from runtime.errors import EngineError
from tests.runtime.fake_cuda import FakeGpu, needs_compiler, recorded


@pytest.fixture(params=recorded())
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Its package in the place of cuda-bindings, once for each recorded version."""
    gpu = FakeGpu(request.param)
    gpu.install(monkeypatch)
    return gpu


def use(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> FakeGpu:
    gpu = FakeGpu(**facts)
    gpu.install(monkeypatch)
    return gpu


def read(device: CudaDevice, address: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    target = np.empty(shape, dtype)
    device.download(target, address)
    device.synchronize()
    return target


def put(device: CudaDevice, array: np.ndarray) -> DeviceArray:
    address = device.allocate(array.nbytes)
    device.upload(address, np.ascontiguousarray(array))
    device.synchronize()
    return DeviceArray(address, array.shape, str(array.dtype))


def test_device_says_what_it_is(gpu: FakeGpu) -> None:
    device = CudaDevice()
    assert (device.name, device.capability, device.driver_version, device.total_bytes) == ("Fake GPU", 89, "12.6", 1 << 30)
    address = device.allocate(1 << 20)
    assert device.memory() == ((1 << 30) - (1 << 20), 1 << 30)
    device.free(address)
    assert device.memory() == (1 << 30, 1 << 30)


def test_memory_is_zero_and_copies_run_in_order_when_they_are_waited_for(gpu: FakeGpu) -> None:
    device = CudaDevice()
    first, second = device.allocate(32), device.allocate(32)
    assert first % 256 == second % 256 == 0
    assert not read(device, first, "uint8", (32,)).any()
    source = device.host_buffer(32)
    assert source.dtype == np.uint8
    assert not source.any()
    source[:] = np.arange(32)
    target = np.zeros(32, np.uint8)
    device.upload(first, source)
    device.copy(second, first + 8, 8)
    device.download(target, second)
    assert not target.any()  # nothing has waited yet
    device.synchronize()
    assert target.tolist() == [*range(8, 16), *[0] * 24]


def test_a_recording_runs_nothing_until_it_is_called_and_then_as_recorded(gpu: FakeGpu) -> None:
    device = CudaDevice()
    cell, copy = device.allocate(8), device.allocate(8)
    number = device.host_buffer(8).view(np.int64)
    number[0] = 1

    def work() -> None:
        device.upload(cell, number)
        device.copy(copy, cell, 8)

    replay = device.capture(work)
    assert read(device, copy, "int64", (1,))[0] == 0
    for value in (5, 7):
        number[0] = value
        replay()
        assert read(device, copy, "int64", (1,))[0] == value
    del replay
    device.synchronize()
    assert gpu.graphs == {}  # neither the recording nor what it was made of is left


def test_a_recording_that_fails_leaves_the_stream_usable(gpu: FakeGpu) -> None:
    device = CudaDevice()

    def work() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        device.capture(work)
    with pytest.raises(EngineError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        device.capture(lambda: device.synchronize())
    with pytest.raises(EngineError, match="cuMemAlloc: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        device.capture(lambda: device.free(device.allocate(8)))
    assert gpu.graphs == {}
    assert not read(device, device.allocate(8), "uint8", (8,)).any()


def test_host_buffers_free_themselves_once_nothing_uses_them(gpu: FakeGpu) -> None:
    device = CudaDevice()
    address = device.allocate(16)
    buffer = device.host_buffer(16)
    view = buffer[4:8].view(np.float32)
    device.upload(address, buffer)
    del buffer
    gc.collect()
    assert len(gpu.host) == 1  # the view
    del view
    gc.collect()
    assert len(gpu.host) == 1  # the copy still waits
    device.synchronize()
    assert gpu.host == {}
    assert device.host_buffer(0).nbytes == 0


def test_device_works_from_several_threads(gpu: FakeGpu) -> None:
    device = CudaDevice()
    address = device.allocate(8)
    found: list[int] = []

    def work() -> None:
        device.upload(address, np.array([9]))
        found.append(int(read(device, address, "int64", (1,))[0]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [9]
    assert not gpu.current  # and the caller's own thread is left as it was


def test_close_frees_everything_but_arrays_that_live_on(gpu: FakeGpu) -> None:
    device = CudaDevice()
    order: list[str] = []
    device.before_close(lambda: order.append("first"))
    device.before_close(lambda: order.append("second"))
    device.allocate(100)
    buffer = device.host_buffer(8)
    replay = device.capture(lambda: None)
    device.close()
    device.close()
    assert order == ["second", "first"]
    assert gpu.memory == {}
    buffer[:] = 3
    for use_it in (replay, device.synchronize, device.memory, partial(device.allocate, 1)):
        with pytest.raises(EngineError, match="the device is closed: load the bundle again"):
            use_it()
    del buffer, replay, use_it
    gc.collect()
    assert gpu.host == {}
    assert gpu.graphs == {}
    del device
    gc.collect()
    assert gpu.retained == 0


def test_misuse_is_told(gpu: FakeGpu) -> None:
    device = CudaDevice()
    address = device.allocate(64)
    with pytest.raises(ValueError, match="not C-contiguous"):
        device.upload(address, np.zeros((4, 4), np.float32).T[:2])
    frozen = np.zeros(4)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        device.download(frozen, address)
    device.free(address)
    with pytest.raises(ValueError, match="was freed before"):
        device.free(address)


# ---------------------------------------------------------------- rows into a cache


def scattered(cache: np.ndarray, rows: np.ndarray, past: int) -> np.ndarray:
    expected = cache.copy()
    stop = min(past + rows.shape[2], cache.shape[2])
    expected[:, :, past:stop] = rows[:, :, : stop - past]
    return expected


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "d_h", "unit"), [("float16", 8, 16), ("float16", 6, 4), ("float16", 5, 2), ("float32", 4, 16), ("float32", 3, 4)]
)
@pytest.mark.parametrize(("count", "past"), [(1, 0), (1, 15), (5, 3), (300, 7)])
def test_rows_land_at_the_position_that_stands_in_device_memory(
    dtype: str, d_h: int, unit: int, count: int, past: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch)
    device, rng = CudaDevice(), np.random.default_rng(count)
    cache = rng.standard_normal((1, 3, 320, d_h)).astype(dtype)
    rows = rng.standard_normal((1, 3, count, d_h)).astype(dtype)
    on_device, new, position = put(device, cache), put(device, rows), put(device, np.array([0]))
    replay = device.capture(lambda: device.scatter_rows(on_device, new, position))  # the first use, its kernel loaded meanwhile
    device.upload(position.address, np.array([past]))
    replay()
    assert np.array_equal(read(device, on_device.address, dtype, cache.shape), scattered(cache, rows, past))
    assert not (new.address | on_device.address) % unit


@needs_compiler
@pytest.mark.parametrize("past", [14, 16, 400, -1, -(1 << 40)])
def test_rows_that_would_leave_the_cache_are_dropped(past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    device = CudaDevice()
    cache, rows = np.zeros((1, 2, 16, 8), np.float16), np.ones((1, 2, 4, 8), np.float16)
    on_device = put(device, cache)
    device.scatter_rows(on_device, put(device, rows), put(device, np.array([past])))
    found = read(device, on_device.address, "float16", cache.shape)
    slots = [slot for slot in range(past, past + 4) if 0 <= slot < 16]
    assert sorted(set(np.flatnonzero(found[0, 0, :, 0]).tolist())) == slots
    assert int(found.sum()) == len(slots) * 2 * 8


@needs_compiler
def test_rows_at_an_odd_address_are_moved_in_smaller_units(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    device = CudaDevice()
    rows = np.arange(16, dtype=np.float16).reshape(1, 1, 2, 8)
    shifted = put(device, np.concatenate([np.zeros(1, np.float16), rows.ravel()]))
    cache = put(device, np.zeros((1, 1, 4, 8), np.float16))
    device.scatter_rows(cache, DeviceArray(shifted.address + 2, rows.shape, "float16"), put(device, np.array([1])))
    found = read(device, cache.address, "float16", (1, 1, 4, 8))
    assert found.ravel().tolist() == [*[0] * 8, *range(16), *[0] * 8]


@needs_compiler
def test_the_kernel_is_compiled_once_in_a_process_and_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = use(monkeypatch, major=8, minor=7)
    for _ in range(2):
        device = CudaDevice()
        cache = put(device, np.zeros((1, 1, 4, 8), np.float32))
        for _ in range(3):
            device.scatter_rows(cache, put(device, np.ones((1, 1, 1, 8), np.float32)), put(device, np.array([0])))
        device.close()
    assert (gpu.calls["nvrtcCompileProgram"], gpu.calls["cuModuleLoadData"]) == (1, 2)


@pytest.mark.parametrize(
    ("cache", "rows", "past"),
    [
        ((1, 2, 8, 4), (1, 3, 1, 4), (1,)), ((1, 2, 8, 4), (1, 2, 1, 8), (1,)), ((2, 2, 8, 4), (2, 2, 1, 4), (1,)),
        ((1, 2, 8, 4), (2, 1, 4), (1,)),
        ((1, 2, 8, 4), (1, 2, 1, 4), (2,)),
    ],
)  # fmt: skip
def test_rows_of_another_cache_are_refused(
    cache: tuple[int, ...], rows: tuple[int, ...], past: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = use(monkeypatch)
    kernel = scatter.Scatter.__new__(scatter.Scatter)
    with pytest.raises(ValueError, match=r"cannot put rows .* into a cache"):
        kernel.enqueue(DeviceArray(0, cache, "float16"), DeviceArray(0, rows, "float16"), DeviceArray(0, past, "int64"), None)
    assert "cuLaunchKernel" not in gpu.calls


# ---------------------------------------------------------------- what is missing


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        EngineError, match=r"needs the package cuda-bindings, .*pip install cuda-bindings .*JetPack 6's: pip install 'cuda-bindings<13'"
    ):
        CudaDevice()


def test_a_missing_driver_is_told(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(flags: int) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(sys.modules["cuda.bindings.driver"], "cuInit", missing)
    with pytest.raises(EngineError, match=r"no NVIDIA driver is installed \(libcuda cannot be loaded\): .*--gpus all .*dlopen libcuda"):
        CudaDevice()


def test_the_real_package_without_a_driver_gives_the_same_message() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install cuda-bindings")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(EngineError, match="no NVIDIA driver is installed"):
            load_driver()
    else:
        pytest.skip("this machine has a driver")


def test_the_real_compiler_takes_the_kernel_for_every_chip() -> None:
    """NVRTC needs no GPU."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed: pip install cuda-bindings")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12")
    for capability in {75, 80, 86, 87, 89, 90, 110, 120, 121} & set(nvrtc.nvrtcGetSupportedArchs()[1]):
        image = scatter.compile_for(nvrtc, capability)
        assert image.startswith(b"\x7fELF")
        assert all(b"scatter_%d" % unit in image for unit in scatter.UNITS)


def test_recorded_names_are_those_of_the_installed_package() -> None:
    bindings = pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install cuda-bindings")
    if bindings.__version__ not in recorded():
        pytest.skip(f"the names of cuda-bindings {bindings.__version__} are not recorded")
    import importlib

    for module in ("driver", "nvrtc"):
        real = importlib.import_module(f"cuda.bindings.{module}")
        assert [name for name in recorded()[bindings.__version__][module] if not hasattr(real, name)] == []
    driver = importlib.import_module("cuda.bindings.driver")
    assert {n: int(v) for n, v in driver.CUresult.__members__.items()} == recorded()[bindings.__version__]["enumerations"]["CUresult"]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"count": 0}, r"the NVIDIA driver finds no GPU: .*CUDA_VISIBLE_DEVICES.*\(CUDA_ERROR_NO_DEVICE\)"),
        ({"count": 1, "index": 1}, "there is no GPU 1: the driver finds 1, counted from 0"),
        ({"count": 1, "index": -1}, "there is no GPU -1"),
    ],
)
def test_a_missing_gpu_is_told(facts: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = facts.pop("index", 0)
    use(monkeypatch, **facts)
    with pytest.raises(EngineError, match=message):
        CudaDevice(index)


def test_a_driver_older_than_the_package_is_told(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError('Function "cuGraphInstantiate" not found')

    device = CudaDevice()
    monkeypatch.setattr(sys.modules["cuda.bindings.driver"], "cuGraphInstantiate", missing)
    with pytest.raises(
        EngineError, match=r"the NVIDIA driver cannot do cuGraphInstantiate .*update the driver, or pip install cuda-bindings .*<13"
    ):
        device.capture(lambda: None)


def test_out_of_memory_says_how_much_was_asked_for_and_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, total=1_000_000)
    device = CudaDevice()
    device.allocate(400_000)
    with pytest.raises(
        EngineError, match=r"out of GPU memory: 700\.0 kB were asked for .*, 600\.0 kB of 1\.0 MB are free; close other programs"
    ):
        device.allocate(700_000)


def test_a_lost_device_says_to_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = use(monkeypatch)
    device = CudaDevice()
    device.allocate(8)
    gpu.failing["cuStreamSynchronize"] = "CUDA_ERROR_ILLEGAL_ADDRESS"
    with pytest.raises(
        EngineError,
        match=r"the GPU stopped working for this process \(.*CUDA_ERROR_ILLEGAL_ADDRESS, words for 700\): start the program again",
    ):
        device.synchronize()
    gpu.pending.clear()
    device.close()


def test_nvrtc_is_missed_only_by_a_cache_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, no_nvrtc=True)
    device = CudaDevice()
    cache = put(device, np.zeros((1, 1, 4, 8), np.float16))
    with pytest.raises(EngineError, match=r"NVRTC is missing: pip install nvidia-cuda-nvrtc-cu12 .*Jetson: apt-get .*dlopen libnvrtc"):
        device.scatter_rows(cache, cache, put(device, np.array([0])))


def test_a_gpu_that_nvrtc_does_not_know_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, major=12, minor=1)
    device = CudaDevice()
    cache = put(device, np.zeros((1, 1, 4, 8), np.float16))
    with pytest.raises(EngineError, match=r"NVRTC 12\.9 compiles for SM75 to SM90, this GPU is SM121: install a newer one"):
        device.scatter_rows(cache, cache, put(device, np.array([0])))


@pytest.mark.parametrize("name", ["cuMemsetD8Async", "cuGraphInstantiate", "cuStreamBeginCapture"])
def test_a_package_without_a_name_that_the_device_calls_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    gpu.names = {**gpu.names, "driver": [known for known in gpu.names["driver"] if known != name]}
    gpu.install(monkeypatch)
    device = CudaDevice()

    def use_it() -> None:
        device.capture(lambda: None)
        device.allocate(8)

    with pytest.raises(AttributeError, match=name):
        use_it()
