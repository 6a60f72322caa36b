"""A small installation of the runtime: which files a device needs, by the rule that stands here, and how large they are.

1. A distribution stays where importing every module of `runtime` loads one of its files. The others go whole: what pip brings along
   for them, such as a client for the Hugging Face hub, is never loaded.
2. Of those that stay, test suites (folders named `tests`) and bytecode (Python makes it anew) go, and ONNX Runtime's library for C
   programs, whose code the Python module holds once more: unless another library of the same distribution names it.
3. What belongs to no distribution goes (commands and manual pages, where pip puts them into the same folder).

Licences and metadata (`*.dist-info`) stay. What is to stay is found by importing, never listed by hand. Knows nothing about where the
packages come from.
"""

from __future__ import annotations

import csv
import os
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import EntropyPruneError
from runtime.units import format_bytes
from tools.lock import normal

IMPORT_ALL = """
import importlib, pkgutil, sys
sys.path[:0] = sys.argv[1:]
import runtime
for module in pkgutil.walk_packages(runtime.__path__, "runtime."):
    importlib.import_module(module.name)
print(*(m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)), sep="\\n")
"""
SECOND_LIBRARY = "libonnxruntime.so"  # the file's name goes on with a version
LIBRARIES = (".so", ".pyd", ".dll", ".dylib")


class InstallError(EntropyPruneError, RuntimeError):
    """The runtime cannot be installed, or does not start from what is installed; the message says why."""


@dataclass(frozen=True, slots=True)
class Package:
    """One installed distribution: its bytes as installed, and as trimmed (0: nothing imports it)."""

    name: str
    version: str
    bytes: int
    trimmed_bytes: int


@dataclass(frozen=True, slots=True)
class _Distribution:
    """What one `*.dist-info` lists of files that exist in its installation; commands lie elsewhere and are left alone."""

    name: str
    version: str
    files: frozenset[Path]

    @classmethod
    def read(cls, record: Path, site: Path) -> _Distribution:
        with record.open(newline="", encoding="utf-8") as file:
            listed = [(site / row[0]).resolve() for row in csv.reader(file) if row]
        files = frozenset(path for path in listed if path.is_relative_to(site) and path.is_file())
        name, _, version = record.parent.name.removesuffix(".dist-info").rpartition("-")
        return cls(name, version, files)


def imported(python: str | Path, site: Path, *more: Path) -> frozenset[str]:
    """The distributions in `site` that the runtime loads, by their normalised names.

    Args:
        python: an interpreter that can import what lies in `site`; started with nothing else on its path.
        site: where packages are installed.
        more: further folders for the path, such as the one that holds `runtime`.

    Raises:
        InstallError: a module of the runtime cannot be imported.
    """
    loaded = {Path(line).resolve() for line in run_isolated(python, IMPORT_ALL, site, *more).splitlines()}
    return frozenset(normal(found.name) for found in _distributions(site.resolve()) if found.files & loaded)


def trim(site: Path, stay: Collection[str]) -> list[Package]:
    """Deletes what the rule says, and folders that are left empty.

    Args:
        site: where packages are installed; nothing else may lie there.
        stay: normalised names, from `imported`.

    Returns:
        Both sizes of every distribution, the largest first.

    Raises:
        InstallError: a name is not installed there.
    """
    site = site.resolve()
    found = _distributions(site)
    missing = sorted(set(stay) - {normal(one.name) for one in found})
    if missing:
        raise InstallError(f"the runtime imports {missing[0]}, which is not among the installed packages: refresh the lock")
    packages, kept = [], set[Path]()
    for one in found:
        mine = _needed(one.files, site) if normal(one.name) in stay else set()
        packages.append(Package(one.name, one.version, _bytes(one.files), _bytes(mine)))
        kept |= mine
    listed = frozenset().union(*(one.files for one in found))
    others = {path.resolve() for path in site.rglob("*") if path.is_file()} - listed
    if others:
        packages.append(Package("files of no package", "", _bytes(others), 0))
    for path in (listed | others) - kept:
        path.unlink()
    for folder in sorted((path for path in site.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    return sorted(packages, key=lambda package: -package.bytes)


def table(packages: Sequence[Package]) -> list[str]:
    """Lines with both sizes of each package, and their sums."""
    total, trimmed = sum(p.bytes for p in packages), sum(p.trimmed_bytes for p in packages)
    lines = [f"  {'':<32}{'installed':>11}{'trimmed':>11}"]
    for p in packages:
        size = format_bytes(p.trimmed_bytes) if p.trimmed_bytes else "-"
        lines.append(f"  {f'{p.name} {p.version}'.strip():<32}{format_bytes(p.bytes):>11}{size:>11}")
    return [*lines, f"  {'sum':<32}{format_bytes(total):>11}{format_bytes(trimmed):>11}"]


def folder_bytes(folder: Path) -> int:
    """The sum of all file sizes below a folder."""
    return _bytes(path for path in folder.rglob("*") if path.is_file())


def run_isolated(python: str | Path, code: str, *arguments: str | Path) -> str:
    """What a program prints that sees the standard library and nothing else: no site-packages, no PYTHONPATH, no current folder.

    Raises:
        InstallError: it fails.
    """
    return run([str(python), "-I", "-S", "-B", "-c", code, *(str(one) for one in arguments)])


def run(command: Sequence[str]) -> str:
    """What a command prints, run in a folder and an environment that let it see no packages of ours.

    Raises:
        InstallError: it fails.
    """
    done = subprocess.run(command, cwd=tempfile.gettempdir(), check=False, capture_output=True, text=True, env=clean_environment())
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise InstallError(f"{' '.join(' '.join(command).split()):.160} failed: {said}")
    return done.stdout


def clean_environment() -> dict[str, str]:
    """Without what would let a new environment see other packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _distributions(site: Path) -> list[_Distribution]:
    return [_Distribution.read(record, site) for record in sorted(site.glob("*.dist-info/RECORD"))]


def _needed(files: Iterable[Path], site: Path) -> set[Path]:
    """The files of a distribution that stay, where it stays itself."""
    kept = {path for path in files if path.suffix != ".pyc" and "tests" not in path.relative_to(site).parts[:-1]}
    second = {path for path in kept if path.name.startswith(SECOND_LIBRARY)}
    libraries = (path for path in kept - second if second and any(end in path.name for end in LIBRARIES))
    return kept if any(SECOND_LIBRARY.encode() in path.read_bytes() for path in libraries) else kept - second


def _bytes(files: Iterable[Path]) -> int:
    return sum(path.lstat().st_size for path in files)
