"""How much the runtime needs on a disk, and how fast it starts: `python -m benchmarks.install_size`.

Makes a temporary environment that holds what `requirements/runtime.txt` pins and the wheel of this repository, nothing else (not even
pip). Two sizes of each package: as pip installs it, and trimmed to what `from runtime import load` can reach. Trimming is done, not
estimated: bytecode, test suites, packages that nothing imports, and ONNX Runtime's second library (for C programs; the Python module
holds the code once more) are deleted, and the runtime must start without them. With --bundle it must also answer, with the same tokens.

Times are of new processes in the untrimmed environment, files in the system's cache: the median of several, interpreter included.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.machine import cpu_name
from runtime.units import format_bytes

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("calibration", "configs", "export", "runtime")
STARTS = {
    "python alone": ["-c", "pass"],
    "import runtime": ["-c", "import runtime"],
    "from runtime import load": ["-c", "from runtime import load"],
    "runtime.generate --help": ["-m", "runtime.generate", "--help"],
    "runtime.profile --help": ["-m", "runtime.profile", "--help"],
    "runtime.inspect --help": ["-m", "runtime.inspect", "--help"],
}
LOADED = (
    "import sys; from runtime import load; print(*(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)), sep='\\n')"
)
ANSWER = "import sys; from runtime import load; print(load(sys.argv[1]).generate('what is this?', max_new_tokens=4).token_ids)"
UNUSED_LIBRARY = ("onnxruntime", "capi", "libonnxruntime.so.")


@dataclass(frozen=True, slots=True)
class Package:
    """One installed distribution: its bytes as installed, and as trimmed (0: nothing imports it)."""

    name: str
    version: str
    bytes: int
    trimmed_bytes: int


@dataclass(frozen=True, slots=True)
class Start:
    """One command's time from start to end, medians in seconds."""

    what: str
    wall_s: float
    cpu_s: float


class InstallError(Exception):
    """The environment cannot be made or used; the message says why."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.install_size", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=9, help="starts of each command (default: 9)")
    parser.add_argument(
        "--requirements", type=Path, default=ROOT / "requirements" / "runtime.txt", metavar="FILE", help="the lock to install"
    )
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="a bundle that must give the same answer before and after trimming")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints sizes and times, and as the last line one JSON object."""
    args = build_parser().parse_args(argv)
    if args.runs < 1 or not args.requirements.is_file():
        print("--runs must be 1 or more, and --requirements a file", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        try:
            python, site = install(args.requirements, Path(folder))
            starts = [measure_start(what, [str(python), *command], Path(folder), args.runs) for what, command in STARTS.items()]
            answer = _answer(python, args.bundle)
            packages = trim(python, site)
            _run([str(python), "-B", *STARTS["from runtime import load"]])
            if _answer(python, args.bundle) != answer:
                raise InstallError("the trimmed runtime gives another answer")
        except InstallError as error:
            print(error, file=sys.stderr)
            return 2
    report(packages, starts, args.runs)
    return 0


def report(packages: list[Package], starts: list[Start], runs: int) -> None:
    """Prints both tables and the JSON line."""
    total, trimmed = sum(p.bytes for p in packages), sum(p.trimmed_bytes for p in packages)
    print(f"{platform.platform(terse=True)}, {platform.machine()}, Python {platform.python_version()}, {cpu_name()}")
    print(f"  {'':<32}{'installed':>11}{'trimmed':>11}")
    for p in packages:
        print(f"  {p.name + ' ' + p.version:<32}{format_bytes(p.bytes):>11}{format_bytes(p.trimmed_bytes) if p.trimmed_bytes else '-':>11}")
    print(f"  {'sum':<32}{format_bytes(total):>11}{format_bytes(trimmed):>11}")
    print(f"  {f'median of {runs} starts':<32}{'wall':>11}{'CPU':>11}")
    for start in starts:
        print(f"  {start.what:<32}{start.wall_s:>9.3f} s{start.cpu_s:>9.3f} s")
    print(json.dumps({
        "benchmark": "install_size", "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), "cpu": cpu_name(),
        "machine": platform.machine(), "python": platform.python_version(), "total_bytes": total, "trimmed_bytes": trimmed,
        "packages": [asdict(p) for p in packages], "runs": runs, "starts": [asdict(s) for s in starts],
    }))  # fmt: skip


def install(requirements: Path, folder: Path) -> tuple[Path, Path]:
    """Makes the environment below `folder`; returns its Python and its site-packages."""
    environment = folder / "environment"
    _run([sys.executable, "-m", "venv", "--without-pip", str(environment)])
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    _run([*pip, "install", "--quiet", "--no-deps", "--only-binary=:all:", "--requirement", str(requirements.resolve())])
    _run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(build_wheel(folder))])
    site = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    return python, Path(site.strip())


def build_wheel(folder: Path) -> Path:
    """Builds the wheel from a copy, so that the clone stays as it is."""
    source, wheels = folder / "source", folder / "wheels"
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    _run([*command, "--no-index", "--wheel-dir", str(wheels), str(source)])
    (wheel,) = wheels.glob("*.whl")
    return wheel


def trim(python: Path, site: Path) -> list[Package]:
    """Deletes what the runtime does not reach; returns both sizes of every distribution, the largest first."""
    loaded = {Path(line).resolve() for line in _run([str(python), "-B", "-c", LOADED]).splitlines()}
    packages, seen = [], set()
    for record in sorted(site.glob("*.dist-info/RECORD")):
        with record.open(newline="", encoding="utf-8") as file:
            files = {path for row in csv.reader(file) if row and (path := (site / row[0]).resolve()).is_file()}
        name, _, version = record.parent.name.removesuffix(".dist-info").rpartition("-")
        kept = {path for path in files if not _unused(path, site.resolve())} if files & loaded else set()
        packages.append(Package(name, version, _bytes(files), _bytes(kept)))
        for path in files - kept:
            path.unlink()
        seen |= files
    others = {path.resolve() for path in site.rglob("*") if path.is_file()} - seen
    if others:
        packages.append(Package("files of no package", "", _bytes(others), _bytes(others)))
    return sorted(packages, key=lambda package: -package.bytes)


def _unused(path: Path, site: Path) -> bool:
    """Whether a file of a package that is imported can go: what is outside of site-packages are its commands."""
    parts = path.relative_to(site).parts if path.is_relative_to(site) else ()
    second_library = parts[:2] == UNUSED_LIBRARY[:2] and path.name.startswith(UNUSED_LIBRARY[2])
    return not parts or path.suffix == ".pyc" or "tests" in parts[:-1] or second_library


def _bytes(files: set[Path]) -> int:
    return sum(path.lstat().st_size for path in files)


def measure_start(what: str, command: list[str], folder: Path, runs: int) -> Start:
    """Starts a command `runs` times after one that is not counted."""
    wall_s, cpu_s = [], []
    for run in range(runs + 1):
        before, began = os.times(), time.perf_counter()
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, env=_environment())
        elapsed, after = time.perf_counter() - began, os.times()
        if done.returncode:
            raise InstallError(f"{what} failed:\n{done.stderr}")
        if run:
            wall_s.append(elapsed)
            cpu_s.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return Start(what, round(statistics.median(wall_s), 4), round(statistics.median(cpu_s), 4))


def _answer(python: Path, bundle: Path | None) -> str:
    return "" if bundle is None else _run([str(python), "-B", "-c", ANSWER, str(bundle.resolve())])


def _environment() -> dict[str, str]:
    """Without what would let the new environment see other packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=tempfile.gettempdir(), check=False, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise InstallError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
