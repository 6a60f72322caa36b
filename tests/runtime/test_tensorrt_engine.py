"""Compiled engines on a fake GPU with every recorded library: a bundle's graphs give what plain ONNX Runtime gives, refusals are told.

What a real GPU computes cannot be shown here; that the runtime asks the libraries for the right things, with names that they have, can.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from runtime import names
from runtime.device.base import DeviceArray
from runtime.device.cuda import CudaDevice
from runtime.device.tensorrt import TensorRTEngine, load_engines
from runtime.engine_files import CompileOptions, compile_bundle
from runtime.engines.tensorrt_builder import BuiltEngine, EngineSpec
from runtime.engines.tensorrt_profiles import ProfileOptions
from runtime.errors import EngineError, StorageError
from runtime.manifest import Manifest, TensorInfo, read_manifest
from tests.runtime import fake_tensorrt_runtime as fake
from tests.runtime.fake_cuda import FakeGpu
from tests.runtime.fake_tensorrt import recorded

CAPACITY = 64
RTX = next(key for key in recorded() if key.startswith("tensorrt_rtx"))
OLD = "tensorrt 10.3.0"
PROFILES = ProfileOptions(text_tokens=12, images=2, capacity=CAPACITY)
SIZES = {  # one run of each profile: sizes of the symbolic dimensions
    "vision": ({"images": 1},),
    "pre_ecl": ({"sequence": 20}, {"sequence": 12}, {"sequence": 1}, {"sequence": 9}),
    "post_ecl": ({"sequence": 14}, {"sequence": 11}, {"sequence": 3}),
    "score.4": ({"N": 16}, {"N": 32}),
    "score.2": ({"N": 16},),
}


class Setup:
    """A compiled copy of the tiny bundle, the GPU and the library."""

    def __init__(self, bundle: Path, gpu: FakeGpu, module: ModuleType) -> None:
        self.bundle, self.gpu, self.module = bundle, gpu, module
        self.manifest: Manifest = read_manifest(bundle)
        self.device = CudaDevice()

    def load(self) -> dict[str, TensorRTEngine]:
        engines = load_engines(self.bundle, self.manifest, self.module.__name__, self.device)
        return {name: engine for name, engine in engines.items() if isinstance(engine, TensorRTEngine)}

    def arrays(self, graph: str, sizes: dict[str, int], seed: int = 0) -> tuple[dict[str, DeviceArray], dict[str, np.ndarray]]:
        """Device arrays for every tensor, caches in place, and the inputs in host memory."""
        listed, rng = self.manifest.graphs[graph], np.random.default_rng(seed)
        host = {tensor.name: draw(tensor, {"capacity": CAPACITY, **sizes}, rng) for tensor in listed.inputs}
        placed = {name: self.put(array) for name, array in host.items()}
        expected = fake.session(str(self.bundle / listed.file)).run(None, host)
        for tensor, result in zip(listed.outputs, expected, strict=True):
            past = tensor.name.replace(names.PRESENT, names.PAST)
            same = placed[past].address if past in placed and past != tensor.name else self.device.allocate(result.nbytes)
            placed[tensor.name] = DeviceArray(same, result.shape, tensor.dtype)
        return placed, host

    def put(self, array: np.ndarray) -> DeviceArray:
        address = self.device.allocate(array.nbytes)
        self.device.upload(address, array)
        self.device.synchronize()
        return DeviceArray(address, array.shape, str(array.dtype))

    def read(self, array: DeviceArray) -> np.ndarray:
        target = np.empty(array.shape, array.dtype)
        self.device.download(target, array.address)
        self.device.synchronize()
        return target


def draw(tensor: TensorInfo, sizes: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
    if tensor.name in (names.PAST_LENGTH, names.LAST_INDEX):
        return np.zeros(shape, np.int64) + (5 if tensor.name == names.PAST_LENGTH else 0)
    if tensor.dtype == "int64":
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(np.int64)
    return rng.standard_normal(shape).astype(tensor.dtype)


@pytest.fixture
def make(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Setup]:
    """`make(key, **changes)`: a setup for a library; `changes` go into its engines."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(key: str, capabilities: tuple[int, ...] = (86, 89), version: str = "13.5.0", **changes: Any) -> Setup:
        library = key.split()[0]
        bundle = tmp_path / "bundle"
        if not bundle.exists():
            shutil.copytree(tiny_bundle, bundle)
        chips = capabilities if library == "tensorrt_rtx" else ()

        def build(spec: EngineSpec) -> BuiltEngine:
            built = fake.build(spec, **{name: value for name, value in changes.items() if spec.graph == changes.get("graph", spec.graph)})
            return dataclasses.replace(built, info=dataclasses.replace(built.info, library_version=key.split()[1]))

        compile_bundle(bundle, CompileOptions(library, chips, PROFILES), build=build)
        gpu = FakeGpu(version)
        gpu.install(monkeypatch)
        module = fake.running_library(key, gpu)
        monkeypatch.setitem(sys.modules, library, module)
        return Setup(bundle, gpu, module)

    return make


