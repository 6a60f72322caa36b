"""A device whose memory is the host's, strict about everything that a GPU would let pass, and engines that run on it.

Nothing that is enqueued happens before `synchronize`: a result that is read too early is not there, a page-locked buffer that is filled
anew too early is noticed, and so are addresses that were never allocated, or freed, and writes beyond an allocation.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime.device.base import Device, DeviceArray, DeviceEngine
from runtime.device.executor import DeviceExecutor, DeviceOptions
from runtime.device.memory import ALIGNMENT
from runtime.device.onnxruntime import CPU, OnnxRuntimeDeviceEngine
from runtime.errors import EngineError
from runtime.host_executor import HostExecutor
from runtime.manifest import Manifest, read_manifest
from runtime.pipeline import VisionLanguageModel

GUARD, JUNK = 0xA5, 0xFF  # bytes around an allocation; bytes that are NaN in every float type


@dataclass(slots=True, eq=False)
class _Allocation:
    memory: np.ndarray
    address: int
    nbytes: int
    freed: bool = False

    @property
    def bytes(self) -> np.ndarray:
        start = self.address - self.memory.ctypes.data
        return self.memory[start : start + self.nbytes]

    def check_guards(self) -> None:
        start = self.address - self.memory.ctypes.data
        outside = np.concatenate([self.memory[:start], self.memory[start + self.nbytes :]])
        assert (outside == GUARD).all(), f"something wrote beyond the {self.nbytes} bytes at {self.address:#x}"


@dataclass(eq=False)
class HostDevice:
    """See `runtime.device.base.Device`; `counts` and `downloads` (bytes each) say what was asked of it.

    `limit_bytes`: all that may be allocated at a time. `refuses_capture`: the message of the error that `capture` raises.
    """

    limit_bytes: int = 1 << 40
    refuses_capture: str = ""
    stream: int = 7
    counts: Counter[str] = field(default_factory=Counter)
    downloads: list[int] = field(default_factory=list)
    uploads: list[int] = field(default_factory=list)
    closed: bool = False
    _allocations: dict[int, _Allocation] = field(default_factory=dict)
    _queue: list[Callable[[], None]] = field(default_factory=list)
    _recording: list[Callable[[], Callable[[], None]]] | None = None

    @property
    def allocated(self) -> int:
        """Allocations that are not freed."""
        return sum(not one.freed for one in self._allocations.values())

    @property
    def allocated_bytes(self) -> int:
        return sum(one.nbytes for one in self._allocations.values() if not one.freed)

    # ------------------------------------------------------------ the contract

    def allocate(self, nbytes: int) -> int:
        assert self._recording is None, "a capture cannot allocate"
        self._check_open()
        assert nbytes > 0
        if self.allocated_bytes + nbytes > self.limit_bytes:
            raise EngineError(f"out of memory: {nbytes} bytes were asked for")
        memory = np.full(nbytes + 3 * ALIGNMENT, GUARD, np.uint8)
        address = -(-(memory.ctypes.data + 1) // ALIGNMENT) * ALIGNMENT
        allocation = _Allocation(memory, address, nbytes)
        allocation.bytes[:] = 0
        self._allocations[address] = allocation
        self.counts["allocate"] += 1
        return address

    def free(self, address: int) -> None:
        assert self._recording is None, "a capture cannot free"
        self._check_open()
        allocation = self._allocations.get(address)
        assert allocation is not None, f"{address:#x} was never allocated"
        assert not allocation.freed, f"{address:#x} is freed twice"
        allocation.freed = True

        def forget() -> None:
            allocation.check_guards()
            allocation.bytes[:] = JUNK
            allocation.memory[:] = JUNK

        self._queue.append(forget)

    def host_buffer(self, nbytes: int) -> np.ndarray:
        self._check_open()
        return np.zeros(nbytes, np.uint8)

    def upload(self, address: int, source: np.ndarray) -> None:
        assert source.flags.c_contiguous
        self.enqueue("upload", lambda: self._upload(address, source))

    def download(self, target: np.ndarray, address: int) -> None:
        assert target.flags.c_contiguous
        assert target.flags.writeable
        self.enqueue("download", lambda: self._download(target, address))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        def start() -> Callable[[], None]:
            into, out_of = self.bytes_at(target, nbytes), self.bytes_at(source, nbytes)
            return lambda: np.copyto(into, out_of.copy())

        self.enqueue("copy", start)

    def scatter_rows(self, cache: DeviceArray, rows: DeviceArray, past_length: DeviceArray) -> None:
        def start() -> Callable[[], None]:
            into, new, at = self.view(cache), self.view(rows), self.view(past_length)

            def run() -> None:
                slot = int(at.view(np.int64)[0])
                into[:, :, slot : slot + new.shape[2]] = new

            return run

        self.enqueue("scatter_rows", start)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.refuses_capture:
            raise EngineError(self.refuses_capture)
        assert self._recording is None
        self._recording = []
        try:
            work()
            recorded = self._recording
        finally:
            self._recording = None
        self.counts["capture"] += 1

        def replay() -> None:
            self.counts["replay"] += 1
            self._queue.extend(start() for start in recorded)

        return replay

    def synchronize(self) -> None:
        self._check_open()
        assert self._recording is None, "a capture cannot wait"
        self.counts["synchronize"] += 1
        while self._queue:
            self._queue.pop(0)()
        for allocation in self._allocations.values():
            if not allocation.freed:
                allocation.check_guards()

    def memory(self) -> tuple[int, int]:
        return self.limit_bytes - self.allocated_bytes, self.limit_bytes

    def close(self) -> None:
        self._check_open()
        self.closed = True

    # ------------------------------------------------------------ for engines

    def enqueue(self, kind: str, start: Callable[[], Callable[[], None]]) -> None:
        """`start` checks what it is given when it is enqueued (or replayed), and returns what happens at `synchronize`."""
        self._check_open()

        def begin() -> Callable[[], None]:
            self.counts[kind] += 1
            return start()

        if self._recording is not None:
            self._recording.append(begin)
        else:
            self._queue.append(begin())

    def bytes_at(self, address: int, nbytes: int) -> np.ndarray:
        """The bytes of a range, which must lie in one allocation that is not freed."""
        self._check_open()
        for allocation in self._allocations.values():
            offset = address - allocation.address
            if 0 <= offset < allocation.nbytes:
                assert not allocation.freed, f"{address:#x} was freed"
                assert offset + nbytes <= allocation.nbytes, f"{nbytes} bytes at {address:#x} go beyond its allocation"
                return allocation.bytes[offset : offset + nbytes]
        raise AssertionError(f"{address:#x} was never allocated")

    def view(self, array: DeviceArray) -> np.ndarray:
        dtype = {"bfloat16": "uint16"}.get(array.dtype, array.dtype)
        return self.bytes_at(array.address, array.nbytes).view(dtype).reshape(array.shape)

    def _upload(self, address: int, source: np.ndarray) -> Callable[[], None]:
        into, given = self.bytes_at(address, source.nbytes), source.copy()
        self.uploads.append(source.nbytes)

        def run() -> None:
            assert np.array_equal(source.view(np.uint8), given.view(np.uint8)), "what is uploaded was changed before it was"
            into[:] = given.reshape(-1).view(np.uint8)

        return run

    def _download(self, target: np.ndarray, address: int) -> Callable[[], None]:
        out_of = self.bytes_at(address, target.nbytes)
        self.downloads.append(target.nbytes)
        target.reshape(-1).view(np.uint8)[:] = JUNK  # whoever reads it now reads this

        def run() -> None:
            target.reshape(-1).view(np.uint8)[:] = out_of

        return run

    def _check_open(self) -> None:
        assert not self.closed, "the device was closed"


@dataclass(eq=False)
class QueuedEngine:
    """An engine of ONNX Runtime on a `HostDevice`: runs when the device does.

    Attributes:
        capacity, max_rows: as an engine of fixed shapes has them; what goes beyond is an error.
        shapes: the first input's shape in every run that was enqueued.
    """

    name: str
    engine: OnnxRuntimeDeviceEngine
    device: HostDevice
    capacity: int | None = None
    max_rows: int | None = None
    row_ranges: tuple[tuple[int, int], ...] = ()
    uncapturable: str | None = None
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    last: Mapping[str, DeviceArray] = field(default_factory=dict)

    def enqueue(self, arrays: Mapping[str, DeviceArray]) -> None:
        names = {*self.engine._inputs, *(output.name for output in self.engine._session.get_outputs())}
        assert arrays.keys() == names, f"{self.name}: {arrays.keys() ^ names} is missing or too much"
        first = next(iter(arrays.values())).shape
        self.shapes.append(first)
        self.last = arrays
        for name, array in arrays.items():
            assert array.address % ALIGNMENT == 0, f"{self.name}: {name} lies at an odd address"
            assert self.capacity is None or ".key" not in name or array.shape[2] in (self.capacity, first[1])
        rows = first[0] if self.name.startswith("score") else first[1]
        ranges = self.row_ranges if self.name in ("pre_ecl", "post_ecl") else ()
        assert not ranges or any(low <= rows <= high for low, high in ranges), f"{rows} rows are in none of {ranges}"
        assert self.max_rows is None or self.name == "vision" or rows <= self.max_rows

        def start() -> Callable[[], None]:
            for array in arrays.values():
                self.device.bytes_at(array.address, array.nbytes)
            return lambda: self.engine.enqueue(arrays)

        self.device.enqueue(f"run {self.name}", start)


def host_engines(bundle: Path, manifest: Manifest, device: HostDevice, **options: Any) -> dict[str, DeviceEngine]:
    """An engine of every graph; `options` are attributes of `QueuedEngine`, those of halves and scores alike."""
    engines: dict[str, DeviceEngine] = {}
    for name, graph in manifest.graphs.items():
        engine = OnnxRuntimeDeviceEngine(name, bundle / graph.file, graph, device, device_type=CPU)
        engines[name] = QueuedEngine(name, engine, device, **options)
    return engines


def on_host_device(bundle: Path, device: HostDevice, *, capture: bool = True, **options: Any) -> VisionLanguageModel:
    """A bundle in the memory of a `HostDevice`."""
    manifest = read_manifest(bundle)
    as_device: Device = device  # mypy compares it with the contract here
    engines = host_engines(bundle, manifest, device, **options)
    executor = DeviceExecutor(bundle, manifest, as_device, engines, "a device of the tests", DeviceOptions(capture))
    return VisionLanguageModel(bundle, manifest, backend="cuda", executor=executor)


def queued(model: VisionLanguageModel, graph: str) -> QueuedEngine:
    engine = device_executor(model).engines[graph]
    assert isinstance(engine, QueuedEngine)
    return engine


def device_executor(model: VisionLanguageModel) -> DeviceExecutor:
    assert isinstance(model.chain.executor, DeviceExecutor)
    return model.chain.executor


def host(model: VisionLanguageModel) -> HostExecutor:
    """A model's executor where it runs on the CPU."""
    assert isinstance(model.chain.executor, HostExecutor)
    return model.chain.executor


@contextlib.contextmanager
def no_more_allocations(device: HostDevice) -> Any:
    """Fails where the block leaves more allocations than there were."""
    before = device.allocated
    yield
    assert device.allocated <= before
