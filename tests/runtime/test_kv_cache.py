"""A cache group: fixed buffers, one length, growth that keeps what was written."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import names
from runtime.errors import ContextLengthError
from runtime.kv_cache import ROUND_TO, KVGroup


def group(capacity: int = 10, limit: int = 1000) -> KVGroup:
    return KVGroup(range(2, 5), kv_heads=3, head_size=8, capacity=capacity, limit=limit)


def fill(cache: KVGroup, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Writes `rows` random rows as an engine does; returns every buffer's valid rows."""
    rng = np.random.default_rng(seed)
    cache.reserve(rows)
    for buffer in cache.buffers.values():
        buffer[:, :, cache.length : cache.length + rows] = rng.standard_normal((1, 3, rows, 8))
    cache.advance(rows)
    return {name: buffer[:, :, : cache.length].copy() for name, buffer in cache.buffers.items()}


def test_buffers_are_named_by_the_global_layer_and_begin_finite() -> None:
    cache = group()
    assert list(cache.buffers) == [name for i in (2, 3, 4) for name in (names.past_key(i), names.past_value(i))]
    for buffer in cache.buffers.values():
        assert buffer.shape == (1, 3, ROUND_TO, 8)
        assert buffer.dtype == np.float32
        assert buffer.flags.c_contiguous
        assert not buffer.any()
    assert (cache.length, cache.capacity, cache.generation) == (0, ROUND_TO, 0)
    assert cache.nbytes == 3 * 2 * 3 * ROUND_TO * 8 * 4


@pytest.mark.parametrize(("asked", "limit", "capacity"), [(1, 1000, 64), (64, 1000, 64), (65, 1000, 128), (900, 100, 128), (5, 1, 64)])
def test_capacity_is_rounded_up_and_bounded_by_the_limit(asked: int, limit: int, capacity: int) -> None:
    assert group(asked, limit).capacity == capacity


def test_growing_doubles_keeps_all_rows_and_marks_the_buffers_as_new() -> None:
    cache = group()
    before = fill(cache, 60)
    assert cache.generation == 0
    cache.reserve(4)
    assert (cache.capacity, cache.generation) == (64, 0), "it still fits"
    cache.reserve(5)
    assert (cache.capacity, cache.generation, cache.length) == (128, 1, 60)
    for name, buffer in cache.buffers.items():
        assert np.array_equal(buffer[:, :, :60], before[name])
        assert not buffer[:, :, 60:].any()
    cache.advance(5)
    cache.reserve(400)
    assert (cache.capacity, cache.generation) == (512, 2), "more than double where more is needed"


def test_growth_stops_at_the_limit() -> None:
    cache = group(10, limit=100)
    fill(cache, 100)
    assert cache.capacity == 128
    with pytest.raises(
        ContextLengthError, match="101 tokens exceed the maximum context of 100: shorten the prompt, or export with a larger"
    ):
        cache.reserve(1)
    assert cache.length == 100


def test_a_prompt_beyond_the_limit_changes_nothing() -> None:
    cache = group(10, limit=100)
    with pytest.raises(ContextLengthError, match="5000 tokens exceed"):
        cache.reserve(5000)
    assert (cache.length, cache.capacity, cache.generation) == (0, 64, 0)


def test_layer_views_show_valid_rows_only() -> None:
    cache = group()
    rows = fill(cache, 7)
    for i in (2, 3, 4):
        keys, values = cache.layer(i)
        assert np.array_equal(keys, rows[names.past_key(i)][0])
        assert np.array_equal(values, rows[names.past_value(i)][0])
        assert keys.shape == (3, 7, 8)


def test_truncating_forgets_rows_without_copying() -> None:
    cache = group()
    rows = fill(cache, 7)
    buffers = dict(cache.buffers)
    cache.truncate(3)
    assert cache.length == 3
    assert all(cache.buffers[name] is buffer for name, buffer in buffers.items())
    assert np.array_equal(cache.layer(3)[0], rows[names.past_key(3)][0, :, :3])
    with pytest.raises(ValueError, match="cannot truncate a cache of 3 rows to 4"):
        cache.truncate(4)
    with pytest.raises(ValueError, match="cannot truncate a cache of 3 rows to -1"):
        cache.truncate(-1)
