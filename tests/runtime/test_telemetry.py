"""The engine library reports nothing and writes nothing outside, unless its user wants it to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.engines.telemetry import SWITCH, without_telemetry
from tests.conftest import ROOT

# CI is one of the things that the library itself takes as a reason to be silent.
SILENCING = (SWITCH, "CI", "TF_BUILD", "GITHUB_ACTIONS", "XDG_CACHE_HOME")
ASK = "import sys; from runtime import load; load(sys.argv[1]).generate('read row 2.', max_new_tokens=2)"


def test_an_answer_writes_nothing_into_the_home_directory(tiny_bundle: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in SILENCING} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-B", "-c", ASK, str(tiny_bundle)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("value", [None, "0", "1"])
def test_the_environment_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv(SWITCH, raising=False)
    else:
        monkeypatch.setenv(SWITCH, value)
    before = dict(os.environ)
    with without_telemetry():
        assert os.environ[SWITCH] == (value or "1"), "who sets it decides"
    assert dict(os.environ) == before
