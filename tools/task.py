"""One command for each chore, on every platform: makes `.venv` from the lock where needed, then works inside it.

    python -m tools.task demo|calibrate-demo|test|check|format|lock-check|setup [further arguments for the tool]

`make NAME` is the same. Needs nothing but Python and pip. Old Pythons read this file too, to be told what is needed: keep
its syntax within Python 3.7.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "dev.txt"
OLDEST = (3, 11)
# Tried in this order, after the interpreter that runs this file: the first two are what the lock was made and is tested for.
CANDIDATES = ("python3.11", "python3.12", "python3.13", "python3", "python")

CHECKS = (
    (("-m", "ruff", "format", "--check", "."), "`make format` or `python -m tools.task format` mends it"),
    (("-m", "ruff", "check", "."), "lint and the import rule; `python -m tools.task format` mends what can be mended"),
    (("-m", "mypy"), "types"),
)
HELP = {
    "setup": "make or update .venv",
    "demo": "build the shipped model, ask it about a picture, show what was kept",
    "calibrate-demo": "find layer and budget of the shipped model, build with them, show what pruning cost",
    "test": "everything `check` does, then the tests; further arguments go to pytest",
    "check": "formatting, lint, the import rule, types",
    "format": "mend formatting, import order and what else ruff can mend",
    "lock-check": "ask the package index whether the locks still resolve as wheels",
}


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one task.

    Returns:
        The exit status of the task; 2 where the environment cannot be made.
    """
    args = build_parser().parse_args(argv)
    try:
        python = Path(sys.executable) if args.no_venv else prepare(ROOT / ".venv")
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return run_task(python, args.task, args.arguments)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    tasks = "\n".join(f"  {name:<15} {text}" for name, text in HELP.items())
    parser = argparse.ArgumentParser(
        prog="python -m tools.task", description="tasks:\n" + tasks, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-venv", action="store_true", help="use the Python that runs this, and install nothing")
    parser.add_argument("task", choices=sorted(HELP), metavar="task")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="further arguments for the task's tool")
    return parser


def run_task(python: Path, task: str, arguments: Sequence[str] = ()) -> int:
    """Runs one task with `python`, an interpreter that has what the lock names, and returns its exit status."""
    if task in ("check", "test"):
        status = check(python)
        if status or task == "check":
            return status
    if task == "test":
        return run(python, "-m", "pytest", *arguments)
    if task == "format":
        return run(python, "-m", "ruff", "check", "--fix-only", ".") or run(python, "-m", "ruff", "format", ".")
    if task == "demo":
        return run(python, "-m", "tiny_llava.demo", *arguments)
    if task == "calibrate-demo":
        return run(python, "-m", "tiny_llava.calibrate_demo", *arguments)
    if task == "lock-check":
        return run(python, "-m", "tools.lock", "check", *arguments)
    return 0


def check(python: Path) -> int:
    """Runs every check, the ones after a failure too, and returns 0 if all passed."""
    failed = [f"{' '.join(command[1:])} ({hint})" for command, hint in CHECKS if run(python, *command)]
    for line in failed:
        print(f"check failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def run(python: Path, *arguments: str) -> int:
    """Runs Python in the repository's root with the output going straight through; returns the exit status."""
    print(f"$ python {' '.join(arguments)}", file=sys.stderr, flush=True)
    try:
        return subprocess.run([str(python), *arguments], cwd=str(ROOT), check=False).returncode
    except KeyboardInterrupt:
        return 130


def prepare(venv: Path) -> Path:
    """Makes `venv` or brings it up to the lock; does nothing where it is.

    Returns:
        Its interpreter.

    Raises:
        SetupError: no Python is new enough, or an installation failed.
    """
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = venv / "installed.txt"
    wanted = f"{fingerprint([LOCK, ROOT / 'pyproject.toml'])} {ROOT}\n"
    if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    if (version_of(str(python)) or (0, 0)) < OLDEST:
        make_venv(venv, find_python())
    stamp.write_text("unfinished\n", encoding="utf-8")  # an installation that is stopped half way is begun again
    print(f"installing {LOCK.relative_to(ROOT)} into {venv}: a minute or two, once", file=sys.stderr, flush=True)
    for arguments in (("-r", str(LOCK)), ("--no-deps", "--no-build-isolation", "--editable", str(ROOT))):
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        if subprocess.run(pip, cwd=str(ROOT), check=False).returncode:
            raise SetupError(f"{' '.join(pip[1:])} failed; its message stands above. Deleting {venv} starts afresh")
    stamp.write_text(wanted, encoding="utf-8")
    return python


def make_venv(venv: Path, python: str) -> None:
    """Makes a fresh virtual environment, in place of whatever stands there."""
    print(f"making {venv} with {python}", file=sys.stderr, flush=True)
    if venv.exists():
        shutil.rmtree(str(venv))
    try:
        subprocess.run([python, "-m", "venv", str(venv)], check=True)
    except BaseException as error:
        shutil.rmtree(str(venv), ignore_errors=True)  # half an environment would look like a whole one
        if not isinstance(error, subprocess.CalledProcessError):
            raise
        raise SetupError(f"{python} -m venv failed; on Debian and Ubuntu, apt-get install python3-venv brings it") from error


def find_python() -> str:
    """The first interpreter that is new enough: this one, else one on the PATH.

    Raises:
        SetupError: there is none.
    """
    seen = []
    for candidate in candidates():
        version = version_of(candidate)
        if version is not None and version >= OLDEST:
            return candidate
        if version is not None:
            seen.append(f"{candidate} is {version[0]}.{version[1]}")
    raise SetupError(
        f"this needs Python {OLDEST[0]}.{OLDEST[1]} or later, and found {'; '.join(seen)}: install python3.11 and run it again"
    )


def candidates() -> Iterator[str]:
    """This interpreter and what the PATH offers."""
    yield sys.executable
    for name in CANDIDATES:
        path = shutil.which(name)
        if path:
            yield path


def version_of(python: str) -> tuple[int, int] | None:
    """Major and minor version of an interpreter; None where it does not run (a pyenv shim for a version not chosen, say)."""
    try:
        done = subprocess.run(
            [python, "-c", "import sys; print(sys.version_info[0], sys.version_info[1])"],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None
    words = done.stdout.split()
    return (int(words[0]), int(words[1])) if done.returncode == 0 and len(words) == 2 else None


def fingerprint(files: Sequence[Path]) -> str:
    """One SHA-256 over the contents of `files`."""
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(b"%d\n" % len(content) + content)
    return digest.hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
