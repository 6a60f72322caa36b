"""ONNX Runtime on the CPU: the engine that anyone can run.

All sessions of a process share one global thread pool (a pool per session runs three sessions at a third of the speed), and a
cache buffer is bound as input and output of the same run, so that ScatterND writes in place.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from runtime.engines.telemetry import without_telemetry
from runtime.errors import EngineError
from runtime.kv_cache import KVGroup
from runtime.manifest import GraphInfo, TensorInfo
from runtime.names import PAST, PRESENT

with without_telemetry():
    import onnxruntime as ort

_log = logging.getLogger(__name__)
_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16", "tensor(int64)": "int64",
    "tensor(int32)": "int32", "tensor(bool)": "bool",
}  # fmt: skip


class ThreadPool:
    """The process's one pool of engine threads; the first `use` decides its size.

    Once it runs, ONNX Runtime refuses sessions that ask for threads of their own, from anyone in the process: make others with
    `session_options`, or load bundles with `shared_threads=False`.
    """

    size: int | None = None

    @classmethod
    def use(cls, threads: int | None) -> None:
        """Starts the pool with `threads` threads (None: one per available core); later calls cannot change it."""
        wanted = threads or _available_cores()
        if cls.size is None:
            ort.set_global_thread_pool_sizes(wanted, 1)
            cls.size = wanted
        elif threads is not None and threads != cls.size:
            _log.warning("the engine threads of this process were started as %d and cannot become %d", cls.size, threads)


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """Options for a CPU session: on the shared pool where it runs, otherwise with `threads` threads of its own that never wait busily."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if ThreadPool.size is not None:
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = threads or _available_cores()
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class OnnxRuntimeEngine:
    """A graph as an ONNX Runtime session."""

    def __init__(self, path: Path, graph: GraphInfo, threads: int | None = None) -> None:
        try:
            self._session = ort.InferenceSession(str(path), session_options(threads), providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's exceptions share no base class of their own
            raise EngineError(
                f"ONNX Runtime {ort.__version__} cannot load {path.name}: {first_line(error)}; export the bundle again"
            ) from error
        self.name = path.stem
        check_session(self._session, self.name, graph)
        self._cache_names = [i.name for i in graph.inputs if i.name.startswith(PAST)]
        lengths = {tensor.name: tensor.shape[2] for tensor in (*graph.inputs, *graph.outputs) if tensor.name.startswith((PAST, PRESENT))}
        self._appends = any(lengths[name] != lengths.get(_present(name)) for name in self._cache_names)
        self._bindings: WeakKeyDictionary[KVGroup, tuple[int, dict[tuple[str, ...], ort.IOBinding]]] = WeakKeyDictionary()

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str], cache: KVGroup | None = None) -> list[np.ndarray]:
        binding = self._binding(cache, tuple(outputs)) if cache is not None else self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        new_rows = [_present(name) for name in self._cache_names] if cache is not None and self._appends else []
        for name in (*new_rows, *outputs):
            binding.bind_output(name)  # anew each time: the shape may differ
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # as above
            raise EngineError(f"ONNX Runtime could not run {self.name}: {first_line(error)}") from error
        values = [value.numpy() for value in binding.get_outputs()[-len(new_rows) - len(outputs) :]]
        if cache is not None and new_rows:
            for name, rows in zip(self._cache_names, values, strict=False):
                cache.buffers[name][:, :, cache.length : cache.length + rows.shape[2]] = rows
        return values[len(new_rows) :]

    def _binding(self, cache: KVGroup, outputs: tuple[str, ...]) -> ort.IOBinding:
        """The cache's buffers bound as inputs and as outputs; kept for each set of outputs until the cache grows."""
        generation, bindings = self._bindings.get(cache, (-1, {}))
        if generation != cache.generation:
            bindings = {}
            self._bindings[cache] = (cache.generation, bindings)
        if outputs not in bindings:
            bindings[outputs] = self._session.io_binding()
            for name in self._cache_names:
                value = ort.OrtValue.ortvalue_from_numpy(cache.buffers[name])  # wraps the buffer, does not copy it
                bindings[outputs].bind_ortvalue_input(name, value)
                if not self._appends:
                    bindings[outputs].bind_ortvalue_output(_present(name), value)
        return bindings[outputs]


def version() -> str:
    """The library's."""
    return str(ort.__version__)


def check_session(session: ort.InferenceSession, name: str, graph: GraphInfo) -> None:
    """Raises EngineError unless a session's inputs and outputs are those of the manifest."""
    for kind, listed, actual in (("input", graph.inputs, session.get_inputs()), ("output", graph.outputs, session.get_outputs())):
        if len(listed) != len(actual) or not all(map(_fits, listed, actual)):
            raise EngineError(f"{name}: its {kind}s are not those of the manifest; export the bundle again")


def _present(past: str) -> str:
    return PRESENT + past.removeprefix(PAST)


def _fits(listed: TensorInfo, actual: ort.NodeArg) -> bool:
    """Whether name, type, rank, and sizes known to both are the same."""
    if (listed.name, listed.dtype, len(listed.shape)) != (actual.name, _DTYPES.get(actual.type), len(actual.shape)):
        return False
    return all(a == b for a, b in zip(listed.shape, actual.shape, strict=True) if isinstance(a, int) and isinstance(b, int))


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_line(error: Exception) -> str:
    """The first line of a library's message, or the error's type where there is none."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
