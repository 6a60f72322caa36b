"""Piece `environment`: the device, what is installed, and which backends answer a question on it, each with its reason where it does not.

Every backend is tried in a process of its own, on the shipped model in the measured precision: a library that ends the process on a chip
that it does not know takes nothing else with it.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Final

from benchmarks.gpu.settings import ROOT, Settings

SECONDS: Final = 240
QUESTION: Final = "read row 2."


def run(settings: Settings) -> dict[str, Any]:
    """Looks at everything and tries every backend."""
    from benchmarks.gpu.device import find_gpu, versions
    from runtime.machine import Machine

    gpu = None if settings.rehearse else find_gpu(settings.device_index)
    backends = {backend: try_backend(settings, backend) for backend in settings.backends}
    able = [name for name, found in backends.items() if found["runs"]]
    return {
        "gpu": None if gpu is None else dataclasses.asdict(gpu), "machine": dataclasses.asdict(Machine.here(None)), "versions": versions(),
        "backends": backends, "said": f"runs: {', '.join(able) or 'nothing'}" + "".join(
            f"; not {name}: {found['reason']}" for name, found in backends.items() if not found["runs"]
        ),
    }  # fmt: skip


def try_backend(settings: Settings, backend: str) -> dict[str, Any]:
    """Whether a backend answers, and the reason where it does not; with TensorRT for RTX, for which chip its engines were built."""
    from benchmarks.gpu.bundles import compile_engines, tiny_bundle
    from runtime.errors import EntropyPruneError

    built: dict[str, Any] = {}
    try:
        bundle = tiny_bundle(settings, settings.precision)
        if backend.startswith("tensorrt"):
            built = {"engine_capabilities": compile_engines(settings, bundle, backend)["capabilities"]}
    except EntropyPruneError as error:
        return {"runs": False, "reason": " ".join(str(error).split()), **built}
    return {**_in_child([str(bundle), backend, str(settings.device_index)]), **built}


def _in_child(arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu.environment", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"runs": False, "reason": f"it did not answer within {SECONDS} s"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        said = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        return {"runs": False, "reason": f"its process ended with status {done.returncode}: {said[:300]}"}
    return found


def main(argv: Sequence[str]) -> int:
    """The child: loads a bundle on a backend, asks a question, prints what became of it as JSON."""
    from pathlib import Path

    from benchmarks.gpu.device import open_model
    from runtime.profile_runs import synthetic_image

    bundle, backend, index = argv
    try:
        answer = open_model(Path(bundle), backend, int(index)).generate(QUESTION, [synthetic_image(0)], max_new_tokens=4, do_sample=False)
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # this project's errors are among them
        print(json.dumps({"runs": False, "reason": " ".join(str(error).split())[:500] or type(error).__name__}))
        return 0
    print(json.dumps({"runs": True, "reason": None, "tokens": answer.token_ids}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
