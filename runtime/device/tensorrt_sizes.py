"""Which profile of an engine a run takes, from the sizes of its symbolic dimensions; and what to say where none does.

Knows nothing about engine libraries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtime import names
from runtime.device.base import DeviceArray
from runtime.engine_info import EngineInfo, Profile
from runtime.errors import EngineError
from runtime.manifest import TensorInfo

Range = tuple[int, int]
ROWS = ("sequence", "N")  # the dimension of new rows; of visual tokens in `score`
CAPACITY = "capacity"


class Sizes:
    """The ranges of a graph's symbolic dimensions in each profile of its engine; `capacity`, `max_rows`, `row_ranges` as in `DeviceEngine`.

    Args:
        inputs: the graph's, from the manifest.

    Raises:
        EngineError: the engine's profiles do not give a range for each of them.
    """

    def __init__(self, inputs: Sequence[TensorInfo], info: EngineInfo) -> None:
        self._where: dict[str, tuple[str, int]] = {}
        for tensor in inputs:
            for axis, size in enumerate(tensor.shape):
                if isinstance(size, str):
                    self._where.setdefault(size, (tensor.name, axis))
        if self._where and not info.profiles:
            raise EngineError(
                f"{info.graph} has sizes that vary and its engine no profile: compile the bundle again, python -m runtime.compile"
            )
        self._names = tuple(profile.name for profile in info.profiles)
        self._ranges = tuple(self._of(profile) for profile in info.profiles) or ({},)
        self._order = sorted(range(len(self._ranges)), key=lambda i: sorted(high for _, high in self._ranges[i].values()))
        self.max_rows = max((r[size][1] for r in self._ranges for size in ROWS if size in r), default=None)
        rows = [r[size] for r in self._ranges for size in ROWS if size in r]
        self.row_ranges = tuple(sorted(set(rows)))
        past = next((tensor.shape[2] for tensor in inputs if tensor.name.startswith(names.PAST)), None)
        self.capacity = past if isinstance(past, int) else min((r[CAPACITY][1] for r in self._ranges if CAPACITY in r), default=None)

    def choose(self, graph: str, arrays: Mapping[str, DeviceArray]) -> int:
        """The index of the smallest profile that these arrays' sizes fit.

        Raises:
            EngineError: there is none; the message says which sizes would fit.
            KeyError: an input is missing.
        """
        if not self._where:
            return 0
        sizes = {}
        for size, (name, axis) in self._where.items():
            shape = arrays[name].shape
            sizes[size] = shape[axis] if axis < len(shape) else -1
        for index in self._order:
            ranges = self._ranges[index]
            if all(low <= sizes[size] <= high for size, (low, high) in ranges.items()):
                return index
        wanted = ", ".join(f"{size} {number}" for size, number in sizes.items())
        raise EngineError(
            f"no profile of {graph}'s engine fits {wanted}; they take {self._words()}: use such sizes, or build others with "
            "python -m runtime.compile (--text-tokens, --images, --capacity)"
        )

    def smallest(self) -> tuple[dict[str, int], ...]:
        """The smallest sizes of each profile, in the engine's order."""
        return tuple({size: low for size, (low, _) in ranges.items()} for ranges in self._ranges)

    def _of(self, profile: Profile) -> dict[str, Range]:
        ranges: dict[str, Range] = {}
        for size, (name, axis) in self._where.items():
            shape = profile.shapes.get(name)
            if shape is None or axis >= len(shape.minimum):
                raise EngineError(f"the profile {profile.name} gives {name} no range: compile the bundle again, python -m runtime.compile")
            ranges[size] = (shape.minimum[axis], shape.maximum[axis])
        return ranges

    def _words(self) -> str:
        """Such as "sequence 1 to 8, capacity 512 (decode)"."""
        parts = []
        for index in self._order:
            ranges = [f"{size} {low}" + (f" to {high}" if high > low else "") for size, (low, high) in self._ranges[index].items()]
            parts.append(f"{', '.join(ranges)} ({self._names[index]})")
        return "; ".join(parts)
