"""The tasks behind `make`, and the lock tool, without installing anything."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools import lock, task

MACHINE = lock.Platform("this machine", "3.11", ())


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, tuple[int, int] | None]], None]:
    """Makes the machine have these interpreters and no others."""

    def pretend(pythons: dict[str, tuple[int, int] | None]) -> None:
        monkeypatch.setattr(task, "candidates", lambda: iter(pythons))
        monkeypatch.setattr(task, "version_of", lambda python: pythons.get(python))

    return pretend


def test_old_pythons_can_read_the_file_that_tells_them_they_are_too_old() -> None:
    ast.parse((ROOT / "tools" / "task.py").read_text(encoding="utf-8"), feature_version=(3, 7))


def test_the_first_python_that_is_new_enough_is_taken(versions: Callable[..., None]) -> None:
    versions({"/usr/bin/python3": (3, 10), "/shims/python3.11": None, "/opt/python3.12": (3, 12), "/opt/python3.13": (3, 13)})
    assert task.find_python() == "/opt/python3.12"


def test_without_a_new_python_one_line_says_what_was_found_and_what_is_needed(
    versions: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions({"/usr/bin/python3": (3, 10)})
    monkeypatch.setattr(task, "ROOT", tmp_path)
    monkeypatch.setattr(task, "fingerprint", lambda files: "any")
    assert task.main(["test"]) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(
        r"error: this needs Python 3\.11 or later, and found /usr/bin/python3 is 3\.10: install python3\.11 and run it again\n", message
    )


def test_an_environment_that_matches_the_lock_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    python.parent.mkdir()
    python.touch()
    installed: list[list[str]] = []

    class Done:
        returncode = 0

    def pretend(command: list[str], **_: object) -> Done:
        installed.append(command)
        return Done()

    monkeypatch.setattr("tools.task.subprocess.run", pretend)
    monkeypatch.setattr(task, "version_of", lambda _: (3, 11))
    assert task.prepare(tmp_path) == python
    assert len(installed) == 2, "the lock, then the project itself"
    task.prepare(tmp_path)
    assert len(installed) == 2
    monkeypatch.setattr(task, "fingerprint", lambda files: "another lock")
    task.prepare(tmp_path)
    assert len(installed) == 4


def test_a_failed_installation_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        returncode = 1

    monkeypatch.setattr("tools.task.subprocess.run", lambda command, **_: Failed())
    monkeypatch.setattr(task, "version_of", lambda _: (3, 11))
    for _ in range(2):
        with pytest.raises(task.SetupError, match=r"pip install .*dev\.txt failed"):
            task.prepare(tmp_path)


def test_check_runs_every_check_and_names_the_failed_ones(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[tuple[str, ...]] = []

    def pretend(_: Path, *arguments: str) -> int:
        ran.append(arguments)
        return int("format" in arguments)

    monkeypatch.setattr(task, "run", pretend)
    assert task.run_task(Path("python"), "test") == 1
    assert ran == [command for command, _ in task.CHECKS], "tests do not run where a check failed"
    assert capsys.readouterr().err.startswith("check failed: ruff format --check . (`make format`")


def test_each_make_target_is_a_task() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^([\w -]+):\n\t@\$\(PYTHON\) -m tools\.task \$@", makefile, re.MULTILINE)
    assert set(targets.split()) == set(task.HELP)


def test_a_lock_that_leaves_a_dependency_unpinned_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "FOLDER", tmp_path)
    monkeypatch.setattr(lock, "ROOT", tmp_path)
    (tmp_path / "some.txt").write_text("# comment\nJinja2==3.1.6\n", encoding="utf-8")
    monkeypatch.setattr(lock, "resolve", lambda *_: {"jinja2": "3.1.6", "markupsafe": "3.0.4"})
    with pytest.raises(lock.LockError, match=r"some\.txt for this machine leaves markupsafe unpinned"):
        lock.check_one(lock.Lock("some", "", (), MACHINE, ()), MACHINE)


def test_an_index_that_does_not_answer_is_told_from_a_lock_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(lock.IndexUnreachableError, match="no package index answered"):
        lock.resolve(["entropy-prune-no-such-package==1"], MACHINE, sys.executable)
    with pytest.raises(lock.LockError, match="no-such-package") as caught:
        lock.resolve(["--no-index", "entropy-prune-no-such-package==1"], MACHINE, sys.executable)
    assert not isinstance(caught.value, lock.IndexUnreachableError)
