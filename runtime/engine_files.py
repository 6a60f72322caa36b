"""Compiled engines beside the graphs of a bundle: their names, and how they enter the manifest all at once or not at all.

An engine's file name carries a hash, so that no engine ever replaces another in place: the manifest is exchanged in one step, and what it
no longer lists is removed afterwards. A bundle is therefore usable at every moment, also after a kill.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from runtime import names
from runtime.engine_memory import measured_plan
from runtime.engines.tensorrt_builder import BuiltEngine, EngineSpec
from runtime.engines.tensorrt_process import build_in_child
from runtime.engines.tensorrt_profiles import ProfileOptions, profiles_of
from runtime.errors import BundleError, EngineError, StorageError
from runtime.files import write_file
from runtime.manifest import Manifest, check_file, read_manifest

ENGINE_FILE = re.compile(r"[\w.-]+\.(?:tensorrt|tensorrt_rtx)\.(?:[0-9a-f]{12}|new)\.engine")
PARTIAL_FILE = re.compile(rf"\.{ENGINE_FILE.pattern}\.(\d+)\.part")


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """With which library, for which compute capabilities (86 is 8.6; empty: this device) and shapes, and which target's graphs.

    `target` is one of the bundle's; None: the first that the library is for, or the bundle's first.
    """

    library: str
    capabilities: tuple[int, ...] = ()
    profiles: ProfileOptions = field(default_factory=ProfileOptions)
    target: str | None = None


Progress = Callable[[str, "BuiltEngine | None"], None]
Build = Callable[[EngineSpec], BuiltEngine]


def compile_bundle(
    bundle: Path, options: CompileOptions, progress: Progress = lambda *_: None, build: Build = build_in_child
) -> tuple[BuiltEngine, ...]:
    """Builds an engine of every graph of one target and records them; its engines of the same library that were there are replaced.

    Args:
        progress: called with a graph's name and None before its build, and with the engine after it.
        build: builds one engine.

    Returns:
        The engines in the order of the manifest's graphs.

    Raises:
        BundleError: the bundle cannot be used, or changed meanwhile.
        EngineError, UsageError, StorageError: as `build_engine`; the bundle is as it was.
    """
    whole = read_manifest(bundle)
    manifest = chosen_target(whole, options)
    for name in (*(graph.file for graph in manifest.graphs.values()), *manifest.weight_files):
        check_file(bundle, name, manifest.files[name])
    engines: list[BuiltEngine] = []
    with _alone(bundle):
        _clear(bundle, whole)
        try:
            for graph in manifest.graphs:
                progress(graph, None)
                engines.append(_place(bundle, build_graph(bundle, manifest, graph, options, build)))
                progress(graph, engines[-1])
            if read_manifest(bundle) != whole:
                raise BundleError(f"{bundle} was changed by another program while its engines were built: compile it again")
            _record(bundle, whole, manifest, engines, options.library)
        finally:
            with suppress(BundleError, StorageError):
                _clear(bundle, read_manifest(bundle))
    return tuple(engines)


def chosen_target(manifest: Manifest, options: CompileOptions) -> Manifest:
    """The bundle as the target sees it that is to be compiled.

    Raises:
        UsageError: it was not built for the target that is asked for.
    """
    if options.target is not None:
        return manifest.variant(options.target)
    return manifest.for_engine(options.library) or manifest.variant(manifest.target)


@contextmanager
def _alone(bundle: Path) -> Iterator[None]:
    """One compile of a bundle at a time, held by the operating system and so never left behind (not on Windows)."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    try:
        directory = os.open(bundle, os.O_RDONLY)
    except OSError as error:
        raise StorageError(f"cannot read {bundle}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BundleError(f"{bundle} is being compiled by another program: wait for it") from error
        yield
    finally:
        os.close(directory)


def build_graph(
    bundle: Path, manifest: Manifest, graph: str, options: CompileOptions, build: Build = build_in_child, folder: Path | None = None
) -> BuiltEngine:  # fmt: skip
    """Builds the engine of one graph into a folder (None: the bundle's), recording it nowhere.

    Raises:
        EngineError, UsageError, StorageError: as `build_engine`.
    """
    listed, output = manifest.graphs[graph], (folder or bundle) / f"{graph}.{options.library}.new.engine"
    spec = EngineSpec(
        graph=graph, onnx=str(bundle / listed.file), output=str(output), library=options.library,
        capabilities=options.capabilities, profiles=profiles_of(manifest, graph, options.profiles), tf32=not graph.startswith(names.SCORE),
    )  # fmt: skip
    built = build(spec)
    found = {*built.info.inputs, *built.info.outputs}
    missing = sorted({tensor.name for tensor in (*listed.inputs, *listed.outputs)} ^ found)
    if missing:
        raise EngineError(f"the engine of {graph} and the manifest differ in {missing[0]}: export the bundle again")
    return built


def _place(bundle: Path, built: BuiltEngine) -> BuiltEngine:
    """Gives an engine's file its last name."""
    name = f"{built.info.graph}.{built.info.library}.{built.file.sha256[:12]}.engine"
    try:
        os.replace(bundle / built.info.file, bundle / name)
    except OSError as error:
        raise StorageError(f"cannot write {bundle / name}: {error.strerror}; choose a bundle in a writable directory") from error
    return BuiltEngine(dataclasses.replace(built.info, file=name), built.file)


def _record(bundle: Path, whole: Manifest, manifest: Manifest, engines: Sequence[BuiltEngine], library: str) -> None:
    """Exchanges the manifest for one that lists these engines in place of the library's earlier ones of this target."""
    kept = tuple(engine for engine in manifest.engines if engine.library != library)
    files = {**manifest.files, **{engine.info.file: engine.file for engine in engines}}
    memory = manifest.memory
    if memory is not None and manifest.engine == library:
        memory = measured_plan(memory, engines)
    changed = dataclasses.replace(manifest, files=files, memory=memory, engines=(*kept, *(engine.info for engine in engines)))
    new = whole.with_variant(changed)
    listed = {engine.file for target in new.targets for engine in new.variant(target).engines}
    gone = {engine.file for target in whole.targets for engine in whole.variant(target).engines} - listed
    new = dataclasses.replace(new, files={name: info for name, info in new.files.items() if name not in gone})
    write_file(bundle / names.MANIFEST_FILE, new.to_json().encode())


def _clear(bundle: Path, manifest: Manifest) -> None:
    """Removes engine files that the manifest does not list, and what killed builds left."""
    for path in bundle.iterdir():
        partial = PARTIAL_FILE.fullmatch(path.name)
        if (ENGINE_FILE.fullmatch(path.name) and path.name not in manifest.files) or (partial and not _runs(int(partial[1]))):
            with suppress(OSError):
                path.unlink()


def _runs(process: int) -> bool:
    """Whether there is such a process; True where that cannot be asked without harm."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True
