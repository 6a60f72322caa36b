"""Builds that cannot go on: no space, Ctrl-C, a kill, another build. What was there stays, what was begun goes.

In one process with errors put in, and with real processes, signals and limits.
"""

from __future__ import annotations

import errno
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export import build, publish
from export.weights import WeightFile
from runtime import generate
from runtime.chain import EngineChain
from runtime.names import MANIFEST_FILE
from tests.conftest import ROOT
from tests.site import Refused, Site, changes, said, tree

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and resource limits as POSIX has them")


# ---------------------------------------------------------------- no space left


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def after(calls: int, original: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    """`original` for a number of calls, `then` from there on."""
    left = [calls]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        return (original if left[0] >= 0 else then)(*args, **kwargs)

    return call


def test_too_little_space_is_told_before_anything_is_written(site: Site, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    refused(build, site.build("--keep", "4"), "has 0.00 GB free, the bundle needs 0.00 GB: free some space or choose another --output")


@pytest.mark.parametrize("output", ["bundle", "new"])
@pytest.mark.parametrize(
    ("owner", "method", "calls"),
    [
        ("export.weights.WeightFile", "_write", 0),
        ("export.weights.WeightFile", "_write", 30),
        ("export.graphs.builder.GraphBuilder", "save", 1),
        ("pathlib.Path", "write_text", 0),
        ("pathlib.Path", "write_text", 6),
        ("os", "replace", 0),
    ],
)
def test_a_disk_that_fills_up_loses_nothing(
    site: Site, refused: Refused, monkeypatch: pytest.MonkeyPatch, owner: str, method: str, calls: int, output: str
) -> None:
    holder = pkgutil.resolve_name(owner)
    monkeypatch.setattr(holder, method, after(calls, getattr(holder, method), no_space))
    if method == "replace":
        monkeypatch.setattr(publish, "exchange", no_space)
    told = refused(build, site.build("--keep", "4", output=output), "No space left on device; free some space and build again")
    assert len(told.before) > 5, "the plan was printed before"


def test_a_place_that_refuses_directories_is_named(site: Site, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    refused(build, site.build("--keep", "4", output="new/bundle"), "Permission denied; choose a writable --output and build again")


# ---------------------------------------------------------------- Ctrl-C


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("output", ["bundle", "new"])
@pytest.mark.parametrize("calls", [0, 1, 40])
def test_an_interrupted_build_leaves_everything_as_it_was(
    site: Site, refused: Refused, monkeypatch: pytest.MonkeyPatch, calls: int, output: str
) -> None:
    monkeypatch.setattr(WeightFile, "add", after(calls, WeightFile.add, interrupt))
    refused(build, site.build("--keep", "4", output=output), "interrupted; .* what was there before is unchanged")


def test_an_interrupted_answer_ends_in_one_line(site: Site, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineChain, "decode", after(1, EngineChain.decode, interrupt))
    assert generate.main(site.ask("--image", str(site.image))) == 2
    said(capfd.readouterr().err, "python -m runtime.generate")


# ---------------------------------------------------------------- real processes

# A build that says "half way" at its 40th tensor and waits for a line on stdin.
DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
from export import build, publish
from export.weights import WeightFile
add, count = WeightFile.add, 0
def counted(self, name, array):
    global count
    count += 1
    if count == 40:
        print("half way", flush=True)
        sys.stdin.readline()
    return add(self, name, array)
WeightFile.add = counted
sys.exit(build.main(sys.argv[1:]))
"""
LIMITED = """
import resource, sys
from export import build, publish
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
sys.exit(build.main(sys.argv[1:]))
"""


@contextmanager
def half_way(argv: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A real build that has written half of its tensors and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *argv], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "half way\n", process.communicate()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


@POSIX
@pytest.mark.parametrize("output", ["bundle", "new"])
def test_a_real_interrupt_half_way(site: Site, output: str) -> None:
    before = tree(site.folder)
    with half_way(site.build("--keep", "4", output=output)) as process:
        assert changes(before, tree(site.folder)), "it is writing somewhere"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said(stderr, "python -m export.build").error.startswith("interrupted; ")
    assert changes(before, tree(site.folder)) == []


def test_two_real_builds_into_one_directory(site: Site, refused: Refused, capfd: pytest.CaptureFixture[str]) -> None:
    with half_way(site.build("--keep", "3")) as process:
        refused(build, site.build("--keep", "5"), "another build is writing .*bundle: wait for it, or choose another --output")
        assert build.main(site.build("--keep", "5", output="other")) == 0
        _, stderr = process.communicate("go on\n", timeout=60)
    assert process.returncode == 0, stderr
    assert json.loads((site.bundle / MANIFEST_FILE).read_text())["budgets"] == [3]
    assert {path.name for path in site.folder.iterdir()} == {"bundle", "checkpoint", "other", "scene.png"}
    assert generate.main(site.ask("--image", str(site.image), "--keep", "3")) == 0
    del capfd


def test_a_killed_build_is_cleared_by_the_next(site: Site) -> None:
    before = tree(site.folder)
    with half_way(site.build("--keep", "3")) as process:
        process.kill()
        process.communicate()
    left = changes(before, tree(site.folder))
    assert left
    assert not any(name.startswith("bundle") for name in left), "the earlier bundle is whole"
    assert build.main(site.build("--keep", "3")) == 0
    assert {path.name for path in site.folder.iterdir()} == {"bundle", "checkpoint", "scene.png"}
    assert json.loads((site.bundle / MANIFEST_FILE).read_text())["budgets"] == [3]


@POSIX
def test_a_real_limit_on_file_sizes(site: Site) -> None:
    before = tree(site.folder)
    command = [sys.executable, "-c", LIMITED, *site.build("--keep", "4")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "cannot write" in said(done.stderr, "python -m export.build").error
    assert "File too large" in done.stderr
    assert changes(before, tree(site.folder)) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_that_takes_nothing_is_one_line(site: Site) -> None:
    command = [sys.executable, "-m", "runtime.generate", *site.ask()]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "python -m runtime.generate: error: cannot write the output: No space left on device"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
