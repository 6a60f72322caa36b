"""`kill -9` at any point of a build: the old bundle or the new one is there, whole, and the next build leaves nothing behind.

Where directories cannot be exchanged in one step there is one moment between two renames; those points are made by refusing it.

One process imports everything once and forks a build for each point, which kills itself at the n-th call of a function.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from export import build
from export.publish import exchange
from export.weights import WeightFile
from runtime.errors import BundleError
from runtime.manifest import check_files, read_manifest
from runtime.names import MANIFEST_FILE
from runtime.pipeline import load
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked and killed as POSIX has it")

OLD, NEW = (4, 2), (3,)  # budgets of the two bundles
DRIVER = """
import json, os, pkgutil, signal, sys
from export import build, plan, publish, report, staging, text_files
from export.graphs import clip, decoder, score

def die_at(name, number, when):
    owner, _, method = name.rpartition(".")
    holder = pkgutil.resolve_name(owner)
    original, calls = getattr(holder, method), 0
    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(holder, method, call)

for line in sys.stdin:
    name, number, when, argv = json.loads(line)
    child = os.fork()
    if not child:
        if name == "os.replace":  # is called where two directories cannot be exchanged
            publish._system_call = lambda: None
        die_at(name, number, when)
        os._exit(build.main(argv))
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""
ADD, SAVE, TEXT = "export.weights.WeightFile.add", "export.graphs.builder.GraphBuilder.save", "pathlib.Path.write_text"
POINTS = [
    *((ADD, number, "before") for number in (1, 2, 9, 20, 33, 47, 60)),
    *((SAVE, number, when) for number in (1, 2, 4) for when in ("before", "after")),
    *((TEXT, number, when) for number in (1, 4, 6, 7) for when in ("before", "after")),
    ("pathlib.Path.mkdir", 2, "after"),
    ("export.publish.exchange", 1, "before"),
    ("export.publish.exchange", 1, "after"),
    ("os.replace", 1, "before"),
    ("os.replace", 1, "after"),
    ("os.replace", 2, "before"),
    ("os.replace", 2, "after"),
    *(("os.unlink", number, "after") for number in (1, 5, 12)),
    ("pathlib.Path.unlink", 1, "before"),
    ("pathlib.Path.unlink", 1, "after"),
]
EXCHANGED = ("export.publish.exchange", 1, "after")
SET_ASIDE = {("os.replace", 1, "after"), ("os.replace", 2, "before")}


@pytest.fixture(scope="module")
def killed(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str], Path]:
    """For each point a folder with an earlier bundle, in which a build was killed at that point."""
    root = tmp_path_factory.mktemp("killed")
    folders = {point: root / str(number) for number, point in enumerate(POINTS)}
    lines = []
    for point, folder in folders.items():
        shutil.copytree(tiny_bundle, folder / "bundle")
        lines.append(json.dumps([*point, arguments(tiny_checkpoint, folder)]))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=ROOT, input="\n".join(lines), capture_output=True, text=True, timeout=300, check=True
    )
    ends = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    assert ends == [signal.SIGKILL] * len(POINTS), "each build got to its point"
    return folders


def arguments(checkpoint: Path, folder: Path) -> list[str]:
    return ["--model", "llava15", "--checkpoint", str(checkpoint), "--output", str(folder / "bundle"), "--keep", "3"]


def exchanges(folder: Path) -> bool:
    """Whether directories can be exchanged here."""
    one, other = folder / "one", folder / "other"
    one.mkdir()
    other.mkdir()
    return exchange(one, other)


def budgets(bundle: Path) -> tuple[int, ...]:
    """The budgets of a bundle that is whole."""
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    assert {path.name for path in bundle.iterdir()} == {*manifest.files, "bundle.json", "report.json"}
    return manifest.budgets


@pytest.mark.parametrize("point", POINTS, ids=["-".join(map(str, p)).rpartition(".")[2] for p in POINTS])
def test_a_build_that_is_killed_leaves_a_whole_bundle(
    killed: dict[tuple[str, int, str], Path], tiny_checkpoint: Path, tmp_path: Path, point: tuple[str, int, str]
) -> None:
    folder = tmp_path / "site"
    shutil.copytree(killed[point], folder)
    bundle = folder / "bundle"
    if point in SET_ASIDE:
        assert not bundle.exists()
        assert budgets(folder / ".bundle.previous") == OLD
    else:
        published = point[0].endswith("unlink") or point == ("os.replace", 2, "after") or (point == EXCHANGED and exchanges(tmp_path))
        assert budgets(bundle) == (NEW if published else OLD)
    assert build.main(arguments(tiny_checkpoint, folder)) == 0
    assert budgets(bundle) == NEW
    assert [path.name for path in folder.iterdir()] == ["bundle"], "nothing is left behind"


@pytest.mark.parametrize("point", sorted(SET_ASIDE), ids=["after the first rename", "before the second"])
def test_a_bundle_that_was_set_aside_comes_back_even_if_the_next_build_fails(
    killed: dict[tuple[str, int, str], Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: tuple[str, int, str],
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "site"
    shutil.copytree(killed[point], folder)
    monkeypatch.setattr(WeightFile, "add", interrupt)
    assert build.main(arguments(tiny_checkpoint, folder)) == 2
    assert budgets(folder / "bundle") == OLD
    assert [path.name for path in folder.iterdir()] == ["bundle"]


def test_half_a_bundle_would_be_noticed(killed: dict[tuple[str, int, str], Path]) -> None:
    """The control: what a killed build had written so far is no bundle."""
    partial = killed[ADD, 47, "before"] / ".bundle.partial"
    assert any(partial.iterdir())
    assert not (partial / MANIFEST_FILE).exists()
    with pytest.raises(BundleError, match=r"holds no bundle\.json"):
        load(partial)
