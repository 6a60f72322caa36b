"""Builds one engine from one ONNX file, in this process, with `tensorrt` or `tensorrt_rtx`.

Networks are strongly typed: precision lives in the graph. Everything that differs between TensorRT 10.3, 10.16, 11 and TensorRT for RTX is
probed with `hasattr`. A builder that runs out of memory ends its process: `tensorrt_process` runs this module in a child. Knows nothing
about bundles.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from runtime.engine_info import EngineInfo, Profile
from runtime.engines.tensorrt_library import load_library, make_logger, set_capabilities
from runtime.engines.tensorrt_log import BuildLog
from runtime.errors import EngineError, StorageError
from runtime.machine import peak_memory
from runtime.manifest import FileInfo


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What to build.

    Args:
        graph: its name, for messages and for `EngineInfo`.
        onnx: the ONNX file, its external weights beside it.
        output: the engine's file; written under a temporary name beside it and moved into place.
        library: "tensorrt" or "tensorrt_rtx".
        capabilities: compute capabilities (86 is 8.6), for a library that builds for several; empty otherwise.
        profiles: shapes for every input with a dynamic size; none where all are fixed.
        tf32: whether fp32 products may be rounded to TF32 (off for `score`: it moves entropies by up to 1e-2).
    """

    graph: str
    onnx: str
    output: str
    library: str
    capabilities: tuple[int, ...] = ()
    profiles: tuple[Profile, ...] = ()
    tf32: bool = True


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A finished engine: what the manifest says of it, and of its file."""

    info: EngineInfo
    file: FileInfo


def build_engine(spec: EngineSpec, log: BuildLog | None = None) -> BuiltEngine:
    """Builds and writes one engine. Takes minutes and a few times the weights' bytes of memory for a large graph.

    Args:
        log: receives what the library logs.

    Raises:
        UsageError: the library or a capability is unknown.
        EngineError: the library is missing, or refused the graph; the message names the graph and, where known, the node.
        StorageError: the engine cannot be written.
    """
    began = time.perf_counter()
    library = load_library(spec.library)
    log = log or BuildLog()
    with _Output(Path(spec.output)) as output:
        names = _build(library, spec, log, output)
    memory = peak_memory()
    info = EngineInfo(
        graph=spec.graph, file=Path(spec.output).name, library=spec.library, library_version=library.__version__,
        capabilities=spec.capabilities, profiles=spec.profiles, inputs=names[0], outputs=names[1], weights_bytes=log.weights_bytes,
        activation_bytes=tuple(log.activation_bytes), attention_kernels=log.attention_kernels,
        build_seconds=round(time.perf_counter() - began, 2), peak_rss_bytes=None if memory is None else memory.bytes,
    )  # fmt: skip
    return BuiltEngine(info, output.info)


def _build(library: Any, spec: EngineSpec, log: BuildLog, output: _Output) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Parses and builds; returns the names of inputs and outputs."""
    logger = make_logger(library, log)
    try:
        builder = library.Builder(logger)
    except TypeError as error:  # what the bindings make of a null pointer
        raise EngineError(f"{spec.library} cannot start on this machine: {log.failure}; TensorRT needs a GPU and its driver") from error
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, logger)  # it holds the weights until the engine is built
    if not parser.parse_from_file(spec.onnx):
        raise EngineError(_refusal(spec, parser, log))
    names = _names(network.num_inputs, network.get_input), _names(network.num_outputs, network.get_output)
    if not names[1]:
        raise EngineError(f"{spec.graph}: {Path(spec.onnx).name} holds no graph that {spec.library} can read; export the bundle again")
    config = builder.create_builder_config()
    set_capabilities(library, config, spec.capabilities)
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    if not spec.tf32:
        config.clear_flag(library.BuilderFlag.TF32)
    _add_profiles(builder, config, network, spec)
    if not _serialize(library, builder, network, config, output):
        if output.error is not None:
            raise output.error
        raise EngineError(
            f"{spec.library} {library.__version__} could not build an engine of {spec.graph}: {log.failure}; "
            "export the bundle for this engine's target, or report the graph with this message"
        )
    return names


