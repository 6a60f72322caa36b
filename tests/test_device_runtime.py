"""The folder for a device: what stays in it, what it replaces, and (with a package index) that a runtime so small answers."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.errors import EntropyPruneError
from tests.conftest import ROOT
from tests.site import changes, said, tree
from tools import device_runtime, lock, trimming

PROGRAM = "python -m tools.device_runtime"
LIMIT_BYTES = 150_000_000
# A runtime that imports a package of another name than its distribution, and one package that nothing imports.
RUNTIME = {"runtime/__init__.py": "", "runtime/deep/__init__.py": "", "runtime/deep/part.py": "import wanted, onnxruntime.capi\n"}
PACKAGES = {
    "Wanted_Dist-1.0": {"wanted/__init__.py": "1", "wanted/tests/test_it.py": "22", "wanted/a.pyc": "333", "wanted/tests.py": "4444"},
    "onnxruntime-2.0": {
        "onnxruntime/__init__.py": "", "onnxruntime/capi/__init__.py": "", "onnxruntime/capi/libonnxruntime.so.2.0": "library",
        "onnxruntime/capi/state.so": "module",
    },
    "unwanted-3.0": {"unwanted/__init__.py": "raise ImportError", "unwanted/deep/data.bin": "0" * 100},
}  # fmt: skip


def install(site: Path, packages: dict[str, dict[str, str]]) -> None:
    """Puts packages there as pip does, with a record of their files."""
    for name, files in packages.items():
        info = f"{name}.dist-info"
        listed = {**files, f"{info}/METADATA": "", f"{info}/licenses/LICENSE": "mine"}
        for path, content in listed.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(content)
        with (site / info / "RECORD").open("w", newline="") as file:
            csv.writer(file).writerows([path, "", ""] for path in (*listed, f"{info}/RECORD", "../../bin/command", "gone.py"))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """An installation with the three packages, in a folder two levels above which there are commands of someone else's."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "command").write_text("not ours")
    site = tmp_path / "lib" / "site"
    install(site, PACKAGES)
    (site / "bin").mkdir()
    (site / "bin" / "command").write_text("pip's copy")
    return site


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with the runtime of `RUNTIME`."""
    for name, content in RUNTIME.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(content)
    return tmp_path / "own"


# ---------------------------------------------------------------- the rule


def test_what_stays_is_found_by_importing_every_module(site: Path, own: Path) -> None:
    assert trimming.imported(sys.executable, site, own) == {"wanted-dist", "onnxruntime"}


def test_an_import_that_fails_names_the_module(site: Path, own: Path) -> None:
    (own / "runtime" / "deep" / "part.py").write_text("import unwanted_elsewhere")
    with pytest.raises(trimming.InstallError, match="ModuleNotFoundError: No module named 'unwanted_elsewhere'") as caught:
        trimming.imported(sys.executable, site, own)
    assert "\n" not in str(caught.value)


def test_packages_of_this_environment_are_out_of_sight(site: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "runtime" / "deep" / "part.py").write_text("import numpy")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with pytest.raises(trimming.InstallError, match="No module named 'numpy'"):
        trimming.imported(sys.executable, site, own)


def test_tests_bytecode_commands_and_packages_that_nothing_imports_go(site: Path) -> None:
    packages = trimming.trim(site, {"wanted-dist", "onnxruntime"})
    left = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    infos = [f"{name}.dist-info/{file}" for name in list(PACKAGES)[:2] for file in ("METADATA", "RECORD", "licenses/LICENSE")]
    assert left == {
        "wanted/__init__.py", "wanted/tests.py", "onnxruntime/__init__.py", "onnxruntime/capi/__init__.py", "onnxruntime/capi/state.so",
        *infos,
    }  # fmt: skip
    assert not [path for path in site.rglob("*") if path.is_dir() and not any(path.iterdir())], "no empty folders"
    sizes = {package.name: package for package in packages}
    assert sizes["Wanted_Dist"].bytes - sizes["Wanted_Dist"].trimmed_bytes == len("22" + "333")
    assert sizes["unwanted"].bytes > 100
    assert sizes["unwanted"].trimmed_bytes == sizes["files of no package"].trimmed_bytes == 0
    assert sum(package.trimmed_bytes for package in packages) == trimming.folder_bytes(site)


def test_what_lies_outside_the_installation_is_left_alone(site: Path) -> None:
    """A record names commands relative to where they would be: two folders up there may be someone else's."""
    trimming.trim(site, {"wanted-dist"})
    assert (site.parents[1] / "bin" / "command").read_text() == "not ours"


def test_the_second_library_stays_where_another_library_names_it(site: Path) -> None:
    (site / "onnxruntime" / "capi" / "state.so").write_bytes(b"\x7fELF\0libonnxruntime.so.2\0")
    trimming.trim(site, {"wanted-dist", "onnxruntime"})
    assert (site / "onnxruntime" / "capi" / "libonnxruntime.so.2.0").exists()


def test_a_package_that_is_imported_and_not_installed_is_named(site: Path) -> None:
    before = tree(site)
    with pytest.raises(trimming.InstallError, match="the runtime imports pillow, which is not among the installed packages: refresh"):
        trimming.trim(site, {"wanted-dist", "pillow"})
    assert tree(site) == before


