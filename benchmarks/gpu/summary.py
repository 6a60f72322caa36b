"""Piece `summary`: what the other pieces found, as DATE-gpu-DEVICE.json, .md and .png.

It measures nothing. What has not run, or could not, is listed with its reason.
"""

from __future__ import annotations

import io
from typing import Any

from benchmarks.gpu.settings import REHEARSAL, Settings
from runtime.errors import StorageError, UsageError


def run(settings: Settings) -> dict[str, Any]:
    """Writes the three files."""
    from benchmarks.gpu.chart import draw
    from benchmarks.gpu.pieces import write_json
    from benchmarks.gpu.table import describe
    from runtime.files import write_file

    gathered = gather(settings)
    if not gathered["latency"]:
        raise UsageError(
            f"{settings.output} holds no latency of any backend: python -m benchmarks.gpu --part latency with the same options"
        )
    try:
        settings.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the directory {settings.results}: {error.strerror}; choose another --results") from error
    files = {end: settings.results / f"{gathered['name']}.{end}" for end in ("json", "md", "png")}
    picture = io.BytesIO()
    draw(gathered, picture)
    write_file(files["png"], picture.getvalue())
    write_file(files["md"], describe(gathered, files["png"].name).encode())
    write_json(files["json"], gathered)
    return {"files": [str(path) for path in files.values()], "agrees": gathered["agrees"], "said": f"written: {files['md']}"}


def gather(settings: Settings) -> dict[str, Any]:
    """All results of a folder as one object."""
    from benchmarks.gpu.pieces import all_pieces, stored

    found = {piece.name: stored(settings, piece.name) for piece in all_pieces(settings) if piece.name != "summary"}
    environment = found["environment"]
    assert environment is not None, "a summary needs the environment"
    results = {name: envelope["result"] for name, envelope in found.items() if envelope is not None}
    measured = {name: result for name, result in results.items() if "skipped" not in result}
    gpu = environment["result"]["gpu"]
    name = f"{environment['date'][:10]}-gpu-{_slug(environment['device'], settings)}"
    return {
        **({"note": REHEARSAL} if settings.rehearse else {}),
        "name": name, "date": environment["date"], "device": environment["device"], "gpu": gpu,
        "machine": environment["result"]["machine"], "versions": environment["result"]["versions"],
        "backends": environment["result"]["backends"], "settings": settings.recorded(), "bundle": measured.get("bundles"),
        "commands": list(dict.fromkeys(envelope["command"] for envelope in found.values() if envelope is not None)),
        "latency": of_part(measured, "latency-"), "transformers": of_part(measured, "transformers-"),
        "parity": of_part(measured, "parity-"), "engines": of_part(measured, "engines-"), "memory": memory_rows(measured),
        "left_out": {name: result["skipped"] for name, result in results.items() if "skipped" in result},
        "not_run": [name for name, envelope in found.items() if envelope is None],
        "agrees": all(result.get("agrees", True) for result in measured.values()),
    }  # fmt: skip


def _slug(device: str, settings: Settings) -> str:
    from benchmarks.gpu.device import Gpu

    return "rehearsal" if settings.rehearse else Gpu(device, "", "", 0, 0).slug


def of_part(results: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The results of one part by backend."""
    return {name.removeprefix(prefix): result for name, result in results.items() if name.startswith(prefix)}


def memory_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Device memory by who took it: bundles once loaded and after all runs, and torch's peak beside a loaded bundle."""
    rows = [
        {"what": backend, "loaded_bytes": found["memory"]["loaded_bytes"], "most_bytes": found["memory"]["after_runs_bytes"],
         "source": found["memory"]["source"]}
        for backend, found in of_part(results, "latency-").items()
    ]  # fmt: skip
    peaks = [found["torch_peak_bytes"] for found in of_part(results, "transformers-").values() if found["torch_peak_bytes"] is not None]
    if peaks:
        rows.append({"what": "transformers", "loaded_bytes": None, "most_bytes": max(peaks), "source": "torch.cuda.max_memory_reserved"})
    return rows
