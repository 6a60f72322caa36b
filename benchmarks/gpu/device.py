"""The GPU as `nvidia-smi` tells it, what is installed, and opening a bundle on a backend."""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import EngineError

if TYPE_CHECKING:
    from runtime.pipeline import VisionLanguageModel

MIB = 1 << 20
DISTRIBUTIONS = re.compile(
    r"(entropy-prune|numpy|torch|triton|transformers|tokenizers|safetensors|polygraphy|onnx.*|tensorrt.*|nvidia-.*|cuda-.*)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device; `capability` is its compute capability, 90 for 9.0. `cuda` is the newest that the driver supports."""

    name: str
    driver: str
    cuda: str
    capability: int
    memory_bytes: int

    @property
    def slug(self) -> str:
        """The name as a part of file names."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def find_gpu(index: int) -> Gpu:
    """Asks `nvidia-smi`.

    Raises:
        EngineError: there is no such GPU.
    """
    if shutil.which("nvidia-smi") is None:
        raise EngineError(
            "no NVIDIA GPU: nvidia-smi is not on the PATH; run this on a machine with one, or rehearse it with --rehearse --output DIR"
        )
    name, driver, capability, memory = query(index, ("name", "driver_version", "compute_cap", "memory.total"))
    banner = re.search(r"CUDA Version:\s*([\d.]+)", _nvidia_smi([]))
    return Gpu(name, driver, banner[1] if banner else "unknown", int(capability.replace(".", "")), int(float(memory)) * MIB)


def query(index: int, entries: Sequence[str]) -> list[str]:
    """Entries of `nvidia-smi --query-gpu`, as text."""
    text = _nvidia_smi([f"--id={index}", f"--query-gpu={','.join(entries)}", "--format=csv,noheader,nounits"])
    values = [value.strip() for value in text.strip().splitlines()[-1].split(",")] if text.strip() else []
    if len(values) != len(entries):
        raise EngineError(f"nvidia-smi answered {text.strip()[:200]!r} about GPU {index}: see `nvidia-smi` for the GPUs there are")
    return values


def _nvidia_smi(arguments: Sequence[str]) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], check=False, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"nvidia-smi does not run ({error}): is the driver loaded?") from error
    if done.returncode:
        raise EngineError(f"nvidia-smi failed: {(done.stdout + done.stderr).strip()[:200]}")
    return done.stdout


def memory_in_use(index: int, rehearse: bool) -> int:
    """Bytes in use on the whole device; in a rehearsal, this process's peak of resident memory."""
    if rehearse:
        from runtime.machine import peak_memory

        peak = peak_memory()
        return peak.bytes if peak else 0
    return int(float(query(index, ("memory.used",))[0])) * MIB


def versions() -> dict[str, str]:
    """Every installed distribution that can matter to a figure."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if DISTRIBUTIONS.fullmatch(d.metadata["Name"] or "")}
    return {"python": platform.python_version(), "system": platform.platform(terse=True), **dict(sorted(found.items()))}


def open_model(bundle: Path, backend: str, device_index: int) -> VisionLanguageModel:
    """Loads a bundle on a backend.

    Raises:
        EngineError: it cannot run here; the message says why.
    """
    from runtime.pipeline import load

    options: dict[str, Any] = {"backend": backend, "device_index": device_index}
    if "backend" not in inspect.signature(load).parameters:
        if backend != "cpu":
            raise EngineError(f"this version's runtime has no backend {backend}: runtime.pipeline.load runs bundles on the CPU alone")
        options = {}
    return load(bundle, **options)
