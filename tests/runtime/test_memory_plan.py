"""A memory plan as data: its sums, measured figures in place of estimates, and the manifest that holds it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from runtime.errors import BundleError
from runtime.manifest import Manifest, schema_for
from runtime.memory_plan import ASSUMED, DEVICE, ESTIMATED, EXACT, HOST, MEASURED, MemoryItem, MemoryPlan
from tests.runtime.test_manifest import manifest

PLAN = MemoryPlan(
    precision="fp16", keep=4, max_context=512, unified=True,
    items=(
        MemoryItem("weights", 700, DEVICE, EXACT), MemoryItem("activations", 90, DEVICE, ESTIMATED), MemoryItem("table", 11, HOST, ASSUMED)
    ),
    memory_bytes=1000, reserve_bytes=199, export_peak_bytes=5, compile_peak_bytes=6, largest_allocation_bytes=7,
)  # fmt: skip
HOLDING = dataclasses.replace(manifest(), schema_version=2, memory=PLAN)


def test_sums_follow_the_places() -> None:
    assert (PLAN.device_bytes, PLAN.host_bytes, PLAN.total_bytes, PLAN.available_bytes, PLAN.fits) == (790, 11, 801, 801, True)
    assert dataclasses.replace(PLAN, reserve_bytes=200).fits is False
    assert dataclasses.replace(PLAN, reserve_bytes=200, unified=False).fits is True
    assert dataclasses.replace(PLAN, memory_bytes=None).fits is None


def test_measured_figures_take_the_place_of_estimates() -> None:
    measured = PLAN.with_measured({"activations": 101})
    assert (measured.bytes_of("activations"), measured.total_bytes, measured.fits) == (101, 812, False)
    assert [item.basis for item in measured.items] == [EXACT, MEASURED, ASSUMED]
    with pytest.raises(KeyError, match="the memory plan has no item 'nothing'"):
        PLAN.with_measured({"activations": 1, "nothing": 2})


def test_a_manifest_reads_its_plan_back_and_needs_none() -> None:
    assert Manifest.from_json(HOLDING.to_json()) == HOLDING
    old = dataclasses.replace(manifest(), schema_version=1)
    assert "memory" not in json.loads(old.to_json()), "a runtime that reads schema 1 refuses entries that it does not know"
    assert Manifest.from_json(old.to_json()) == old
    assert (schema_for(None), schema_for(None, PLAN)) == (1, 2)
    with pytest.raises(BundleError, match="memory is an entry of schema 2, the bundle has 1: export the bundle again"):
        dataclasses.replace(HOLDING, schema_version=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["items"][0].update(bytes=-1), "memory item 'weights' is malformed"),
        (lambda m: m["items"][0].update(basis="guessed"), "memory item 'weights' is malformed .*guessed"),
        (lambda m: m["items"][0].update(place=3), "memory: items: place: 3 has the wrong type"),
        (lambda m: m.update(unified=1), "memory: unified: 1 has the wrong type"),
        (lambda m: m.update(memory_bytes=True), "memory: memory_bytes: True has the wrong type"),
        (lambda m: m.update(reserve_bytes=-1), "the memory plan has a size below 0"),
        (lambda m: m.update(keep=0), "keep 0 of 512 tokens"),
        (lambda m: m.pop("items"), r"memory: missing or unknown entries \['items'\]"),
        (lambda m: m.update(more=1), r"memory: missing or unknown entries \['more'\]"),
    ],
)
def test_a_malformed_plan_is_named(change: Callable[[dict[str, Any]], object], message: str) -> None:
    raw = json.loads(HOLDING.to_json())
    change(raw["memory"])
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps(raw))
