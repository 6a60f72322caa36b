"""A directory moves into its place in one step where the system can exchange two, in two renames where it cannot."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from export import publish as module
from export.publish import exchange, publish, recover


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "a.bin").write_text(content)
    return path


def state(parent: Path) -> dict[str, str]:
    return {path.name: (path / "a.bin").read_text() for path in parent.iterdir()}


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The finished directory, the place with an earlier one, and the name to set it aside under."""
    return folder(tmp_path / "finished", "new"), folder(tmp_path / "place", "old"), tmp_path / "previous"


@pytest.fixture
def can_exchange(tmp_path: Path) -> None:
    """Skips where the system cannot exchange directories."""
    one, other = folder(tmp_path / "one", "1"), folder(tmp_path / "other", "2")
    done = exchange(one, other)
    for path in (one, other):
        module.remove(path)
    if not done:
        pytest.skip("this system or file system cannot exchange two directories")


def refusing(number: int) -> Callable[[], Callable[[bytes, bytes], int]]:
    """In place of the system's call: one that fails with an error number."""

    def call(_one: bytes, _other: bytes) -> int:
        ctypes.set_errno(number)
        return -1

    return lambda: call


def watch(place: Path, call: Callable[[], None]) -> int:
    """How often, while `call` runs, a look at `place` found nothing there."""
    absent, done = [0], threading.Event()

    def look() -> None:
        while not done.is_set():
            absent[0] += not place.exists()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()
    return absent[0]


def slow_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every rename take long enough to be looked at."""
    replace = os.replace

    def slow(source: Path, target: Path) -> None:
        replace(source, target)
        time.sleep(0.02)

    monkeypatch.setattr(os, "replace", slow)


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_linux_with_a_c_library_of_today_has_the_call() -> None:
    if hasattr(ctypes.CDLL(None), "renameat2"):
        assert module._system_call() is not None


@pytest.mark.usefixtures("can_exchange")
def test_the_place_is_never_empty(places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    slow_replace(monkeypatch)
    assert watch(places[1], lambda: publish(*places)) == 0
    assert state(places[1].parent) == {"place": "new"}


def test_negative_control_two_renames_leave_it_empty_for_a_moment(places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    slow_replace(monkeypatch)
    monkeypatch.setattr(module, "_system_call", lambda: None)
    assert watch(places[1], lambda: publish(*places)) > 0
    assert state(places[1].parent) == {"place": "new"}


@pytest.mark.usefixtures("can_exchange")
def test_no_rename_is_made_where_an_exchange_does_it(places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object) -> None:
        raise AssertionError("a rename")

    monkeypatch.setattr(os, "replace", unexpected)
    publish(*places)
    assert state(places[1].parent) == {"place": "new"}


@pytest.mark.usefixtures("can_exchange")
def test_an_exchange_swaps_both(places: tuple[Path, Path, Path]) -> None:
    finished, place, _ = places
    assert exchange(finished, place)
    assert state(place.parent) == {"place": "new", "finished": "old"}


@pytest.mark.usefixtures("can_exchange")
def test_an_exchange_that_fails_for_another_reason_is_an_error(places: tuple[Path, Path, Path]) -> None:
    with pytest.raises(FileNotFoundError):
        exchange(places[0], places[2])
    assert state(places[1].parent) == {"place": "old", "finished": "new"}


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM], ids=errno.errorcode.get)
def test_an_exchange_that_is_refused_falls_back_to_two_renames(
    places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(module, "_system_call", refusing(number))
    publish(*places)
    assert state(places[1].parent) == {"place": "new"}


@pytest.mark.parametrize("platform", ["win32", "linux"])
def test_a_system_without_the_call_falls_back_to_two_renames(
    places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    class OldLibrary:
        def __init__(self, *_: object, **__: object) -> None:
            pass

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", OldLibrary)
    publish(*places)
    assert state(places[1].parent) == {"place": "new"}


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_an_error_of_the_exchange_is_not_hidden(places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(module, "_system_call", refusing(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        publish(*places)
    assert state(places[1].parent) == {"place": "old", "finished": "new"}


def test_a_free_place_needs_one_rename(places: tuple[Path, Path, Path]) -> None:
    module.remove(places[1])
    publish(*places)
    assert state(places[1].parent) == {"place": "new"}


@pytest.mark.parametrize("at_place", ["nothing", "an empty directory", "a newer one"])
def test_what_was_set_aside_comes_back_unless_there_is_a_newer_one(places: tuple[Path, Path, Path], at_place: str) -> None:
    _, place, previous = places
    os.replace(place, previous)
    if at_place != "nothing":
        place.mkdir()
    if at_place == "a newer one":
        (place / "a.bin").write_text("newer")
    recover(place, previous)
    assert state(place.parent) == {"finished": "new", "place": "newer" if at_place == "a newer one" else "old"}
