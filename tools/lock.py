"""The lock files: what they are made for, how they are made, and whether an index still serves them as wheels.

    python -m tools.lock check            # each lock, for each platform it is meant for; installs and builds nothing
    python -m tools.lock refresh [NAME]   # resolve pyproject.toml anew and write requirements/NAME.txt

A lock pins every package that pip would install, dependencies of dependencies included. Refreshing `jetpack-6.2` needs a
Python 3.10 on the machine, because pip evaluates environment markers with the interpreter it runs in; it installs nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "requirements"
# What a pip without a working index says, apart from "no matching distribution", which it says too.
UNREACHABLE = re.compile(r"Retrying \(|Could not fetch URL|ConnectTimeoutError|NewConnectionError|ReadTimeoutError|ProxyError")
# Which of these torch needs depends on where it comes from; it pins them itself.
CUDA_LIBRARIES = re.compile(r"(nvidia|cuda)-(?!bindings$|pathfinder$)|triton$")
# The driver's names in Python, which the runtime uses itself: no wheels for macOS.
CUDA_PYTHON = re.compile(r"cuda-(bindings|pathfinder)$")
CUDA_MACHINES = "sys_platform != 'darwin'"
# Its own wheels are for these machines alone; the package that pulls them in is only there as source, a few kilobytes of Python.
RTX = re.compile(r"tensorrt-rtx-")
RTX_MACHINES = "sys_platform != 'darwin' and (platform_machine == 'x86_64' or platform_machine == 'AMD64')"
FROM_SOURCE = "tensorrt-rtx-cu13"


class LockError(Exception):
    """A lock does not resolve, or not completely; the message says which and why."""


class IndexUnreachableError(LockError):
    """No package index answered, so nothing was found out."""


@dataclass(frozen=True, slots=True)
class Platform:
    """What pip resolves for: `tags` are platform tags as in wheel names, empty for the machine this runs on."""

    name: str
    python: str
    tags: tuple[str, ...]


LINUX_AARCH64 = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
JETPACK_6 = Platform("Linux aarch64, Python 3.10 (JetPack 6)", "3.10", LINUX_AARCH64)
JETPACK_7 = Platform("Linux aarch64, Python 3.12 (JetPack 7)", "3.12", LINUX_AARCH64)
LINUX = Platform("Linux x86-64, Python 3.11", "3.11", ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"))
WINDOWS = Platform("Windows x86-64, Python 3.12", "3.12", ("win_amd64",))


@dataclass(frozen=True, slots=True)
class Lock:
    """One lock file: the extras it holds, what it is resolved for, and where else its wheels must exist."""

    name: str
    purpose: str
    extras: tuple[str, ...]
    resolved_for: Platform
    checked_for: tuple[Platform, ...]
    pins: tuple[str, ...] = ()
    within: str | None = None

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.name}.txt"


LOCKS = (
    Lock(
        "dev",
        "everything: export, calibration, training of the shipped model, tests; Python 3.11 to 3.13",
        ("export", "calibration", "train", "tensorrt-rtx", "gpu", "dev"),
        Platform("this machine, Python 3.11", "3.11", ()),
        (),  # whoever runs the checks has just installed it
        pins=("torch==2.13.0",),  # the newest that everything was measured with; raise it together with the figures
    ),
    Lock("runtime", "the runtime alone, as tested; Python 3.11 to 3.13", (), LINUX, (JETPACK_7, WINDOWS), within="dev"),
    Lock("jetpack-6.2", "the runtime alone on JetPack 6.2, Python 3.10", (), JETPACK_6, (JETPACK_6, JETPACK_7)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 1 where a lock is at fault, 2 where nothing could be found out."""
    args = build_parser().parse_args(argv)
    locks = [lock for lock in LOCKS if args.lock in (None, lock.name)]
    try:
        if args.command == "refresh":
            for lock in locks:
                print(f"{lock.file.relative_to(ROOT)}: {refresh(lock)} packages", flush=True)
        else:
            for line in check(locks):
                print(line, flush=True)
    except LockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, IndexUnreachableError) else 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.lock", description="Make or check the lock files in requirements/.")
    parser.add_argument("command", choices=("check", "refresh"))
    parser.add_argument("lock", nargs="?", choices=[lock.name for lock in LOCKS], help="one lock alone (default: all)")
    return parser


def check(locks: Sequence[Lock]) -> list[str]:
    """Resolves each lock for each of its platforms, side by side.

    Returns:
        One line for each.

    Raises:
        IndexUnreachableError: no package index answered.
        LockError: a pinned package has no wheel there, or needs one that is not pinned.
    """
    pairs = [(lock, platform) for lock in locks for platform in lock.checked_for]
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda pair: check_one(*pair), pairs))