def test_the_table_shows_both_sizes_and_their_sums() -> None:
    lines = trimming.table([trimming.Package("numpy", "2.4", 57_400_000, 50_700_000), trimming.Package("hf_xet", "1.8", 11_700_000, 0)])
    assert [line.split() for line in lines] == [
        ["installed", "trimmed"], ["numpy", "2.4", "57.4", "MB", "50.7", "MB"], ["hf_xet", "1.8", "11.7", "MB", "-"],
        ["sum", "69.1", "MB", "50.7", "MB"],
    ]  # fmt: skip


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("device", "python", "name", "locked"),
    [
        ("jetpack-6.2", None, "Linux aarch64, Python 3.10 (JetPack 6)", "jetpack-6.2"),
        ("jetpack-7", None, "Linux aarch64, Python 3.12 (JetPack 7)", "runtime"),
        ("linux-aarch64", "3.13", "Linux aarch64, Python 3.13", "runtime"),
        ("linux-x86_64", "3.10", "Linux x86-64, Python 3.10", "jetpack-6.2"),
        ("this-machine", "3.12", "this machine, Python 3.12", "runtime"),
    ],
)
def test_a_device_and_its_python_choose_the_lock(device: str, python: str | None, name: str, locked: str) -> None:
    platform = device_runtime.choose_platform(device, python)
    assert (platform.name, device_runtime.lock_for(platform).name) == (name, locked)
    assert (platform.python in platform.name, bool(platform.tags)) == (True, device != "this-machine")


def test_every_python_of_the_list_has_a_lock() -> None:
    assert set(device_runtime.PYTHONS.values()) <= {one.name for one in lock.LOCKS}


def test_a_python_that_no_lock_is_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    with pytest.raises(EntropyPruneError, match=r"this is Python 3\.14, the locks are for 3\.10, 3\.11, 3\.12, 3\.13: name one of them"):
        device_runtime.choose_platform("this-machine", None)


@pytest.mark.parametrize(("system", "device"), [("linux-aarch64", "jetpack-7"), ("linux-x86_64", "linux-x86_64")])
def test_only_a_machine_of_its_kind_runs_what_is_made(monkeypatch: pytest.MonkeyPatch, system: str, device: str) -> None:
    monkeypatch.setattr("sysconfig.get_platform", lambda: system)
    monkeypatch.setattr(lock, "find_python", lambda version: f"python{version}")
    found = {name: device_runtime.interpreter(platform) for name, platform in device_runtime.DEVICES.items()}
    assert found[device] == f"python{device_runtime.DEVICES[device].python}"
    assert found["linux-x86_64" if device == "jetpack-7" else "jetpack-7"] is None


# ---------------------------------------------------------------- the folder


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[lock.Platform]:
    """A package index that has the three packages for every platform, and a runtime that needs them; what was installed for."""
    asked: list[lock.Platform] = []

    def pretend(arguments: list[str], platform: lock.Platform, _: str) -> None:
        asked.append(platform)
        install(Path(arguments[arguments.index("--target") + 1]), PACKAGES)

    monkeypatch.setattr(lock, "pip_install", pretend)
    return asked


