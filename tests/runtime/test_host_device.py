"""The tests' device notices what it is for: a test of the chain is worth something only if this fails where it should."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from runtime.device.base import DeviceArray
from tests.runtime.host_device import HostDevice


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


def test_nothing_arrives_before_it_is_waited_for(device: HostDevice) -> None:
    address, there, back = device.allocate(8), np.arange(8, dtype=np.uint8), np.zeros(8, np.uint8)
    device.upload(address, there)
    device.download(back, address)
    assert not np.array_equal(back, there)
    device.synchronize()
    assert np.array_equal(back, there)


def test_a_source_that_changes_too_early_is_noticed(device: HostDevice) -> None:
    address, source = device.allocate(8), device.host_buffer(8)
    device.upload(address, source)
    source[3] = 1
    with pytest.raises(AssertionError, match="what is uploaded was changed before it was"):
        device.synchronize()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda device, address: device.free(address + 8), "was never allocated"),
        (lambda device, address: (device.free(address), device.free(address)), "is freed twice"),
        (lambda device, address: device.copy(address, address + 32, 64), "go beyond its allocation"),
        (lambda device, address: device.copy(address, address - 256, 8), "was never allocated"),
        (lambda device, address: (device.free(address), device.copy(address, address, 8)), "was freed"),
        (lambda device, address: device.capture(lambda: device.allocate(8)), "a capture cannot allocate"),
        (lambda device, address: device.capture(device.synchronize), "a capture cannot wait"),
        (lambda device, address: (device.close(), device.copy(address, address, 8)), "the device was closed"),
    ],
)
def test_mistakes_are_noticed_at_once(mistake: Callable[[HostDevice, int], None], message: str, device: HostDevice) -> None:
    with pytest.raises(AssertionError, match=message):
        mistake(device, device.allocate(64))


def test_a_write_beyond_an_allocation_is_noticed(device: HostDevice) -> None:
    allocation = device._allocations[device.allocate(64)]
    start = allocation.address - allocation.memory.ctypes.data
    allocation.memory[start + 64] = 0
    with pytest.raises(AssertionError, match="something wrote beyond the 64 bytes"):
        device.synchronize()


def test_a_capture_runs_nothing_and_a_replay_reads_what_is_there_then(device: HostDevice) -> None:
    address, source, back = device.allocate(4), device.host_buffer(4), np.zeros(4, np.uint8)

    def work() -> None:
        device.upload(address, source)
        device.download(back, address)

    replay = device.capture(work)
    device.synchronize()
    assert not back.any()
    for value in (1, 2):
        source[:] = value
        replay()
        device.synchronize()
        assert (back == value).all()
    assert (device.counts["capture"], device.counts["replay"], device.counts["upload"]) == (1, 2, 2)


def test_rows_go_to_the_slot_that_device_memory_says(device: HostDevice) -> None:
    cache = DeviceArray(device.allocate(2 * 8 * 4 * 4), (1, 2, 8, 4), "float32")
    rows = DeviceArray(device.allocate(2 * 3 * 4 * 4), (1, 2, 3, 4), "float32")
    length = DeviceArray(device.allocate(8), (1,), "int64")
    device.view(rows)[:] = np.arange(24).reshape(1, 2, 3, 4)
    device.scatter_rows(cache, rows, length)
    device.view(length)[0] = 5
    device.synchronize()
    assert np.array_equal(device.view(cache)[:, :, 5:8], device.view(rows))
    assert not device.view(cache)[:, :, :5].any()