def check_one(lock: Lock, platform: Platform) -> str:
    """Resolves one lock for one platform; see `check`."""
    what = f"{lock.file.relative_to(ROOT)} for {platform.name}"
    try:
        found = resolve(["--requirement", str(lock.file)], platform, sys.executable)
    except IndexUnreachableError:
        raise
    except LockError as error:
        raise LockError(f"{what} does not resolve as wheels: {error}") from error
    missing = sorted(found.keys() - read(lock).keys())
    if missing:
        raise LockError(f"{what} leaves {', '.join(missing)} unpinned: python -m tools.lock refresh {lock.name}")
    return f"{what}: {len(found)} wheels"


def read(lock: Lock) -> dict[str, str]:
    """The pins of a lock file: normalised name to version."""
    lines = (re.split("[#;]", line)[0].strip() for line in lock.file.read_text(encoding="utf-8").splitlines())
    pins = [line.partition("==") for line in lines if line]
    return {normal(name): version for name, _, version in pins}


def refresh(lock: Lock) -> int:
    """Resolves pyproject.toml anew for one lock, writes the file and returns the number of packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(line for extra in lock.extras for line in project["optional-dependencies"][extra])]
    wanted += lock.pins
    if lock.within:
        wanted += ["--constraint", str(FOLDER / f"{lock.within}.txt")]
    found = resolve(wanted, lock.resolved_for, find_python(lock.resolved_for.python))
    found = {name: version for name, version in found.items() if not CUDA_LIBRARIES.match(name)}
    head = [
        f"# {lock.purpose[0].upper()}{lock.purpose[1:]}.",
        f"# Made by `python -m tools.lock refresh {lock.name}`; see CONTRIBUTING.md.",
    ]
    if "torch" in found:
        head += ["# PyPI's torch for Linux is a CUDA build of several GB. For the CPU build, install it first:"]
        head += [f"#   pip install torch=={found['torch']} --index-url https://download.pytorch.org/whl/cpu"]
    lines = [*head, *(pin(name, version) for name, version in sorted(found.items()))]
    partial = lock.file.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, lock.file)
    return len(found)


def pin(name: str, version: str) -> str:
    """One line of a lock."""
    machines = RTX_MACHINES if RTX.match(name) else CUDA_MACHINES if CUDA_PYTHON.match(name) else None
    return f"{name}=={version}" + (f"; {machines}" if machines else "")


def resolve(arguments: Sequence[str], platform: Platform, python: str) -> dict[str, str]:
    """What pip would install for `arguments`: normalised name to version, without local versions ("2.13.0+cpu" is 2.13.0).

    Raises:
        IndexUnreachableError: no package index answered.
        LockError: pip found no solution in wheels.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        target = ["--target", folder] if platform.tags else []
        pip_install(["--dry-run", "--ignore-installed", "--report", str(report), *target, *arguments], platform, python)
        installs: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {normal(item["metadata"]["name"]): item["metadata"]["version"].partition("+")[0] for item in installs}


def pip_install(arguments: Sequence[str], platform: Platform, python: str) -> None:
    """Runs `pip install` quietly, with wheels alone, for a platform (which needs a `--target` unless it is this machine).

    `FROM_SOURCE` alone is built, on this machine.

    Args:
        python: the interpreter to install for, where the platform is this machine.

    Raises:
        IndexUnreachableError: no package index answered.
        LockError: pip found no solution in wheels.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--python", python, "install"]
    command += ["--only-binary=:all:", "--quiet", *arguments]
    if platform.tags:
        command += ["--implementation", "cp", "--python-version", platform.python]
        command += [word for tag in platform.tags for word in ("--platform", tag)]
    else:
        command += ["--no-binary", FROM_SOURCE]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or [done.stderr.strip()]
        if UNREACHABLE.search(done.stderr):
            raise IndexUnreachableError(f"no package index answered: {errors[0]}")
        raise LockError(" ".join(line.removeprefix("ERROR: ") for line in errors))


@functools.cache
def find_python(version: str) -> str:
    """An interpreter of that version ("3.10"): this one, one on the PATH, or one that pyenv holds.

    Raises:
        LockError: there is none.
    """
    on_path = shutil.which(f"python{version}")
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for python in [sys.executable, *([on_path] if on_path else []), *map(str, pyenv)]:
        probe = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(probe, check=False, capture_output=True, text=True).stdout.strip() == version:
            return python
    raise LockError(f"no Python {version} found on the PATH or in pyenv: the lock for it can only be made where one is")


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    raise SystemExit(main())
