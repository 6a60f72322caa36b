"""The builder's child process: what it hands back, and what is said when it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.engines.tensorrt_builder import EngineSpec, partial_name
from runtime.engines.tensorrt_process import build_in_child
from runtime.errors import EngineError, UsageError
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes end by signals on POSIX systems")
FAKE = """
from tests.runtime.fake_tensorrt import fake_library, recorded
key = next(key for key in recorded() if key.startswith("tensorrt_rtx"))
globals().update(fake_library(key, recorded()[key]).__dict__, __name__="tensorrt_rtx")
"""


def library(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `code` the module tensorrt_rtx of child processes."""
    folder.joinpath("libraries").mkdir()
    folder.joinpath("libraries", "tensorrt_rtx.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(folder / "libraries"), str(ROOT), *sys.path])


def spec(folder: Path, capabilities: tuple[int, ...] = (86,), onnx: str = "refused.onnx") -> EngineSpec:
    folder.joinpath("out").mkdir(exist_ok=True)
    return EngineSpec("post_ecl", str(folder / onnx), str(folder / "out" / "post_ecl.engine"), "tensorrt_rtx", capabilities)


def test_errors_of_the_child_are_raised_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(tmp_path, FAKE, monkeypatch)
    with pytest.raises(EngineError, match="cannot build post_ecl: the operator NonZero of node 3"):
        build_in_child(spec(tmp_path))
    with pytest.raises(UsageError, match="builds no engine for SM11"):
        build_in_child(spec(tmp_path, (11,), "good.onnx"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
         "the builder of post_ecl was killed .*: most likely the system ran out of memory; .* smaller precision, and compile again"),
        ("import os; print('free(): invalid pointer', flush=True); os.abort()",
         r"the builder of post_ecl \(tensorrt_rtx\) ended with signal 6.*: free\(\): invalid pointer; compile again"),
        ("raise KeyError('no such table')", r"the builder of post_ecl \(tensorrt_rtx\) ended with exit code 1.*KeyError: 'no such table'"),
    ],
    ids=["killed", "crashed", "raised"],
)  # fmt: skip
def test_a_child_that_dies_is_an_error_that_names_the_graph(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(tmp_path, code, monkeypatch)
    with pytest.raises(EngineError, match=message):
        build_in_child(spec(tmp_path))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_child_is_told_with_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc to read a process's memory from")
    code = "import os, signal, time; block = bytearray(200 << 20); time.sleep(0.6); os.kill(os.getpid(), signal.SIGKILL)"
    library(tmp_path, code, monkeypatch)
    with pytest.raises(EngineError, match=r"was killed at 2[1-9]\d\.\d MB of memory, of \d+\.\d [MG]B free"):
        build_in_child(spec(tmp_path))


def test_what_a_killed_child_had_written_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = repr(str(tmp_path / "out"))
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom runtime.engines.tensorrt_builder import partial_name\n"
        f"Path({partial}, partial_name('post_ecl.engine', os.getpid())).write_bytes(b'half')\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    library(tmp_path, code, monkeypatch)
    with pytest.raises(EngineError, match="was killed"):
        build_in_child(spec(tmp_path))
    assert list((tmp_path / "out").iterdir()) == []
    assert partial_name("post_ecl.engine", 7) == ".post_ecl.engine.7.part"


def test_the_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text(
        f"import os, time\nfrom pathlib import Path\nPath({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "from runtime.engines.tensorrt_builder import EngineSpec\nfrom runtime.engines.tensorrt_process import build_in_child\n"
        "build_in_child(EngineSpec('post_ecl', 'x.onnx', 'x.engine', 'tensorrt_rtx', (86,)))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        number = _wait_for(tmp_path / "pid")
    finally:
        parent.kill()
        parent.wait()
    assert _ends(number, 10.0)


def _wait_for(path: Path) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError("the child did not start")


def _ends(process: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{process}/stat")
        if stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z":  # ended, and nobody has asked yet
            return True
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    return False
