"""Running the kit's pieces: each writes one JSON file when it has ended well, and is passed over when that file is there.

A piece's file holds what it found, with the command, date, duration, device and settings; a rehearsal's says on its first line what it is.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.device import find_gpu
from benchmarks.gpu.settings import REHEARSAL, Settings
from runtime.errors import StorageError, UsageError
from runtime.files import write_file

MAX_FILE_BYTES: Final = 16 << 20
PARTS: Final = ("environment", "parity", "bundles", "latency", "transformers", "summary")
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """`part` is one of PARTS; `run` measures and returns plain data.

    `needs` are pieces that come before; `stands` says whether what a piece has made, besides its file, is still there.
    """

    name: str
    part: str
    run: Callable[[Settings], Result]
    needs: tuple[str, ...] = ()
    stands: Callable[[Settings], bool] = lambda _: True


def all_pieces(settings: Settings) -> tuple[Piece, ...]:
    """Every piece of a run, in order."""
    from benchmarks.gpu import bundles, environment, latency, parity, summary, transformers

    engines = [b for b in settings.backends if b.startswith("tensorrt")]
    return (
        Piece("environment", "environment", environment.run),
        *(Piece(f"parity-{b}", "parity", parity.piece(b), ("environment",)) for b in settings.backends),
        Piece("bundles", "bundles", bundles.export_bundle, stands=bundles.exported),
        *(Piece(f"engines-{b}", "bundles", bundles.engine_piece(b), ("environment", "bundles"), _compiled(b)) for b in engines),
        *(Piece(f"latency-{b}", "latency", latency.piece(b), ("environment", "bundles", *_engines(b, engines))) for b in settings.backends),
        *(
            Piece(f"transformers-{b}", "transformers", transformers.piece(b), ("environment", "bundles", *_engines(b, engines)))
            for b in settings.backends
        ),
        Piece("summary", "summary", summary.run, ("environment",)),
    )


def _engines(backend: str, engines: Sequence[str]) -> tuple[str, ...]:
    return (f"engines-{backend}",) if backend in engines else ()


def _compiled(backend: str) -> Callable[[Settings], bool]:
    """Whether the measured bundle still holds a backend's engines, or cannot."""

    def stands(settings: Settings) -> bool:
        from benchmarks.gpu.bundles import exported, has_engines

        return runnable(settings, backend) is not None or (exported(settings) and has_engines(settings.bundle, backend))

    return stands


def choose(settings: Settings, wanted: Sequence[str]) -> list[Piece]:
    """The pieces that are asked for, by part or by name; all where none is.

    Raises:
        UsageError: there is no such piece.
    """
    pieces = all_pieces(settings)
    unknown = [name for name in wanted if name not in PARTS and name not in {piece.name for piece in pieces}]
    if unknown:
        raise UsageError(
            f"unknown --part {unknown[0]!r}: there are {', '.join(PARTS)}, or one piece of them: {', '.join(p.name for p in pieces)}"
        )
    return [piece for piece in pieces if not wanted or piece.part in wanted or piece.name in wanted]


def run_pieces(settings: Settings, wanted: Sequence[str], again: bool, command: str) -> bool:
    """Runs what is asked for and not there yet.

    Returns:
        Whether everything that was compared agrees.

    Raises:
        EngineError: there is no GPU.
        UsageError: a piece needs another that has not run.
    """
    pieces = choose(settings, wanted)
    device = "CPU" if settings.rehearse else find_gpu(settings.device_index).name
    _check_device(settings, device)
    _make(settings.output)
    agrees = True
    for piece in pieces:
        earlier = None if again or piece.part == "summary" or not piece.stands(settings) else stored(settings, piece.name)
        if earlier is not None:
            print(f"{piece.name}: done on {earlier['date']}, {earlier['seconds']:.0f} s; --again measures anew", flush=True)
        else:
            earlier = _run_piece(settings, piece, device, command)
        agrees = agrees and earlier["result"].get("agrees", True)
    return agrees


def _run_piece(settings: Settings, piece: Piece, device: str, command: str) -> Result:
    before = {other.name: other for other in all_pieces(settings)}
    missing = [name for name in piece.needs if stored(settings, name) is None or not before[name].stands(settings)]
    if missing:
        raise UsageError(
            f"{piece.name} needs {missing[0]}, which has not run, or whose files are gone: python -m benchmarks.gpu --part {missing[0]} "
            "with the same options"
        )
    print(f"{piece.name}: begun", file=sys.stderr, flush=True)
    began = time.perf_counter()
    result = piece.run(settings)
    envelope = {
        **({"note": REHEARSAL} if settings.rehearse else {}),
        "piece": piece.name, "device": device, "command": command, "settings": settings.recorded(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "seconds": round(time.perf_counter() - began, 1),
        "result": result,
    }  # fmt: skip
    write_json(path_of(settings, piece.name), envelope)
    print(f"{piece.name}: {result.get('said', 'done')} ({envelope['seconds']:.0f} s)", flush=True)
    return envelope


def _check_device(settings: Settings, device: str) -> None:
    """Raises UsageError where the folder holds results of another device: figures of two are not put into one table."""
    others = {found["device"] for piece in all_pieces(settings) if (found := _read(settings, piece.name)) is not None} - {device}
    if others:
        raise UsageError(f"{settings.output} holds results of {sorted(others)[0]}, this is {device}: choose another --output")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the directory {folder}: {error.strerror}; choose another --output") from error


def path_of(settings: Settings, name: str) -> Path:
    """Where a piece's file is."""
    return settings.output / f"{name}.json"


def stored(settings: Settings, name: str) -> Result | None:
    """A finished piece's file; None where there is none.

    Raises:
        UsageError: it was made with other settings, or cannot be read.
    """
    found = _read(settings, name)
    if found is not None and found["settings"] != settings.recorded():
        options = ", ".join(f"{key} {value}" for key, value in found["settings"].items() if settings.recorded().get(key) != value)
        raise UsageError(f"{path_of(settings, name)} was made with {options}: give the same options, or choose another --output")
    return found


def _read(settings: Settings, name: str) -> Result | None:
    path = path_of(settings, name)
    if not path.is_file():
        return None
    try:
        found: Result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["settings"], dict) or found["piece"] != name:
            raise ValueError("it is of something else")
        return {**found, "device": str(found["device"]), "result": dict(found["result"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a piece's result ({error}): remove it, or choose another --output") from error


def result_of(settings: Settings, name: str) -> Result | None:
    """What a finished piece found."""
    found = stored(settings, name)
    return None if found is None else dict(found["result"])


def write_json(path: Path, content: Result) -> None:
    """Writes a result, whole or not at all."""
    data = (json.dumps(content, indent=2, default=str) + "\n").encode()
    if len(data) > MAX_FILE_BYTES:
        raise StorageError(f"{path.name} would have {len(data)} bytes, more than {MAX_FILE_BYTES}: measure fewer runs")
    write_file(path, data)


def runnable(settings: Settings, backend: str) -> str | None:
    """Why a backend cannot run here, as `environment` found; None where it can."""
    found = (result_of(settings, "environment") or {}).get("backends", {}).get(backend)
    if found is None:
        raise UsageError(f"environment.json says nothing about {backend}: run --part environment --again")
    return None if found["runs"] else str(found["reason"])
