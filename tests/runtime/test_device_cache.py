"""Caches in a device's memory: they grow, are copied and read as those on the host, and go back to a pool."""

from __future__ import annotations

import gc
import threading
from itertools import count

import numpy as np
import pytest

from runtime import names
from runtime.device.cache import MAX_IDLE, Block, DeviceCaches
from runtime.errors import EngineError
from runtime.kv_cache import KVGroup
from runtime.token_table import bfloat16_bits
from tests.runtime.host_device import HostDevice


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def freed() -> list[Block]:
    return []


@pytest.fixture
def caches(device: HostDevice, freed: list[Block]) -> DeviceCaches:
    return DeviceCaches(device, threading.RLock(), freed.append)


def group(caches: DeviceCaches, capacity: int = 64, *, first: int = 2, fixed: int | None = None, dtype: str = "float32") -> KVGroup:
    return KVGroup(range(first, first + 2), 3, 8, capacity, 1000, dtype, caches, fixed)


def fill(cache: KVGroup, device: HostDevice, rows: int) -> dict[str, np.ndarray]:
    """Writes rows as an engine would; returns all that is valid, [3, length, 8] by name."""
    cache.reserve(rows)
    rng = np.random.default_rng(cache.length)
    for buffer in cache.buffers.values():
        new = rng.normal(size=(3, rows, 8)).astype(np.float32)
        held = bfloat16_bits(new) if cache.dtype == "bfloat16" else new
        device.view(buffer)[0, :, cache.length : cache.length + rows] = held
    cache.advance(rows)
    return {name: device.view(buffer)[0, :, : cache.length].copy() for name, buffer in cache.buffers.items()}


def test_a_group_grows_with_its_rows_and_gives_the_old_memory_back(caches: DeviceCaches, device: HostDevice, freed: list[Block]) -> None:
    cache = group(caches)
    before, block = fill(cache, device, 60), caches.block_of(cache)
    block.sound = False
    cache.reserve(10)
    device.synchronize()
    assert (cache.capacity, cache.generation, device.allocated) == (128, 1, 4)
    assert freed == [block]
    assert caches.block_of(cache).number != block.number
    assert not caches.block_of(cache).sound, "what was copied is no better"
    for name, rows in before.items():
        assert np.array_equal(device.view(cache.buffers[name])[0, :, :60], rows)


def test_a_clone_is_independent(caches: DeviceCaches, device: HostDevice) -> None:
    cache = group(caches)
    before = fill(cache, device, 7)
    other = cache.clone()
    device.synchronize()
    fill(other, device, 3)
    cache.truncate(2)
    fill(cache, device, 9)
    assert other.length == 10
    for name, rows in before.items():
        assert np.array_equal(device.view(other.buffers[name])[0, :, :7], rows)
    assert device.allocated == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_are_read_on_the_host(dtype: str, caches: DeviceCaches, device: HostDevice) -> None:
    cache = group(caches, dtype=dtype)
    rows = fill(cache, device, 5)
    keys, values = cache.layer(3)
    assert (keys.shape, keys.dtype.name) == ((3, 5, 8), "float32")
    for found, name in ((keys, names.past_key(3)), (values, names.past_value(3))):
        held = bfloat16_bits(found) if dtype == "bfloat16" else found
        assert np.array_equal(held, rows[name])


def test_blocks_of_groups_that_are_gone_are_used_again(caches: DeviceCaches, device: HostDevice, freed: list[Block]) -> None:
    one, two = group(caches), group(caches, first=8)
    blocks = [caches.block_of(cache).number for cache in (one, two)]
    del one, two
    gc.collect()
    again = [group(caches, first=8), group(caches)]
    assert [caches.block_of(cache).number for cache in reversed(again)] == blocks
    assert device.counts["allocate"] == 8
    assert freed == []


@pytest.mark.parametrize(
    ("capacity", "fixed", "reused"),
    [(64, None, False), (65, None, True), (128, None, True), (192, None, False), (0, 128, True), (0, 96, False)],
)
def test_a_block_is_taken_where_it_is_not_much_too_long(
    capacity: int, fixed: int | None, reused: bool, caches: DeviceCaches, device: HostDevice
) -> None:
    """Attention costs by capacity. 65 tokens make 128; a block of 128 is twice 64, which is as far as it goes."""
    first = group(caches, 128 if capacity != 64 else 192)
    del first
    gc.collect()
    made = device.counts["allocate"]
    cache = group(caches, capacity, fixed=fixed)
    assert (device.counts["allocate"] == made) == reused
    assert cache.capacity >= (fixed or capacity)


def test_the_pool_keeps_a_few_and_the_last_ones(caches: DeviceCaches, device: HostDevice, freed: list[Block]) -> None:
    groups = [group(caches) for _ in range(MAX_IDLE + 2)]
    numbers = [caches.block_of(cache).number for cache in groups]
    for _ in count():
        if not groups:
            break
        groups.pop(0)
        gc.collect()
    caches.collect()
    assert [block.number for block in freed] == numbers[:2]
    device.synchronize()
    assert device.allocated == 4 * MAX_IDLE
    caches.free_idle()
    assert device.allocated == 0


def test_an_allocation_that_fails_leaves_nothing_behind(caches: DeviceCaches, device: HostDevice) -> None:
    device.limit_bytes = 3 * 64 * 3 * 8 * 4 + 100
    with pytest.raises(EngineError, match="out of memory"):
        group(caches)
    assert device.allocated == 0


def test_after_closing_nothing_can_be_done_with_them(caches: DeviceCaches, device: HostDevice) -> None:
    cache = group(caches)
    fill(cache, device, 3)
    caches.close()
    assert device.allocated == 0
    for call in (cache.clone, lambda: cache.layer(2), lambda: group(caches)):
        with pytest.raises(EngineError, match="the model was closed, its caches are gone: load the bundle again"):
            call()
