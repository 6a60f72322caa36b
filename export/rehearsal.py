"""A rehearsal of engines that are built elsewhere: TensorRT for RTX builds a Jetson's graphs here, and the engines are thrown away.

It is another library than the device's, for another chip (SM86; a Jetson Orin is SM87, which it does not know), with the same compiler
inside: what it builds, the device most likely builds too. It needs no GPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from runtime.compile import describe
from runtime.engine_files import Build, CompileOptions, build_graph
from runtime.engines.tensorrt_builder import BuiltEngine
from runtime.engines.tensorrt_process import available_memory, build_in_child
from runtime.errors import EngineError
from runtime.manifest import Manifest
from runtime.units import format_bytes

LIBRARY, CAPABILITY = "tensorrt_rtx", 86
Report = dict[str, Any]


def obstacle_here(bundle: Path, manifest: Manifest) -> str | None:
    """Why this machine cannot rehearse; None where it can."""
    if importlib.util.find_spec(LIBRARY) is None:
        return "TensorRT for RTX is not installed (pip install tensorrt-rtx-cu13 rehearses them here, without a GPU)"
    peak, free = manifest.memory.compile_peak_bytes if manifest.memory else 0, available_memory()
    if free is not None and peak > free:
        return f"building the largest engine takes about {format_bytes(peak)} of memory, and {format_bytes(free)} are free here"
    largest, space = max(manifest.files[name].bytes for name in manifest.weight_files), shutil.disk_usage(bundle).free
    if largest > space:
        return f"an engine may take {format_bytes(largest)}, and {format_bytes(space)} are free beside {bundle}"
    return None


def rehearse(bundle: Path, manifest: Manifest, build: Build = build_in_child) -> Report:
    """Parses and builds every graph of a bundle's first target, one after the other, and prints what came out.

    Returns:
        What report.json keeps: `rehearsed`, and the reason where that is False; `failed`, a reason or None; a row for each engine built.
    """
    reason = obstacle_here(bundle, manifest)
    if reason is not None:
        print(f"the graphs of {manifest.target} were not rehearsed: {reason}")
        return {"rehearsed": False, "reason": reason}
    began, built, failed = time.perf_counter(), list[BuiltEngine](), None
    options = CompileOptions(LIBRARY, (CAPABILITY,))
    with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=bundle.absolute().parent) as folder:
        for graph in manifest.graphs:
            print(f"  {graph}: rehearsing", file=sys.stderr, flush=True)
            try:
                built.append(build_graph(bundle, manifest, graph, options, build, Path(folder)))
            except EngineError as error:
                failed = str(error)
                break
            (Path(folder) / built[-1].info.file).unlink()
    seconds = round(time.perf_counter() - began, 1)
    if built:
        print(f"rehearsal for {manifest.target} ({seconds} s, engines thrown away): {describe(built)}")
    rows = {engine.info.graph: _row(engine) for engine in built}
    return {"rehearsed": True, "library": LIBRARY, "capability": CAPABILITY, "seconds": seconds, "failed": failed, "engines": rows}


def _row(engine: BuiltEngine) -> Report:
    info = dataclasses.asdict(engine.info)
    kept = ("library_version", "weights_bytes", "activation_bytes", "attention_kernels", "build_seconds", "peak_rss_bytes")
    return {"engine_bytes": engine.file.bytes, **{name: info[name] for name in kept}}
