"""A folder that holds the runtime and all it needs, trimmed, to be copied to a device: `python -m tools.device_runtime --output DIR`.

    python -m tools.device_runtime --output device --bundle bundles/tiny-llava-cpu     # for this machine, and answers from it
    python -m tools.device_runtime --output jetson --device jetpack-6.2                # for another one
    PYTHONPATH=device python3 -m runtime.generate --bundle BUNDLE --image FILE --prompt TEXT

The locked versions are installed as wheels and trimmed by the rule of `tools/trimming.py`. Where this machine can run the result, a fresh
interpreter that sees nothing else must import it. Where it cannot, what the runtime imports is found with the same versions, installed for
this machine. The folder is written whole or not at all, and replaces nothing but an earlier one.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.command_line import CommandParser, run_command
from tools import lock

if TYPE_CHECKING:
    from export.staging import Kind
    from tools.trimming import Package

CONTENTS_FILE = "device_runtime.json"
THIS_MACHINE = "this-machine"
DEVICES = {
    "jetpack-6.2": lock.JETPACK_6,
    "jetpack-7": lock.JETPACK_7,
    "linux-aarch64": replace(lock.JETPACK_7, name="Linux aarch64, Python 3.12"),
    "linux-x86_64": lock.LINUX,
}
PYTHONS = {"3.10": "jetpack-6.2", "3.11": "runtime", "3.12": "runtime", "3.13": "runtime"}  # and the lock for each
ANSWER = """
import sys
sys.path[:0] = sys.argv[2:]
import numpy as np
from runtime import load
image = np.linspace(0, 255, 96 * 96 * 3).astype(np.uint8).reshape(96, 96, 3)
print(*load(sys.argv[1]).generate("read row 2.", [image], max_new_tokens=8, eos_token_ids=()).token_ids)
"""


@dataclass(frozen=True, slots=True)
class DeviceRuntime:
    """What was made: sizes by package, the bytes of the whole folder, and what was checked in one line."""

    packages: tuple[Package, ...]
    total_bytes: int
    checked: str


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m tools.device_runtime", description="Make a small, self-contained folder with the runtime.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder; an earlier one of this kind is replaced")
    parser.add_argument("--device", default=THIS_MACHINE, choices=(THIS_MACHINE, *DEVICES), help="what it is for (default: this machine)")
    parser.add_argument("--python", choices=PYTHONS, metavar="X.Y", help="the device's Python, 3.10 to 3.13 (default: the device's usual)")
    parser.add_argument(
        "--bundle", type=Path, metavar="DIR", help="a bundle that the trimmed runtime must answer from, with the same tokens"
    )
    return parser


def choose_platform(device: str, python: str | None) -> lock.Platform:
    """The platform of a device, with another Python than its usual one where `python` names one.

    Raises:
        UsageError: this machine's own Python is one that no lock is for.
    """
    from runtime.errors import UsageError

    if device != THIS_MACHINE:
        usual = DEVICES[device]
        name = re.sub(r"Python [\d.]+", f"Python {python}", usual.name) if python else usual.name
        return replace(usual, name=name, python=python or usual.python)
    python = python or "{}.{}".format(*sys.version_info)
    if python not in PYTHONS:
        raise UsageError(f"this is Python {python}, the locks are for {', '.join(PYTHONS)}: name one of them with --python")
    return lock.Platform(f"this machine, Python {python}", python, ())


def lock_for(platform: lock.Platform) -> lock.Lock:
    """The lock that has a platform's Python."""
    (found,) = (one for one in lock.LOCKS if one.name == PYTHONS[platform.python])
    return found


def interpreter(platform: lock.Platform) -> str | None:
    """An interpreter of this machine that can run what is made for a platform; None where there is none."""
    systems = {re.sub(r"^manylinux(_\d+_\d+|\d+)_", "linux_", tag) for tag in platform.tags}
    if systems and sysconfig.get_platform().replace("-", "_") not in systems:
        return None
    try:
        return lock.find_python(platform.python)
    except lock.LockError:
        return None


