"""Output directories: whole or not at all, one build at a time, and nothing of anyone else's is ever lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from export import publish
from export.staging import check_destination, staged
from runtime.errors import BundleExistsError, StorageError
from runtime.names import MANIFEST_FILE, REPORT_FILE, VERIFY_FILE

MANIFEST = '{"schema_version": 1, "files": {"a.bin": {"bytes": 3, "sha256": "0"}}}'


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: contents of files, targets of links, None for directories."""
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def write_bundle(folder: Path, content: str = "old") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST_FILE).write_text(MANIFEST)
    (folder / "a.bin").write_text(content)
    return folder


def build(output: Path, content: str = "new", then: Callable[[], object] = lambda: None) -> None:
    with staged(output) as directory:
        write_bundle(directory, content)
        then()


def failing(error: BaseException) -> Callable[[], object]:
    def fail() -> None:
        raise error

    return fail


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def two_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot exchange two directories."""
    monkeypatch.setattr(publish, "_system_call", lambda: None)


# ---------------------------------------------------------------- whole


def test_a_bundle_appears_whole_and_nothing_else_stays(output: Path) -> None:
    with staged(output) as directory:
        assert directory.parent == output.parent, "on the same file system, or the move would be a copy"
        assert not any(directory.iterdir())
        write_bundle(directory)
        assert not output.exists()
    assert sorted(tree(output.parent)) == ["out", "out/a.bin", f"out/{MANIFEST_FILE}"]


def test_an_earlier_bundle_is_replaced_with_all_its_files(output: Path) -> None:
    write_bundle(output)
    for name in (REPORT_FILE, VERIFY_FILE):
        (output / name).write_text("{}")
    build(output)
    assert sorted(tree(output.parent)) == ["out", "out/a.bin", f"out/{MANIFEST_FILE}"]
    assert (output / "a.bin").read_text() == "new"


def test_an_empty_directory_and_missing_parents_are_fine(output: Path) -> None:
    output.mkdir()
    build(output)
    build(output / ".." / "deeper" / "still" / "out")
    assert (output / "a.bin").read_text() == "new"
    assert (output.parent / "deeper" / "still" / "out" / "a.bin").read_text() == "new"


def test_a_link_to_a_bundle_stays_a_link(output: Path) -> None:
    real = write_bundle(output.parent / "real")
    output.symlink_to(real, target_is_directory=True)
    build(output)
    assert output.is_symlink()
    assert (real / "a.bin").read_text() == "new"
    assert sorted(tree(output.parent)) == ["out", "real", "real/a.bin", f"real/{MANIFEST_FILE}"]


# ---------------------------------------------------------------- or not at all


class Failed(Exception):
    pass


@pytest.mark.parametrize("error", [Failed("x"), KeyboardInterrupt(), SystemExit(3), MemoryError(), BundleExistsError("x")])
@pytest.mark.parametrize("earlier", [True, False])
def test_any_failure_leaves_everything_as_it_was(output: Path, error: BaseException, earlier: bool) -> None:
    if earlier:
        write_bundle(output)
    before = tree(output.parent)
    with pytest.raises(type(error)):
        build(output, then=failing(error))
    assert tree(output.parent) == before


def test_directories_made_on_the_way_go_again(output: Path) -> None:
    with pytest.raises(Failed), staged(output / "a" / "b"):
        raise Failed
    assert not output.exists()


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "No space left on device; free some space and build again"),
        (errno.EDQUOT, "Disk quota exceeded; free some of your quota and build again"),
        (errno.EACCES, "Permission denied; choose a writable --output and build again"),
        (errno.EROFS, "Read-only file system; choose a writable --output and build again"),
        (errno.EFBIG, "File too large; check the disk and build again"),
        (errno.EIO, "Input/output error; check the disk and build again"),
    ],
)
def test_an_error_of_the_file_system_says_what_to_do(output: Path, number: int, advice: str) -> None:
    write_bundle(output)
    before = tree(output.parent)
    with pytest.raises(StorageError, match=rf"cannot write .*/out: {advice} \(nothing was changed\)"):
        build(output, then=failing(OSError(number, os.strerror(number))))
    assert tree(output.parent) == before


@pytest.mark.usefixtures("two_renames")
@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_while_moving_into_place_restores_the_earlier_bundle(
    output: Path, failing: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(output)
    before, replace = tree(output.parent), os.replace
    calls: list[Path] = []

    def fail(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise error
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises((StorageError, KeyboardInterrupt)):
            build(output)
    assert tree(output.parent) == before


@pytest.mark.usefixtures("two_renames")
def test_an_interrupt_right_after_a_move_loses_neither_bundle(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace
    for interrupted, content in ((1, "old"), (2, "new")):
        write_bundle(output)
        calls: list[Path] = []

        def interrupt(source: Path, target: Path, interrupted: int = interrupted, calls: list[Path] = calls) -> None:
            calls.append(source)
            replace(source, target)
            if len(calls) == interrupted:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupt)
            with pytest.raises(KeyboardInterrupt):
                build(output)
        assert (output / "a.bin").read_text() == content
        assert [name for name in tree(output.parent) if ".partial" in name or ".lock" in name] == []
        build(output)  # clears what was left


@pytest.mark.parametrize(("after", "content"), [(False, "old"), (True, "new")])
def test_an_interrupt_around_the_exchange_loses_neither_bundle(
    output: Path, monkeypatch: pytest.MonkeyPatch, after: bool, content: str
) -> None:
    write_bundle(output)
    exchange = publish.exchange

    def interrupt(one: Path, other: Path) -> bool:
        if after and not exchange(one, other):
            pytest.skip("this system or file system cannot exchange two directories")
        raise KeyboardInterrupt

    monkeypatch.setattr(publish, "exchange", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(output)
    assert sorted(tree(output.parent)) == ["out", "out/a.bin", f"out/{MANIFEST_FILE}"]
    assert (output / "a.bin").read_text() == content


# ---------------------------------------------------------------- what is not ours


def a_file(output: Path) -> None:
    output.write_text("mine")


def a_folder(output: Path) -> None:
    output.mkdir()
    (output / "thesis.txt").write_text("mine")


def a_dangling_link(output: Path) -> None:
    output.symlink_to("nowhere")


def another_programs_manifest(output: Path) -> None:
    output.mkdir()
    (output / MANIFEST_FILE).write_text('{"name": "npm"}')


def a_manifest_that_is_no_json(output: Path) -> None:
    output.mkdir()
    (output / MANIFEST_FILE).write_bytes(b"\xff{")


def a_link_to_a_folder(output: Path) -> None:
    a_folder(output.with_name("else"))
    output.symlink_to(output.with_name("else"), target_is_directory=True)


OTHERS = [a_file, a_folder, a_dangling_link, another_programs_manifest, a_manifest_that_is_no_json, a_link_to_a_folder]


@pytest.mark.parametrize("put", OTHERS)
def test_what_is_not_a_bundle_is_left_alone(output: Path, put: Callable[[Path], None]) -> None:
    put(output)
    before = tree(output.parent)
    for attempt in (check_destination, build):
        with pytest.raises(BundleExistsError, match=r"exists and is not a bundle; it is left alone: choose another --output"):
            attempt(output)
    assert tree(output.parent) == before


@pytest.mark.parametrize("name", ["notes.txt", "a.bin.bak", "pictures/holiday.png"])
def test_a_bundle_that_someone_put_files_into_is_left_alone(output: Path, name: str) -> None:
    write_bundle(output)
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    before = tree(output.parent)
    with pytest.raises(
        BundleExistsError, match=rf"holds {name.split('/')[0]}, which is not of the bundle; .* move it away, or choose another"
    ):
        build(output)
    assert tree(output.parent) == before


def test_what_appears_during_a_build_is_left_alone(output: Path) -> None:
    with pytest.raises(BundleExistsError, match="is not a bundle"):
        build(output, then=lambda: a_folder(output))
    assert tree(output.parent) == {"out": None, "out/thesis.txt": b"mine"}


def test_a_parent_that_is_a_file_is_named(output: Path) -> None:
    a_file(output)
    with pytest.raises(StorageError, match=r"cannot write .*/out/deeper/bundle: Not a directory; choose a writable --output"):
        build(output / "deeper" / "bundle")
    assert tree(output.parent) == {"out": b"mine"}


def test_a_read_only_parent_is_named(output: Path) -> None:
    output.parent.chmod(0o500)
    if os.access(output.parent, os.W_OK):
        pytest.skip("this user may write everywhere")
    try:
        with pytest.raises(StorageError, match="Permission denied; choose a writable --output"):
            build(output)
    finally:
        output.parent.chmod(0o700)


# ---------------------------------------------------------------- one at a time


def test_a_second_build_is_refused_and_the_first_one_goes_on(output: Path) -> None:
    with staged(output) as directory:
        write_bundle(directory, "new")
        with pytest.raises(BundleExistsError, match=r"another build is writing .*/out: wait for it, or choose another --output"):
            build(output, "second")
        build(output.with_name("other"), "other")
        assert (directory / "a.bin").read_text() == "new"
    assert (output / "a.bin").read_text() == "new"
    build(output, "third")
    assert (output / "a.bin").read_text() == "third"


def test_the_lock_file_goes_while_it_is_still_locked(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed after the release it could be the next build's, and a third would then write beside the second."""
    unlink, seen = Path.unlink, []

    def watched(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".lock":
            with pytest.raises(Timeout):
                FileLock(path, is_singleton=False).acquire(blocking=False)
            seen.append(path.name)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    build(output)
    assert seen == [".out.lock"]


def test_what_a_killed_build_left_is_cleared(output: Path) -> None:
    write_bundle(output)
    write_bundle(output.with_name(".out.partial"), "half")
    output.with_name(".out.lock").touch()
    build(output)
    assert sorted(tree(output.parent)) == ["out", "out/a.bin", f"out/{MANIFEST_FILE}"]


@pytest.mark.parametrize("in_the_way", [a_file, a_dangling_link])
def test_whatever_has_the_partial_name_is_cleared(output: Path, in_the_way: Callable[[Path], None]) -> None:
    in_the_way(output.with_name(".out.partial"))
    build(output)
    assert (output / "a.bin").read_text() == "new"


@pytest.mark.parametrize("empty_directory", [False, True])
def test_a_bundle_set_aside_by_a_killed_build_comes_back(output: Path, empty_directory: bool) -> None:
    write_bundle(output.with_name(".out.previous"), "precious")
    if empty_directory:
        output.mkdir()
    with pytest.raises(Failed), staged(output):
        raise Failed
    assert tree(output.parent) == {"out": None, "out/a.bin": b"precious", f"out/{MANIFEST_FILE}": MANIFEST.encode()}
