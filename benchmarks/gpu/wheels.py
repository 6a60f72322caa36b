"""`python -m benchmarks.gpu wheels`: cuts a folder of wheels into parts of a size that can be carried, and puts it together again.

    python -m benchmarks.gpu wheels DIR --part-size 60MB --output PARTS    # PARTS/000, PARTS/001, ...: each at most 60 MB
    python -m benchmarks.gpu wheels PARTS --join --output DIR              # compares every wheel with its SHA-256

Knows nothing about what the files are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from runtime.command_line import CommandParser, run_command
from runtime.errors import InputError, StorageError, UsageError
from runtime.files import write_file
from runtime.manifest import sha256_of

INDEX: Final = "wheels.json"
UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
BLOCK: Final = 1 << 20


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m benchmarks.gpu wheels", description="Cut a folder of wheels into parts, or join them.")
    parser.add_argument("folder", type=Path, help="wheels, or with --join the folder of the parts")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: FOLDER-parts, or FOLDER-joined")
    parser.add_argument("--part-size", default="60MB", metavar="SIZE", help="the most bytes of a part (default: 60MB)")
    parser.add_argument("--join", action="store_true", help="put the wheels together again")
    return parser


def read_size(text: str) -> int:
    """60MB -> 60,000,000.

    Raises:
        UsageError: it is not a size of a kilobyte or more.
    """
    match = re.fullmatch(r"(\d{1,9})\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    size = int(match[1]) * UNITS[match[2].upper()] if match else 0
    if size < 1000:
        raise UsageError(f"--part-size is {text[:40]!r}: give a size of 1KB or more, such as 60MB")
    return size


def split(folder: Path, output: Path, part_bytes: int) -> int:
    """Cuts every file of a folder into pieces and puts these into numbered folders, none larger than `part_bytes`.

    Returns:
        The number of parts.

    Raises:
        UsageError: the folder holds no files, or the output holds some.
        StorageError: a file cannot be read or written.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if not files:
        raise UsageError(f"{folder} holds no files: name the folder that `pip download -d` wrote into")
    _make_empty(output)
    index: dict[str, Any] = {"files": {}}
    number, used = 0, 0
    for path in files:
        pieces: list[str] = []
        with _opened(path) as file:
            while block := file.read(BLOCK):
                while block:
                    if used == part_bytes:
                        number, used = number + 1, 0
                    now, block = block[: part_bytes - used], block[part_bytes - used :]
                    name = f"{number:03d}/{path.name}"
                    if name not in pieces:
                        pieces.append(name)
                    _append(output / name, now)
                    used += len(now)
        index["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path), "pieces": pieces}
    write_file(output / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return number + 1


def join(folder: Path, output: Path) -> int:
    """Puts the files together again.

    Returns:
        Their number.

    Raises:
        InputError: a piece is missing, or a file is not what was cut.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} holds no {INDEX} that can be read ({error}): name the folder that was written by `wheels --part-size`"
        ) from error
    _make_empty(output)
    for name, entry in index.items():
        target, digest = output / Path(name).name, hashlib.sha256()
        _append(target, b"")
        for piece in entry["pieces"]:
            with _opened(folder / piece) as file:
                while block := file.read(BLOCK):
                    digest.update(block)
                    _append(target, block)
        if digest.hexdigest() != entry["sha256"]:
            target.unlink(missing_ok=True)
            raise InputError(f"{name} differs from what was cut: copy the parts again")
    return len(index)


def _make_empty(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()):
            raise UsageError(f"{output} is not empty: choose another --output")
    except OSError as error:
        raise StorageError(f"cannot make the directory {output}: {error.strerror}; choose another --output") from error


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}; copy the parts again") from error


def _append(path: Path, block: bytes) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            file.write(block)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another --output") from error


def _run(args: argparse.Namespace) -> int:
    output = args.output or args.folder.with_name(f"{args.folder.name}-{'joined' if args.join else 'parts'}")
    if args.join:
        print(f"{join(args.folder, output)} files in {output}")
    else:
        print(f"{split(args.folder, output, read_size(args.part_size))} parts in {output}; {INDEX} there goes with each of them")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)
