"""What has been measured so far, in a file with one JSON object a line: an interrupted calibration goes on from it.

Each line is keyed by image and prompt, and by a fingerprint of everything else its numbers depend on; lines of another fingerprint,
cut-off lines and lines that are not ours are passed over, never removed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Generic, Protocol, Self, TypeVar

from runtime.errors import StorageError

__all__ = ["Journal", "Keyed", "LineJournal", "Record", "fingerprint_of", "finite_floats"]


class Keyed(Protocol):
    """What a journal holds: a frozen dataclass of JSON values with a key."""

    @property
    def key(self) -> str: ...


R = TypeVar("R", bound=Keyed)


@dataclass(frozen=True, slots=True)
class Record:
    """One image's numbers: see `calibration.activations.Measurement`. `key` is of image and prompt, `image` the file's SHA-256."""

    key: str
    image: str
    name: str
    visual_tokens: int
    curve: tuple[float, ...]
    largest: dict[str, tuple[float, ...]]


def fingerprint_of(settings: Mapping[str, Any]) -> str:
    """A short hash of JSON data."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class LineJournal(Generic[R]):
    """The records of one fingerprint in a file; a context manager that holds the file open for appending. A subclass makes records.

    Raises:
        StorageError: the file cannot be read or opened.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self._fingerprint = path, fingerprint
        self._records: dict[str, R] = {}
        self._file: IO[bytes] | None = None

    def record_from(self, raw: dict[str, Any]) -> R:
        """A record from a line's JSON object; raises ValueError, TypeError or KeyError where it is not one."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            data = self.path.read_bytes() if self.path.exists() else b""
            self._file = self.path.open("ab", buffering=0)
            if data and not data.endswith(b"\n"):
                self._write(b"\n")  # ends a line that was cut off
        except OSError as error:
            raise _failed(self.path, error) from error
        for line in data.splitlines():
            record = self._parse(line)
            if record is not None:
                self._records[record.key] = record
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> R | None:
        """What was measured earlier."""
        return self._records.get(key)

    def append(self, record: R) -> None:
        """Writes one record at once.

        Raises:
            StorageError: no space, say; what was measured before is kept.
        """
        fields: dict[str, Any] = dataclasses.asdict(record)  # type: ignore[call-overload]  # a dataclass: no protocol says so
        line = json.dumps({"fingerprint": self._fingerprint, **fields}, allow_nan=False)
        try:
            self._write(line.encode() + b"\n")
        except OSError as error:
            raise _failed(self.path, error) from error
        self._records[record.key] = record

    def _write(self, data: bytes) -> None:
        assert self._file is not None, "used outside its with block"
        while data:
            data = data[self._file.write(data) :]

    def _parse(self, line: bytes) -> R | None:
        try:
            raw = json.loads(line)
            if raw.pop("fingerprint") != self._fingerprint:
                return None
            return self.record_from(raw)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None


class Journal(LineJournal[Record]):
    """The journal of `calibration.ecl`."""

    def record_from(self, raw: dict[str, Any]) -> Record:
        curve = finite_floats(raw["curve"])
        largest = {str(name): finite_floats(values) for name, values in raw["largest"].items()}
        return Record(str(raw["key"]), str(raw["image"]), str(raw["name"]), int(raw["visual_tokens"]), curve, largest)


def finite_floats(values: Any) -> tuple[float, ...]:
    """JSON numbers as floats; raises ValueError where one is not finite."""
    numbers = tuple(float(value) for value in values)
    if not all(map(math.isfinite, numbers)):
        raise ValueError("not finite")
    return numbers


def _failed(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write {path}: {error.strerror or error}; free some space or choose another --output, and run the same command again: "
        "what was measured before is kept"
    )