def make(folder: Path, platform: lock.Platform, bundle: Path | None = None) -> DeviceRuntime:
    """Fills an empty folder.

    Args:
        bundle: must give the same tokens before and after trimming.

    Raises:
        InstallError: the packages cannot be installed, or the runtime does not start or answers otherwise.
        UsageError: `bundle` is given and the platform is not one that this machine can run.
    """
    from runtime.errors import UsageError
    from tools.trimming import InstallError, Package, folder_bytes, imported, trim

    python = interpreter(platform)
    if bundle is not None and python is None:
        raise UsageError(f"--bundle: nothing on this machine runs what is made for {platform.name}: leave it out, and ask on the device")
    _say(f"installing {lock_for(platform).file.name} for {platform.name}")
    install(folder, platform, python)
    stay, how = _find_imported(folder, platform, python)
    before = _answer(python, bundle, folder, lock.ROOT)
    packages = trim(folder, stay)
    own = folder / "runtime"
    shutil.copytree(lock.ROOT / "runtime", own, ignore=shutil.ignore_patterns("__pycache__", "ruff.toml"))
    shutil.copy(lock.ROOT / "LICENSE", own / "LICENSE")
    packages.append(Package("this repository's runtime", "", folder_bytes(own), folder_bytes(own)))
    if python is not None:
        _say("starting the trimmed runtime")
        imported(python, folder)
        how = f"checked: Python {platform.python} imports all of it with nothing else on its path"
        if _answer(python, bundle, folder) != before:
            raise InstallError("the trimmed runtime gives another answer than the untrimmed one: report it")
        how += f", and answers from {bundle} with the tokens {before}" if bundle else ""
    _write_contents(folder, platform, packages)
    return DeviceRuntime(tuple(packages), folder_bytes(folder), how)


def install(folder: Path, platform: lock.Platform, python: str | None) -> None:
    """Installs what the platform's lock pins into `folder`, as wheels and nothing besides.

    Raises:
        InstallError: no index answers, or it has no such wheels.
    """
    from tools.trimming import InstallError

    requirements = ["--requirement", str(lock_for(platform).file)]
    try:
        lock.pip_install(["--target", str(folder), "--no-deps", "--no-compile", *requirements], platform, python or sys.executable)
    except lock.IndexUnreachableError as error:
        raise InstallError(f"{error}; connect to the network, or name a package index that answers with PIP_INDEX_URL") from error
    except lock.LockError as error:
        raise InstallError(f"{lock_for(platform).file.name} cannot be installed for {platform.name}: {error}") from error


def kind() -> Kind:
    """What may be replaced: a folder that this command made, with nothing of anyone else's in it."""
    from export.staging import Kind

    def own(directory: Path) -> set[str] | None:
        try:
            contents = json.loads((directory / CONTENTS_FILE).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        entries = contents.get("entries") if isinstance(contents, dict) else None
        return {CONTENTS_FILE, "__pycache__", *map(str, entries)} if isinstance(entries, list) else None

    return Kind("device runtime", own)


def _find_imported(folder: Path, platform: lock.Platform, python: str | None) -> tuple[frozenset[str], str]:
    """Names of the distributions that the runtime imports, and how that was found out."""
    from tools.trimming import imported

    if python is not None:
        return imported(python, folder, lock.ROOT), ""
    try:
        host = lock.find_python(platform.python)
    except lock.LockError:
        host = sys.executable
    here = lock.Platform(f"this machine ({host})", platform.python, ())
    with tempfile.TemporaryDirectory() as copy:
        _say(f"installing the same versions for {here.name}, to find what the runtime imports")
        install(Path(copy), here, host)
        stay = imported(host, Path(copy), lock.ROOT)
    version = f"{sysconfig.get_platform()}, {host}"
    return stay, f"NOT checked: nothing here runs it. What stays is what the same versions import on this machine ({version})"


def _answer(python: str | None, bundle: Path | None, *folders: Path) -> str:
    from tools.trimming import run_isolated

    return run_isolated(python, ANSWER, bundle.resolve(), *folders).strip() if python and bundle else ""


def _write_contents(folder: Path, platform: lock.Platform, packages: Sequence[Package]) -> None:
    """Says in the folder what it is, so that the next build knows it as its own."""
    contents = {
        "platform": platform.name, "python": platform.python, "lock": lock_for(platform).name,
        "entries": sorted(path.name for path in folder.iterdir()),
        "packages": {lock.normal(p.name): p.version for p in packages if p.trimmed_bytes and p.version},
    }  # fmt: skip
    (folder / CONTENTS_FILE).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(args: argparse.Namespace) -> int:
    from export.staging import check_destination, staged
    from runtime.manifest import read_manifest
    from runtime.units import format_bytes
    from tools.trimming import table

    platform = choose_platform(args.device, args.python)
    if args.bundle is not None:
        read_manifest(args.bundle)  # what is wrong with it is told before anything is installed
    check_destination(args.output, kind())
    with staged(args.output, kind()) as folder:
        made = make(folder, platform, args.bundle)
    print(f"the runtime for {platform.name}, from requirements/{lock_for(platform).file.name}")
    print("\n".join(table(made.packages)))
    print(f"{args.output}: {format_bytes(made.total_bytes)} in all\n{made.checked}")
    print(f"use it: PYTHONPATH={args.output} python3 -m runtime.generate --bundle BUNDLE --image FILE --prompt TEXT")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the folder and prints its sizes."""
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