@pytest.mark.parametrize("version", ["12.8.0", "13.5.0"])
@pytest.mark.parametrize("key", recorded())
def test_every_graph_gives_what_onnxruntime_gives(key: str, version: str, make: Callable[..., Setup]) -> None:
    setup = make(key, version=version)
    engines = setup.load()
    assert engines.keys() == setup.manifest.graphs.keys() == SIZES.keys()
    for graph, engine in engines.items():
        for seed, sizes in enumerate((*SIZES[graph], SIZES[graph][0])):
            placed, host = setup.arrays(graph, sizes, seed)
            engine.enqueue(placed)
            listed = setup.manifest.graphs[graph]
            for tensor, expected in zip(listed.outputs, fake.session(str(setup.bundle / listed.file)).run(None, host), strict=True):
                assert np.array_equal(setup.read(placed[tensor.name]), expected), (graph, sizes, tensor.name)
    setup.device.close()
    assert setup.gpu.memory == {}


def test_engines_say_what_they_take(make: Callable[..., Setup]) -> None:
    engines = make(OLD).load()
    assert {name: (engine.name, engine.capacity, engine.max_rows) for name, engine in engines.items()} == {
        "vision": ("vision", None, None), "pre_ecl": ("pre_ecl", CAPACITY, 44), "post_ecl": ("post_ecl", CAPACITY, 44),
        "score.4": ("score.4", None, 32), "score.2": ("score.2", None, 32),
    }  # fmt: skip
    assert all(engine.uncapturable is None for engine in engines.values())


@pytest.mark.parametrize("key", [OLD, RTX])
def test_all_contexts_share_one_buffer_for_activations_as_large_as_the_neediest(key: str, make: Callable[..., Setup]) -> None:
    setup = make(key)
    engines = setup.load()
    contexts = [lane.context for engine in engines.values() for lane in engine._lanes]
    assert len(contexts) == 1 + 3 + 3 + 1 + 1
    assert {context._memory for context in contexts} == {(contexts[0]._memory[0], 1000 + 7 * 2)}
    assert list(setup.gpu.memory) == [contexts[0]._memory[0]]  # what the first runs were given is given back


def test_a_decode_step_can_be_recorded_at_once_and_replayed_in_place(make: Callable[..., Setup]) -> None:
    setup = make(RTX)
    engine = setup.load()["pre_ecl"]
    placed, host = setup.arrays("pre_ecl", {"sequence": 1})
    replay = setup.device.capture(lambda: engine.enqueue(placed))
    assert not setup.read(placed[names.HIDDEN_STATES]).any()
    for past in (5, 6):
        setup.device.upload(placed[names.PAST_LENGTH].address, np.array([past]))
        replay()
        host[names.PAST_LENGTH] = np.array([past])
        listed = setup.manifest.graphs["pre_ecl"]
        results = fake.session(str(setup.bundle / listed.file)).run(None, host)
        for tensor, expected in zip(listed.outputs, results, strict=True):
            assert np.array_equal(setup.read(placed[tensor.name]), expected), tensor.name
            if tensor.name.startswith(names.PRESENT):
                host[tensor.name.replace(names.PRESENT, names.PAST)] = expected


def test_shapes_have_to_run_once_before_they_are_recorded(make: Callable[..., Setup]) -> None:
    setup = make(OLD)
    engine = setup.load()["pre_ecl"]
    placed, _ = setup.arrays("pre_ecl", {"sequence": 3})
    with pytest.raises(EngineError, match=r"pre_ecl: the library refused the run .*not permitted when stream is capturing"):
        setup.device.capture(lambda: engine.enqueue(placed))
    engine.enqueue(placed)
    setup.device.capture(lambda: engine.enqueue(placed))


def test_only_what_changed_is_told_to_a_context(make: Callable[..., Setup]) -> None:
    setup = make(OLD)
    engine = setup.load()["pre_ecl"]
    placed, _ = setup.arrays("pre_ecl", {"sequence": 1})
    engine.enqueue(placed)
    context = engine._lanes[2].context
    before = context._calls
    engine.enqueue(dict(placed))
    assert context._calls == before
    moved = {**placed, names.INPUTS_EMBEDS: setup.put(np.ones(placed[names.INPUTS_EMBEDS].shape, np.float32))}
    engine.enqueue(moved)
    assert context._calls == before + 1
    other, _ = setup.arrays("pre_ecl", {"sequence": 12})
    engine.enqueue(other)  # another profile's context: this one keeps what it was told
    engine.enqueue(moved)
    assert context._calls == before + 1


