"""How much the runtime needs on a disk, and how fast it starts: `python -m benchmarks.install_size`.

Makes a temporary environment that holds what `requirements/runtime.txt` pins and the wheel of this repository, nothing else (not even
pip). Two sizes of each package: as pip installs it, and trimmed by the rule of `tools/trimming.py`. Trimming is done, not estimated: the
runtime must start from what is left. Then the folder that `python -m tools.device_runtime` makes for this machine, as a whole. With
--bundle both must also answer, with the same tokens as before.

Times are of new processes in the untrimmed environment, files in the system's cache: the median of several, interpreter included.
"""

from __future__ import annotations

import argparse
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

from runtime.errors import EntropyPruneError
from runtime.machine import cpu_name
from runtime.units import format_bytes
from tools.device_runtime import ANSWER, THIS_MACHINE, choose_platform, make
from tools.trimming import InstallError, Package, clean_environment, imported, run, run_isolated, table, trim

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


@dataclass(frozen=True, slots=True)
class Start:
    """One command's time from start to end, medians in seconds."""

    what: str
    wall_s: float
    cpu_s: float


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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            python, site = install(args.requirements, folder)
            starts = [measure_start(what, [str(python), *command], folder, args.runs) for what, command in STARTS.items()]
            answer = _answer(python, args.bundle, site)
            packages = trim(site, imported(python, site))
            imported(python, site)
            if _answer(python, args.bundle, site) != answer:
                raise InstallError("the trimmed runtime gives another answer")
            (folder / "device").mkdir()
            device_bytes = make(folder / "device", choose_platform(THIS_MACHINE, None), args.bundle).total_bytes
        except EntropyPruneError as error:
            print(error, file=sys.stderr)
            return 2
    report(packages, device_bytes, starts, args.runs)
    return 0


def report(packages: list[Package], device_bytes: int, starts: list[Start], runs: int) -> None:
    """Prints both tables, the device folder's size between them, and the JSON line."""
    total, trimmed = sum(p.bytes for p in packages), sum(p.trimmed_bytes for p in packages)
    print(f"{platform.platform(terse=True)}, {platform.machine()}, Python {platform.python_version()}, {cpu_name()}")
    print("\n".join(table(packages)))
    print(f"  {'folder of tools.device_runtime':<32}{'':>11}{format_bytes(device_bytes):>11}")
    print(f"  {f'median of {runs} starts':<32}{'wall':>11}{'CPU':>11}")
    for start in starts:
        print(f"  {start.what:<32}{start.wall_s:>9.3f} s{start.cpu_s:>9.3f} s")
    print(json.dumps({
        "benchmark": "install_size", "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), "cpu": cpu_name(),
        "machine": platform.machine(), "python": platform.python_version(),
        "total_bytes": total, "trimmed_bytes": trimmed, "device_folder_bytes": device_bytes,
        "packages": [asdict(p) for p in packages], "runs": runs, "starts": [asdict(s) for s in starts],
    }))  # fmt: skip


def install(requirements: Path, folder: Path) -> tuple[Path, Path]:
    """Makes the environment below `folder`; returns its Python and its site-packages."""
    environment = folder / "environment"
    run([sys.executable, "-m", "venv", "--without-pip", str(environment)])
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-deps", "--only-binary=:all:", "--requirement", str(requirements.resolve())])
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(build_wheel(folder))])
    site = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
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
    run([*command, "--no-index", "--wheel-dir", str(wheels), str(source)])
    (wheel,) = wheels.glob("*.whl")
    return wheel


def measure_start(what: str, command: list[str], folder: Path, runs: int) -> Start:
    """Starts a command `runs` times after one that is not counted."""
    wall_s, cpu_s = [], []
    for number in range(runs + 1):
        before, began = os.times(), time.perf_counter()
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, env=clean_environment())
        elapsed, after = time.perf_counter() - began, os.times()
        if done.returncode:
            raise InstallError(f"{what} failed:\n{done.stderr}")
        if number:
            wall_s.append(elapsed)
            cpu_s.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return Start(what, round(statistics.median(wall_s), 4), round(statistics.median(cpu_s), 4))


def _answer(python: Path, bundle: Path | None, site: Path) -> str:
    return "" if bundle is None else run_isolated(python, ANSWER, bundle.resolve(), site)


if __name__ == "__main__":
    raise SystemExit(main())