@pytest.fixture
def small(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository's root is a folder with the runtime of `RUNTIME` and a licence."""
    (own / "LICENSE").write_text("licence")
    monkeypatch.setattr(lock, "ROOT", own)


@pytest.mark.usefixtures("small")
def test_the_folder_holds_the_runtime_and_what_it_needs(
    pip: list[lock.Platform], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "device"
    for _ in range(2):  # the second replaces the first
        assert device_runtime.main(["--output", str(output)]) == 0
        assert {path.name for path in output.iterdir()} == {
            "Wanted_Dist-1.0.dist-info", "device_runtime.json", "onnxruntime", "onnxruntime-2.0.dist-info", "runtime", "wanted",
        }  # fmt: skip
    assert (output / "runtime" / "LICENSE").read_text() == "licence"
    contents = json.loads((output / "device_runtime.json").read_text())
    assert contents["packages"] == {"wanted-dist": "1.0", "onnxruntime": "2.0"}
    out = capsys.readouterr().out.splitlines()
    assert out[-2:] == [
        f"checked: Python {contents['python']} imports all of it with nothing else on its path",
        f"use it: PYTHONPATH={output} python3 -m runtime.generate --bundle BUNDLE --image FILE --prompt TEXT",
    ]
    assert len(pip) == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.usefixtures("small")
def test_for_another_machine_the_same_versions_are_tried_here_and_the_output_says_so(
    pip: list[lock.Platform], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_platform", lambda: "linux-riscv64")
    assert device_runtime.main(["--output", str(tmp_path / "device"), "--device", "jetpack-6.2"]) == 0
    assert [bool(platform.tags) for platform in pip] == [True, False]
    assert not (tmp_path / "device" / "unwanted").exists()
    assert "NOT checked: nothing here runs it. What stays is what the same versions import on this machine" in capsys.readouterr().out


def broken(own: Path) -> None:
    (own / "runtime" / "deep" / "part.py").write_text("import nowhere")


def unreachable(_: Path) -> None:
    raise lock.IndexUnreachableError("no package index answered: ERROR: none")


def unresolved(_: Path) -> None:
    raise lock.LockError("No matching distribution found for numpy==9")


def full(_: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("small", "pip")
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (broken, "failed: ModuleNotFoundError: No module named 'nowhere'"),
        (unreachable, "no package index answered: ERROR: none; connect to the network, or name a package index .* PIP_INDEX_URL"),
        (unresolved, "txt cannot be installed for this machine, Python .*: No matching distribution found for numpy==9"),
        (full, "No space left on device; free some space and build again"),
    ],
)
def test_a_folder_that_cannot_be_made_is_one_line_and_changes_nothing(
    tmp_path: Path, own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, earlier: bool,
    fail: Callable[[Path], None], message: str,
) -> None:  # fmt: skip
    output, pip_install = tmp_path / "device", lock.pip_install
    if earlier:
        assert device_runtime.main(["--output", str(output)]) == 0

    def failing(arguments: list[str], platform: lock.Platform, python: str) -> None:
        pip_install(arguments, platform, python)
        fail(own)

    monkeypatch.setattr(lock, "pip_install", failing)
    before = tree(tmp_path)
    capsys.readouterr()
    assert device_runtime.main(["--output", str(output)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"{PROGRAM}: error: ")
    assert re.search(message, error), error
    assert [name for name in changes(before, tree(tmp_path)) if not name.startswith("own/")] == []


@pytest.mark.usefixtures("small")
def test_what_is_not_ours_is_left_alone(pip: list[lock.Platform], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "device"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    assert device_runtime.main(["--output", str(output)]) == 2
    assert "device exists and is not a device runtime; it is left alone: choose another" in said(capsys.readouterr().err, PROGRAM).error
    (output / "thesis.txt").unlink()
    assert device_runtime.main(["--output", str(output)]) == 0
    (output / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert device_runtime.main(["--output", str(output)]) == 2
    assert "holds notes.txt, which is not of the device runtime; it is left alone" in said(capsys.readouterr().err, PROGRAM).error
    assert len(pip) == 1, "it is told before anything is installed"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --output"),
        (["--output", "x", "--device", "pi"], "argument --device: invalid choice: 'pi'"),
        (["--output", "x", "--python", "3.9"], "argument --python: invalid choice: '3.9'"),
        (["--output", "x", "--bundle", "nowhere"], "nowhere is not a directory: name a bundle"),
    ],
)
def test_options_that_cannot_be_meant_are_told(
    pip: list[lock.Platform], argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert device_runtime.main(argv) == 2
    assert message in said(capsys.readouterr().err, PROGRAM).error
    assert pip == []


def test_an_answer_for_another_machine_is_refused(
    tiny_bundle: Path, tmp_path: Path, pip: list[lock.Platform], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_platform", lambda: "linux-riscv64")
    argv = ["--output", str(tmp_path / "device"), "--device", "jetpack-7", "--bundle", str(tiny_bundle)]
    assert device_runtime.main(argv) == 2
    assert "--bundle: nothing on this machine runs what is made for Linux aarch64" in said(capsys.readouterr().err, PROGRAM).error
    assert pip == []


@pytest.mark.usefixtures("small", "pip")
def test_another_answer_after_trimming_is_an_error(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["1 2 3", "1 2 4"])
    monkeypatch.setattr(device_runtime, "_answer", lambda *_: next(answers))
    folder = tmp_path / "device"
    folder.mkdir()
    with pytest.raises(trimming.InstallError, match="the trimmed runtime gives another answer"):
        device_runtime.make(folder, device_runtime.choose_platform("this-machine", None), tiny_bundle)


# ---------------------------------------------------------------- with a package index


@pytest.mark.network
def test_a_real_folder_is_small_and_answers_as_this_environment_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from export import build
    from runtime.pipeline import load

    if "{}.{}".format(*sys.version_info) not in device_runtime.PYTHONS:
        pytest.skip(f"no lock is for Python {sys.version_info}")
    bundle, output = tmp_path / "bundle", tmp_path / "device"
    assert build.main(["--model", "tiny-llava", "--target", "cpu", "--output", str(bundle)]) == 0
    code = device_runtime.main(["--output", str(output), "--bundle", str(bundle)])
    told = capfd.readouterr()
    if code and "no package index answered" in told.err:
        pytest.skip(told.err.splitlines()[-1])
    assert code == 0, told.err
    assert "and answers from" in told.out
    assert 50_000_000 < trimming.folder_bytes(output) < LIMIT_BYTES
    image = ROOT / "tiny_llava" / "demo.png"
    command = [sys.executable, "-S", "-B", "-m", "runtime.generate", "--bundle", str(bundle), "--image", str(image), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(output)}
    done = subprocess.run(
        [*command, "--prompt", "read row 2."], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    expected = load(bundle).generate("read row 2.", [image])
    assert expected.text
    assert tuple(answer["token_ids"]) == expected.token_ids
    assert tuple(answer["kept_indices"]) == expected.kept_indices
