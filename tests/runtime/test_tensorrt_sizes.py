"""Which profile a run takes: the smallest that fits; and what capacity and rows an engine takes."""

from __future__ import annotations

import pytest

from runtime.device.base import DeviceArray
from runtime.device.tensorrt_sizes import Sizes
from runtime.engine_info import EngineInfo, Profile, ShapeRange
from runtime.errors import EngineError
from runtime.manifest import TensorInfo

HIDDEN = TensorInfo("hidden_states", "float16", (1, "sequence", 8))
PAST = TensorInfo("past_key_values.0.key", "float16", (1, 2, "capacity", 4))
STATIC = TensorInfo("past_key_values.0.key", "float16", (1, 2, 32, 4))
RANGES = {"prefill": (16, 44), "append": (1, 12), "decode": (1, 8)}


def engine(*profiles: Profile) -> EngineInfo:
    return EngineInfo("pre_ecl", "f", "tensorrt", "1", (), profiles, (), (), None, (), (), 1.0, None)


def profile(name: str, capacity: tuple[int, int] = (64, 64)) -> Profile:
    low, high = RANGES[name]
    rows = ShapeRange((1, low, 8), (1, low, 8), (1, high, 8))
    return Profile(name, {HIDDEN.name: rows, PAST.name: ShapeRange((1, 2, capacity[0], 4), (1, 2, capacity[0], 4), (1, 2, capacity[1], 4))})


def arrays(rows: int, capacity: int = 64) -> dict[str, DeviceArray]:
    return {HIDDEN.name: DeviceArray(0, (1, rows, 8), "float16"), PAST.name: DeviceArray(0, (1, 2, capacity, 4), "float16")}


@pytest.mark.parametrize("order", [("prefill", "append", "decode"), ("decode", "append", "prefill")])
@pytest.mark.parametrize(
    ("rows", "expected"), [(1, "decode"), (8, "decode"), (9, "append"), (12, "append"), (16, "prefill"), (44, "prefill")]
)
def test_the_smallest_profile_that_fits_is_taken_whatever_their_order(order: tuple[str, ...], rows: int, expected: str) -> None:
    sizes = Sizes((HIDDEN, PAST), engine(*map(profile, order)))
    assert order[sizes.choose("pre_ecl", arrays(rows))] == expected
    assert (sizes.capacity, sizes.max_rows) == (64, 44)


@pytest.mark.parametrize(("rows", "capacity"), [(13, 64), (45, 64), (0, 64), (1, 128)])
def test_sizes_between_and_beyond_the_profiles_are_refused(rows: int, capacity: int) -> None:
    sizes = Sizes((HIDDEN, PAST), engine(*map(profile, RANGES)))
    with pytest.raises(EngineError, match=f"fits sequence {rows}, capacity {capacity}; they take sequence 1 to 8, capacity 64 .decode.; "):
        sizes.choose("pre_ecl", arrays(rows, capacity))


def test_a_cache_of_fixed_length_is_the_capacity() -> None:
    rows = {HIDDEN.name: profile("decode").shapes[HIDDEN.name]}
    sizes = Sizes((HIDDEN, STATIC), engine(Profile("decode", rows)))
    assert (sizes.capacity, sizes.max_rows) == (32, 8)


def test_a_graph_of_fixed_sizes_needs_no_profile() -> None:
    sizes = Sizes((TensorInfo("x", "float32", (1, 3)),), engine())
    assert (sizes.choose("vision", {}), sizes.smallest(), sizes.capacity, sizes.max_rows) == (0, ({},), None, None)


@pytest.mark.parametrize(
    ("profiles", "message"), [((), "its engine no profile"), ((Profile("decode", {}),), "decode gives hidden_states no range")]
)
def test_profiles_that_do_not_cover_the_graph_are_refused(profiles: tuple[Profile, ...], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Sizes((HIDDEN, PAST), engine(*profiles))
