"""One graph's compiled engine on a CUDA device, with `tensorrt` (10.3, 10.16, 11) or `tensorrt_rtx`.

Each optimisation profile has an execution context of its own: switching between them costs nothing, and what was recorded with one stays
valid. A run tells its context only what changed since the last one. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from runtime.device.base import DeviceArray, DeviceEngine
from runtime.device.cuda import CudaDevice
from runtime.device.tensorrt_sizes import Sizes
from runtime.engine_info import EngineInfo
from runtime.engines.tensorrt_log import BuildLog
from runtime.errors import EngineError
from runtime.manifest import GraphInfo, TensorInfo

ALIGNMENT: Final = 256  # of every address, says the library's documentation
DTYPES: Final = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}


class TensorRTEngine(DeviceEngine):
    """One graph's engine with a context for each of its profiles. Made by `tensorrt.load_engines`; closed with its device.

    Attributes:
        uncapturable: None: its runs can be recorded.
        needed_bytes: activation memory of its neediest profile.
    """

    uncapturable: str | None = None

    def __init__(self, info: EngineInfo, graph: GraphInfo, library: Any, engine: Any, device: CudaDevice, log: BuildLog) -> None:
        self.name = info.graph
        self._graph, self._library, self._engine, self._device, self._log = graph, library, engine, device, log
        check_tensors(info, graph, library, engine)
        self._sizes = Sizes(graph.inputs, info)
        self.capacity, self.max_rows, self.row_ranges = self._sizes.capacity, self._sizes.max_rows, self._sizes.row_ranges
        profiles = range(max(1, engine.num_optimization_profiles))
        self.needed_bytes = max(int(engine.get_device_memory_size_for_profile_v2(i)) for i in profiles)
        self._aliases = _aliases(graph, engine)
        self._lanes: list[_Lane] = []

    def make_contexts(self, contexts: Sequence[Any], memory: int, nbytes: int) -> None:
        """Takes one execution context for each profile, in the engine's order, and gives them the activation memory.

        Raises:
            EngineError: a profile cannot be chosen.
        """
        for index, context in enumerate(contexts):
            context.set_device_memory(memory, nbytes)
            if not context.set_optimization_profile_async(index, self._device.stream):
                raise self._failed(f"the profile {index} cannot be chosen")
            self._lanes.append(_Lane(context))

    def warm_up(self) -> None:
        """Enqueues one run of each profile with its smallest shapes, on zeros; waits for it."""
        for lane, sizes in zip(self._lanes, self._sizes.smallest(), strict=True):
            inputs = {tensor.name: _sized(tensor, sizes) for tensor in self._graph.inputs}
            for name, array in inputs.items():
                lane.tell_shape(self, name, array)
            shapes = {tensor.name: tuple(lane.context.get_tensor_shape(tensor.name)) for tensor in self._graph.outputs}
            outputs = {tensor.name: DeviceArray(0, shapes[tensor.name], tensor.dtype) for tensor in self._graph.outputs}
            self._run_on_scratch(lane, inputs, outputs)

    def enqueue(self, arrays: Mapping[str, DeviceArray]) -> None:
        try:
            index = self._sizes.choose(self.name, arrays)
            if not self._lanes:
                raise EngineError(f"the engine of {self.name} was closed with its device: load the bundle again")
            with self._device.current():
                self._enqueue(self._lanes[index], arrays)
        except KeyError as error:
            raise EngineError(f"{self.name} was given no array for {error.args[0]}") from error

    def close(self) -> None:
        """Destroys the contexts and the engine."""
        self._lanes.clear()
        self._engine = None

    def _enqueue(self, lane: _Lane, arrays: Mapping[str, DeviceArray]) -> None:
        try:
            self._bind(lane, arrays)
            if not lane.context.execute_async_v3(self._device.stream):
                raise self._failed("the library refused the run")
        except BaseException:
            lane.bound.clear()  # what was told of it is not known
            raise

    def _bind(self, lane: _Lane, arrays: Mapping[str, DeviceArray]) -> None:
        """Tells the context what changed since its last run, and checks the sizes of what is written."""
        bound, reshaped = lane.bound, False
        for tensor in self._graph.inputs:
            array, before = arrays[tensor.name], bound.get(tensor.name)
            if array is before or array == before:
                continue
            self._check(tensor, array)
            if before is None or array.shape != before.shape:
                lane.tell_shape(self, tensor.name, array)
                reshaped = True
            lane.tell_address(self, tensor.name, array)
        for tensor in self._graph.outputs:
            array, before = arrays[tensor.name], bound.get(tensor.name)
            if array is before or array == before:
                if not reshaped:
                    continue
            else:
                self._check(tensor, array)
                lane.tell_address(self, tensor.name, array)
            shape = tuple(lane.context.get_tensor_shape(tensor.name))
            if shape != array.shape:
                raise EngineError(f"{self.name} writes {tensor.name} in the shape {shape}, the array that was given has {array.shape}")
        for output, past in self._aliases:
            if arrays[output].address != arrays[past].address:
                raise EngineError(f"{self.name} writes {output} in place: give it the address of {past}")

    def _check(self, tensor: TensorInfo, array: DeviceArray) -> None:
        if array.dtype != tensor.dtype:
            raise EngineError(f"{self.name} takes {tensor.name} as {tensor.dtype}, the array that was given is {array.dtype}")
        if array.address % ALIGNMENT:
            raise EngineError(
                f"the address of {self.name}'s {tensor.name} ({array.address:#x}) is not a multiple of {ALIGNMENT}, as TensorRT demands: "
                "copy the rows to the start of an allocation"
            )

    def _run_on_scratch(self, lane: _Lane, inputs: dict[str, DeviceArray], outputs: dict[str, DeviceArray]) -> None:
        """One run that reads zeros, and writes (caches in place, all over each other) into memory that is given back."""
        written = {past for _, past in self._aliases} | {tensor.name for tensor in self._graph.inputs if len(tensor.shape) == 4}
        zeros = self._device.allocate(max(array.nbytes for array in inputs.values()))
        scratch = self._device.allocate(max(array.nbytes for array in (*inputs.values(), *outputs.values())))
        try:
            placed = {
                name: DeviceArray(scratch if name in outputs or name in written else zeros, array.shape, array.dtype)
                for name, array in (*inputs.items(), *outputs.items())
            }
            self._enqueue(lane, placed)
            self._device.synchronize()
        finally:
            lane.bound.clear()
            self._device.free(zeros)
            self._device.free(scratch)

    def _failed(self, what: str) -> EngineError:
        name, version = self._library.__name__, self._library.__version__
        error = EngineError(f"{self.name}: {what} ({name} {version}): {self._log.failure}")
        self._log.forget_errors()
        return error


class _Lane:
    """One profile's context, and what it was last told."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.bound: dict[str, DeviceArray] = {}

    def tell_shape(self, engine: TensorRTEngine, name: str, array: DeviceArray) -> None:
        if not self.context.set_input_shape(name, array.shape):
            raise engine._failed(f"the shape {array.shape} of {name} was refused")

    def tell_address(self, engine: TensorRTEngine, name: str, array: DeviceArray) -> None:
        if not self.context.set_tensor_address(name, array.address):
            raise engine._failed(f"the address of {name} was refused")
        self.bound[name] = array