# ---------------------------------------------------------------- compiled kernels are kept


def test_kernels_compiled_in_the_first_start_are_there_in_the_second(make: Callable[..., Setup], tmp_path: Path) -> None:
    first = make(RTX)
    first.load()
    assert len(first.module.__dict__["_compiled"]) == 9
    (file,) = (tmp_path / "cache" / "entropy-prune").iterdir()
    assert file.name.endswith(f".tensorrt_rtx-{RTX.split()[1]}.sm89.cuda12.6.kernels")
    first.device.close()
    second = Setup(first.bundle, first.gpu, fake.running_library(RTX, first.gpu))
    sys.modules["tensorrt_rtx"] = second.module
    second.load()
    assert second.module.__dict__["_compiled"] == []
    assert sorted(path.name for path in first.bundle.iterdir()) == sorted([*first.manifest.files, names.MANIFEST_FILE, names.REPORT_FILE])


@pytest.mark.parametrize("content", [b"", b"rubbish"])
def test_a_damaged_cache_is_ignored_and_written_anew(
    content: bytes, make: Callable[..., Setup], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    setup = make(RTX)
    setup.load()
    (file,) = (tmp_path / "cache" / "entropy-prune").iterdir()
    good = file.read_bytes()
    setup.device.close()
    file.write_bytes(content)
    setup = Setup(setup.bundle, setup.gpu, setup.module)
    setup.load()
    assert "is damaged or of another driver: kernels are compiled anew" in caplog.text
    assert file.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_told_once_and_engines_run(
    make: Callable[..., Setup], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be", encoding="utf-8")
    setup = make(RTX)
    engines = setup.load()
    placed, _ = setup.arrays("vision", {"images": 1})
    engines["vision"].enqueue(placed)
    setup.device.close()
    assert [r.message.partition(":")[0] for r in caplog.records if r.levelno >= logging.WARNING] == [
        "compiled kernels are not kept for the next start"
    ]


def test_kernels_of_decode_are_specialised_before_they_are_recorded(make: Callable[..., Setup]) -> None:
    setup = make(RTX)
    eager = setup.module.__dict__["DynamicShapesKernelSpecializationStrategy"].EAGER
    lanes = setup.load()["pre_ecl"]._lanes
    assert [lane.context._how.dynamic_shapes_kernel_specialization_strategy for lane in lanes] == [None, None, eager]


# ---------------------------------------------------------------- refusals


def test_sizes_that_no_profile_takes_are_told_with_those_that_fit(make: Callable[..., Setup]) -> None:
    setup = make(OLD)
    engine = setup.load()["pre_ecl"]
    placed, _ = setup.arrays("pre_ecl", {"sequence": 14})
    message = (
        r"no profile of pre_ecl's engine fits sequence 14, capacity 64; they take sequence 1 to 8, capacity 64 \(decode\); "
        r"sequence 1 to 12, capacity 64 \(append\); sequence 16 to 44, capacity 64 \(prefill\): use such sizes, or .*"
        r"--text-tokens, --images, --capacity"
    )
    with pytest.raises(EngineError, match=message):
        engine.enqueue(placed)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (names.PAST_LENGTH, None, "pre_ecl was given no array for past_length"),
        (names.HIDDEN_STATES, None, "pre_ecl was given no array for hidden_states"),
        (names.HIDDEN_STATES, {"shape": (1, 2, 64)},
         r"writes hidden_states in the shape \(1, 1, 64\), the array that was given has \(1, 2, 64\)"),
        (names.HIDDEN_STATES, {"dtype": "float16"}, "takes hidden_states as float32, the array that was given is float16"),
        (names.INPUTS_EMBEDS, {"address": 520}, r"the address of pre_ecl's inputs_embeds \(0x208\) is not a multiple of 256"),
        (names.PAST_LENGTH, {"shape": (2,)}, r"pre_ecl: the shape \(2,\) of past_length was refused .*past_length \(2,\) is not between"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused_and_the_engine_goes_on(
    name: str, change: dict[str, Any] | None, message: str, make: Callable[..., Setup]
) -> None:
    setup = make(OLD)
    engine = setup.load()["pre_ecl"]
    placed, _ = setup.arrays("pre_ecl", {"sequence": 1})
    wrong = dict(placed)
    if change is None:
        del wrong[name]
    else:
        wrong[name] = dataclasses.replace(wrong[name], **change)
    with pytest.raises(EngineError, match=message):
        engine.enqueue(wrong)
    engine.enqueue(placed)
    assert setup.read(placed[names.HIDDEN_STATES]).any()


def test_outputs_of_the_run_before_are_refused_for_other_inputs(make: Callable[..., Setup]) -> None:
    setup = make(OLD)
    engine = setup.load()["pre_ecl"]
    one, _ = setup.arrays("pre_ecl", {"sequence": 1})
    three, _ = setup.arrays("pre_ecl", {"sequence": 3})
    engine.enqueue(one)
    inputs = {tensor.name for tensor in setup.manifest.graphs["pre_ecl"].inputs}
    with pytest.raises(EngineError, match=r"writes hidden_states in the shape \(1, 3, 64\), the array that was given has \(1, 1, 64\)"):
        engine.enqueue({name: (three if name in inputs else one)[name] for name in one})
    engine.enqueue(three)


def test_everything_is_told_anew_after_a_refusal(make: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that was told before the refusal must not stay."""
    setup = make(OLD)
    engine = setup.load()["pre_ecl"]
    one, _ = setup.arrays("pre_ecl", {"sequence": 1})
    three, _ = setup.arrays("pre_ecl", {"sequence": 3})
    engine.enqueue(one)
    with monkeypatch.context() as patch:
        patch.setattr(type(engine._lanes[2].context), "set_tensor_address", lambda *_: False)
        with pytest.raises(EngineError, match="the address of inputs_embeds was refused"):
            engine.enqueue(three)
    engine.enqueue(one)
    setup.device.synchronize()


def test_a_cache_that_must_be_written_in_place_is_checked(make: Callable[..., Setup]) -> None:
    setup = make(RTX, in_place=True)
    engine = setup.load()["pre_ecl"]
    placed, _ = setup.arrays("pre_ecl", {"sequence": 1})
    engine.enqueue(placed)
    other = placed["present.0.key"]
    placed["present.0.key"] = DeviceArray(setup.device.allocate(other.nbytes), other.shape, other.dtype)
    with pytest.raises(EngineError, match=r"pre_ecl writes present\.0\.key in place: give it the address of past_key_values\.0\.key"):
        engine.enqueue(placed)


@pytest.mark.parametrize("how", ["on_host", "for_shapes"])
def test_an_engine_that_wants_a_value_on_the_host_is_refused(how: str, make: Callable[..., Setup]) -> None:
    with pytest.raises(
        EngineError, match=r"the engine of pre_ecl wants past_length in host memory, since a shape depends on its value.*export"
    ):
        make(RTX, **{how: names.PAST_LENGTH, "graph": "pre_ecl"}).load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"no_context": True},
            r"cannot make an execution context of vision \(Error Code 2: OutOfMemory .*\): .* of GPU memory are free; close",
        ),
        ({"refuses_runs": True}, r"vision: the library refused the run .*illegal memory access"),
        ({"activation": [1 << 40] * 3}, r"out of GPU memory: 1099\.5 GB were asked for"),
    ],
)
def test_what_the_library_refuses_is_told_and_leaves_no_memory_taken(
    changes: dict[str, Any], message: str, make: Callable[..., Setup]
) -> None:
    setup = make(RTX, **changes)
    with pytest.raises(EngineError, match=message):
        setup.load()
    setup.device.synchronize()
    assert setup.gpu.memory == {}


def test_engines_for_other_chips_name_both_and_what_to_build(make: Callable[..., Setup]) -> None:
    setup = make(RTX, capabilities=(80, 86))
    message = (
        r"tensorrt_rtx .* cannot load the engine of vision: it was built for SM80, SM86, this GPU is SM89 \(Fake GPU\); build for it, "
        r"python -m runtime\.compile .* --library tensorrt_rtx --capability 89"
    )
    with pytest.raises(EngineError, match=message):
        setup.load()


@pytest.mark.parametrize("key", [OLD, RTX])
def test_an_engine_that_cannot_be_read_is_told_with_the_librarys_reason(key: str, make: Callable[..., Setup]) -> None:
    setup = make(key)
    (setup.bundle / setup.manifest.engines[0].file).write_bytes(b"nothing of the kind")
    with pytest.raises(
        EngineError,
        match=r"cannot load the engine of vision: .*the magic tag does not match.*build it on this machine, python -m runtime\.compile",
    ):
        setup.load()
    (setup.bundle / setup.manifest.engines[0].file).write_bytes(b"")
    with pytest.raises(EngineError, match=r"\.engine is empty: compile the bundle again"):
        setup.load()
    (setup.bundle / setup.manifest.engines[0].file).unlink()
    with pytest.raises(StorageError, match=r"cannot read .*\.engine: No such file"):
        setup.load()


def test_engines_of_another_version_are_told_with_both(make: Callable[..., Setup]) -> None:
    setup = make(OLD)
    setup.module.__dict__["__version__"] = "10.4.0"
    with pytest.raises(
        EngineError,
        match=r"the engine of vision was built by tensorrt 10\.3\.0, here is 10\.4\.0, .*: build them here, python -m runtime\.compile",
    ):
        setup.load()


def test_a_bundle_without_engines_of_the_library_says_what_builds_them(make: Callable[..., Setup]) -> None:
    setup = make(RTX)
    none = dataclasses.replace(setup.manifest, engines=())
    with pytest.raises(
        EngineError, match=r"the bundle holds no engines for tensorrt_rtx: build them, python -m runtime\.compile .* --library tensorrt_rtx"
    ):
        load_engines(setup.bundle, none, "tensorrt_rtx", setup.device)
    some = dataclasses.replace(setup.manifest, engines=setup.manifest.engines[1:])
    with pytest.raises(EngineError, match="the bundle holds no engine of vision for tensorrt_rtx"):
        load_engines(setup.bundle, some, "tensorrt_rtx", setup.device)


@pytest.mark.parametrize("what", ["dtype", "name", "rank", "size", "profiles"])
def test_an_engine_that_differs_from_the_manifest_is_refused(what: str, make: Callable[..., Setup]) -> None:
    setup = make(OLD)
    graph, engines = setup.manifest.graphs["vision"], list(setup.manifest.engines)
    pixels = graph.inputs[0]
    changed = {
        "dtype": dataclasses.replace(pixels, dtype="float16"), "name": dataclasses.replace(pixels, name="pixels"),
        "rank": dataclasses.replace(pixels, shape=pixels.shape[1:]), "size": dataclasses.replace(pixels, shape=("images", 3, 55, 56)),
    }  # fmt: skip
    if what == "profiles":
        engines[0] = dataclasses.replace(engines[0], profiles=(engines[0].profiles[0],) * 2)
    new = dataclasses.replace(graph, inputs=(changed.get(what, pixels),))
    manifest = dataclasses.replace(setup.manifest, graphs={**setup.manifest.graphs, "vision": new}, engines=tuple(engines))
    with pytest.raises(EngineError, match=r"the engine of vision and the manifest differ in .*: compile the bundle again"):
        load_engines(setup.bundle, manifest, "tensorrt", setup.device)


@pytest.mark.parametrize(
    ("owner", "name"),
    [("ICudaEngine", "get_tensor_location"), ("IExecutionContext", "execute_async_v3"), ("IRuntimeCache", "serialize"),
     ("ExecutionContextAllocationStrategy", "USER_MANAGED"), ("Runtime", "deserialize_cuda_engine")],
)  # fmt: skip
def test_a_binding_without_a_name_that_the_runtime_calls_is_noticed(
    owner: str, name: str, make: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make(RTX)
    limited = {cls: [n for n in found if (cls, n) != (owner, name)] for cls, found in recorded()[RTX].items()}
    monkeypatch.setattr(fake, "recorded", lambda: {RTX: limited})
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake.running_library(RTX, setup.gpu))
    with pytest.raises(AttributeError):
        setup.load()


def test_closed_engines_are_refused(make: Callable[..., Setup]) -> None:
    setup = make(OLD)
    engine = setup.load()["vision"]
    placed, _ = setup.arrays("vision", {"images": 1})
    setup.device.close()
    with pytest.raises(EngineError, match="the engine of vision was closed with its device: load the bundle again"):
        engine.enqueue(placed)


# ---------------------------------------------------------------- the real library


def test_the_real_library_without_a_gpu_gives_a_clear_message(make: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch) -> None:
    setup = make(RTX)
    monkeypatch.undo()
    library = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install tensorrt-rtx-cu13")
    setup.gpu.install(monkeypatch)
    infos = tuple(dataclasses.replace(info, library_version=library.__version__) for info in setup.manifest.engines)
    with pytest.raises(
        EngineError, match=r"tensorrt_rtx .* cannot load the engine of vision: .*; build it on this machine, python -m runtime\.compile"
    ):
        load_engines(setup.bundle, dataclasses.replace(setup.manifest, engines=infos), "tensorrt_rtx", setup.device)
