"""Bundles to measure: LLaVA-1.5-7B's shape with random weights, tiny-llava to compare answers with, and their engines."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.random_checkpoint import random_checkpoint, real_shape, small_shape
from benchmarks.gpu.settings import SPLIT_LAYER, Settings
from runtime.errors import EngineError, UsageError

TARGETS: Final = {"fp32": "cpu", "fp16": "cuda"}  # of configs/targets, by precision
RTX_CAPABILITIES: Final = (80, 86, 89, 120)
OLDEST_RTX: Final = 80  # for chips that TensorRT for RTX does not name: does an engine for SM80 run there?
ENGINE_TEXT_TOKENS: Final = 256


def export_bundle(settings: Settings) -> dict[str, Any]:
    """Piece `bundles`: exports the measured bundle."""
    shape = small_shape() if settings.rehearse else real_shape()
    dtype = "float32" if settings.rehearse else "float16"
    checkpoint = random_checkpoint(settings.work / "checkpoint", shape, settings.seed, dtype)
    source = ["--checkpoint", str(checkpoint), *(["--max-context", "256"] if settings.rehearse else [])]
    keeps = ",".join(map(str, settings.budgets))
    made = build(settings.bundle, "llava15", settings.precision, ["--split-layer", str(SPLIT_LAYER), "--keep", keeps, *source])
    return {**made, "said": f"{made['bytes'] / 1e9:.2f} GB exported in {made['export_seconds']:.0f} s"}


def exported(settings: Settings) -> bool:
    """Whether the measured bundle is still there."""
    return (settings.bundle / "bundle.json").is_file()


def build(output: Path, model: str, precision: str, more: Sequence[str] = ()) -> dict[str, Any]:
    """Exports one bundle with `export.build`, in place of an earlier one there.

    Raises:
        UsageError: it ended with an error, which it has printed.
    """
    from export import build as command
    from runtime.machine import peak_memory
    from runtime.manifest import read_manifest

    argv = ["--model", model, "--target", TARGETS[precision], "--precision", precision, "--output", str(output), *more]
    began = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # its report; what this kit says is on stdout
        status = command.main(argv)
    if status:
        raise UsageError(f"python -m export.build {shlex.join(argv)} ended with status {status}; what it said stands above")
    seconds, manifest, peak = round(time.perf_counter() - began, 1), read_manifest(output), peak_memory()
    return {
        "bundle": str(output), "command": f"python -m export.build {shlex.join(argv)}", "model": manifest.model,
        "source": manifest.source.checkpoint, "precision": manifest.precision, "split_layer": manifest.split_layer,
        "budgets": manifest.budgets, "score_mode": manifest.score_mode, "visual_tokens": manifest.geometry.visual_tokens,
        "layers": manifest.geometry.layers, "hidden_size": manifest.geometry.hidden_size,
        "bytes": sum(info.bytes for info in manifest.files.values()), "export_seconds": seconds,
        "peak_rss_bytes": None if peak is None else peak.bytes,
    }  # fmt: skip


def tiny_bundle(settings: Settings, precision: str) -> Path:
    """The shipped model, exported in one precision; made where it is missing."""
    output = settings.work / f"tiny-llava-{precision}"
    if not (output / "bundle.json").is_file():  # whole or not at all
        build(output, "tiny-llava", precision)
    return output


def engine_piece(backend: str) -> Callable[[Settings], dict[str, Any]]:
    """Piece `engines-BACKEND`: compiles the measured bundle's graphs."""

    def run(settings: Settings) -> dict[str, Any]:
        from benchmarks.gpu.pieces import runnable

        reason = runnable(settings, backend)
        if reason is not None:
            return {"skipped": reason, "said": f"left out: {reason}"}
        return compile_engines(settings, settings.bundle, backend)

    return run


def has_engines(bundle: Path, library: str) -> bool:
    """Whether a bundle holds engines of a library."""
    from runtime.manifest import read_manifest

    return any(engine.library == library for engine in read_manifest(bundle).engines)


def compile_engines(settings: Settings, bundle: Path, library: str) -> dict[str, Any]:
    """Builds the engines of a bundle for this device."""
    from benchmarks.gpu.device import find_gpu
    from runtime.compile import summary, weights_ratio
    from runtime.engine_files import CompileOptions, compile_bundle
    from runtime.engines.tensorrt_profiles import ProfileOptions
    from runtime.manifest import read_manifest

    capabilities = rtx_capabilities(find_gpu(settings.device_index).capability) if library == "tensorrt_rtx" else ()
    began = time.perf_counter()
    engines = compile_bundle(bundle, CompileOptions(library, capabilities, ProfileOptions(ENGINE_TEXT_TOKENS)))
    seconds = round(time.perf_counter() - began, 1)
    return {
        **summary(engines), "capabilities": capabilities, "seconds": seconds,
        "weights_ratio": weights_ratio(read_manifest(bundle), engines),
        "said": f"{len(engines)} engines in {seconds:.0f} s" + (f" for SM{capabilities[0]}" if len(capabilities) == 1 else ""),
    }  # fmt: skip


def rtx_capabilities(capability: int) -> tuple[int, ...]:
    """What to build for: the device's own where TensorRT for RTX names it, otherwise its oldest, which may or may not run there.

    Raises:
        EngineError: the device is older than any that the library knows.
    """
    if capability < OLDEST_RTX:
        raise EngineError(f"TensorRT for RTX builds for SM{OLDEST_RTX} and later, the device is SM{capability}: use ONNX Runtime CUDA")
    return (capability,) if capability in RTX_CAPABILITIES else (OLDEST_RTX,)