def _serialize(library: Any, builder: Any, network: Any, config: Any, output: _Output) -> bool:
    """Builds into `output`, piece by piece where the library can (it saves a copy of the engine in memory)."""
    if hasattr(builder, "build_serialized_network_to_stream"):
        return bool(builder.build_serialized_network_to_stream(network, config, _stream(library, output)))
    serialized = builder.build_serialized_network(network, config)
    return serialized is not None and output.write(memoryview(serialized)) == serialized.nbytes


def _add_profiles(builder: Any, config: Any, network: Any, spec: EngineSpec) -> None:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    dynamic = {tensor.name: tuple(tensor.shape) for tensor in inputs if -1 in tuple(tensor.shape)}
    if dynamic and not spec.profiles:
        raise EngineError(f"{spec.graph} has inputs of dynamic size ({', '.join(dynamic)}) and no profile: give one with their shapes")
    for wanted in spec.profiles if dynamic else ():
        profile = builder.create_optimization_profile()
        for name, shape in dynamic.items():
            given = wanted.shapes.get(name)
            if (
                given is None
                or any(a not in (-1, b) for a, b in zip(shape, given.optimum, strict=False))
                or len(given.optimum) != len(shape)
            ):
                raise EngineError(
                    f"{spec.graph}: the profile {wanted.name} gives {name} {'no shape' if given is None else given.optimum}, "
                    f"the graph has {shape} (-1: any): give a shape that fits"
                )
            profile.set_shape(name, given.minimum, given.optimum, given.maximum)
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"{spec.library} refused the profile {wanted.name} of {spec.graph}: its shapes contradict each other")


def _names(count: int, get: Any) -> tuple[str, ...]:
    return tuple(get(i).name for i in range(count))


def _refusal(spec: EngineSpec, parser: Any, log: BuildLog) -> str:
    """Why the parser refused: graph, node, operator, reason, and what to do."""
    if not parser.num_errors:
        return f"{spec.library} cannot read {spec.graph}: {log.failure}; export the bundle again"
    error = parser.get_error(0)
    reason = " ".join(str(error.desc()).removeprefix("Assertion failed: ").split())
    if not error.node_operator():
        return f"{spec.library} cannot read {spec.graph}: {reason[:300]}; export the bundle again"
    return (
        f"{spec.library} cannot build {spec.graph}: the operator {error.node_operator()} of node {error.node()} "
        f"({error.node_name() or 'without a name'}) is not supported: {reason[:300]}; export the bundle for this engine's target"
    )


# ---------------------------------------------------------------- what the library calls


def _stream(library: Any, output: _Output) -> Any:
    """The library's output stream into `output`."""

    class Stream(library.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IStreamWriter.__init__(self)

        def write(self, data: Any) -> int:
            return output.write(data)

    return Stream()


class _Output:
    """A file written under a temporary name, hashed on the way, and moved into place when its block ends well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: StorageError | None = None
        self._partial = path.with_name(partial_name(path.name, os.getpid()))
        self._hash, self._bytes = hashlib.sha256(), 0

    def __enter__(self) -> _Output:
        try:
            self._file: BinaryIO = self._partial.open("wb")
        except OSError as error:
            raise self._failed(error) from error
        return self

    def write(self, data: Sequence[int] | memoryview) -> int:
        """Appends bytes; after a failure, which `error` holds, it takes none (the library then ends the build)."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        if self.error is not None:
            return 0
        try:
            self._file.write(view)
        except OSError as error:
            self.error = self._failed(error)
            return 0
        self._hash.update(view)
        self._bytes += len(view)
        return len(view)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._file.close()
            if kind is None:
                os.replace(self._partial, self.path)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            with suppress(OSError):  # gone where it was moved
                self._partial.unlink()

    @property
    def info(self) -> FileInfo:
        return FileInfo(self._bytes, self._hash.hexdigest())

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(f"cannot write {self.path}: {error.strerror or error}; free some space, or choose a writable directory")


def partial_name(name: str, process: int) -> str:
    """The temporary name of a file that a process writes."""
    return f".{name}.{process}.part"