def check_tensors(info: EngineInfo, graph: GraphInfo, library: Any, engine: Any) -> None:
    """Compares an engine's tensors, and the number of its profiles, with the manifest's.

    Raises:
        EngineError: they differ, or the engine wants a tensor in host memory.
    """
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        mode, dtype = engine.get_tensor_mode(name), engine.get_tensor_dtype(name)
        found[name] = (mode == library.TensorIOMode.INPUT, _dtype(library, dtype), _fixed(engine.get_tensor_shape(name)))
        if engine.get_tensor_location(name) != library.TensorLocation.DEVICE or engine.is_shape_inference_io(name):
            raise EngineError(
                f"the engine of {info.graph} wants {name} in host memory, since a shape depends on its value; this runtime gives "
                "every tensor in device memory: export the bundle again, with this version, and compile it"
            )
    listed = {
        tensor.name: (is_input, tensor.dtype, _fixed(tensor.shape))
        for is_input, tensors in ((True, graph.inputs), (False, graph.outputs))
        for tensor in tensors
    }
    wrong = sorted(name for name in found.keys() | listed.keys() if not _fits(found.get(name), listed.get(name)))
    if wrong or (info.profiles and engine.num_optimization_profiles != len(info.profiles)):
        what = f"{wrong[0]!r}" if wrong else f"the number of profiles ({engine.num_optimization_profiles}, not {len(info.profiles)})"
        raise EngineError(
            f"the engine of {info.graph} and the manifest differ in {what}: compile the bundle again, python -m runtime.compile"
        )


_Described = tuple[bool, str, tuple[int, ...]]


def _fits(found: _Described | None, listed: _Described | None) -> bool:
    """Whether mode, type, rank, and the sizes that both fix are the same."""
    if found is None or listed is None or found[:2] != listed[:2] or len(found[2]) != len(listed[2]):
        return False
    return all(-1 in (a, b) or a == b for a, b in zip(found[2], listed[2], strict=True))


def _fixed(shape: Sequence[int | str]) -> tuple[int, ...]:
    """Sizes, -1 where any is possible."""
    return tuple(size if isinstance(size, int) else -1 for size in tuple(shape))


def _dtype(library: Any, dtype: Any) -> str:
    """The manifest's name of the library's type."""
    known = {ours: getattr(library.DataType, theirs) for theirs, ours in DTYPES.items() if hasattr(library.DataType, theirs)}
    return next((name for name, value in known.items() if value == dtype), str(dtype))


def _aliases(graph: GraphInfo, engine: Any) -> tuple[tuple[str, str], ...]:
    """Outputs that must be the same memory as an input, each with it."""
    if not hasattr(engine, "get_aliased_input_tensor"):
        return ()
    pairs = ((tensor.name, engine.get_aliased_input_tensor(tensor.name)) for tensor in graph.outputs)
    return tuple((output, past) for output, past in pairs if past)


def _sized(tensor: TensorInfo, sizes: Mapping[str, int]) -> DeviceArray:
    return DeviceArray(0, tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape), tensor.dtype)
