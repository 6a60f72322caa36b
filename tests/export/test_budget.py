"""Keep counts, averages over layers and percentages: the paper's figures, the round trip, and what is out of range."""

from __future__ import annotations

import math
import re

import pytest

from export.budget import average_from_keep, check_keep, check_split, keep_from_average, keep_from_percent
from runtime.errors import UsageError

LLAVA = {"visual_tokens": 576, "split_layer": 2, "layers": 32}
NEXT = {"visual_tokens": 2880, "split_layer": 2, "layers": 32}


@pytest.mark.parametrize(
    ("average", "model", "keep"),
    [(192, LLAVA, 166), (128, LLAVA, 98), (64, LLAVA, 29), (320, NEXT, 149), (576, LLAVA, 576), (37, LLAVA, 1)],
)
def test_averages_give_the_papers_keep_counts(average: float, model: dict[str, int], keep: int) -> None:
    assert keep_from_average(average, **model) == keep


@pytest.mark.parametrize(("visual_tokens", "split_layer", "layers"), [(576, 2, 32), (576, 1, 28), (64, 5, 12), (1, 1, 2), (97, 6, 7)])
def test_a_keep_counts_own_average_gives_it_back(visual_tokens: int, split_layer: int, layers: int) -> None:
    size = {"visual_tokens": visual_tokens, "split_layer": split_layer, "layers": layers}
    for keep in range(1, visual_tokens + 1):
        average = average_from_keep(keep, **size)
        assert keep_from_average(average, **size) == keep
        if keep < visual_tokens:
            next_average = average_from_keep(keep + 1, **size)
            assert keep_from_average((average + next_average) / 2, **size) == keep, "between two keep counts the smaller one is taken"


@pytest.mark.parametrize(
    "size", [LLAVA, NEXT, {"visual_tokens": 64, "split_layer": 2, "layers": 12}, {"visual_tokens": 70001, "split_layer": 6, "layers": 7}]
)
def test_an_infeasible_average_names_the_smallest_feasible_one(size: dict[str, int]) -> None:
    for average in (0.0, -5.0, average_from_keep(1, **size) - 0.02):
        with pytest.raises(UsageError, match="is not feasible with a split at layer") as caught:
            keep_from_average(average, **size)
    named = float(re.search(r"choose ([\d.]+) to (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert keep_from_average(named, **size) == 1
    assert named - average_from_keep(1, **size) < 0.01


@pytest.mark.parametrize("average", [577.0, 1e9, math.inf, -math.inf, math.nan])
def test_an_average_beyond_all_tokens_or_not_a_number_is_refused(average: float) -> None:
    with pytest.raises(UsageError, match=r"choose 36\.94 to 576"):
        keep_from_average(average, **LLAVA)


@pytest.mark.parametrize(("percent", "keep"), [(100, 576), (22.2, 128), (11.1, 64), (50, 288), (0.01, 1), (0.26, 1), (0.27, 2)])
def test_percentages_are_of_the_tokens_kept(percent: float, keep: int) -> None:
    assert keep_from_percent(percent, visual_tokens=576) == keep


@pytest.mark.parametrize("percent", [0.0, -1.0, 100.1, math.nan, math.inf])
def test_a_percentage_out_of_range_is_refused(percent: float) -> None:
    with pytest.raises(UsageError, match="--keep-percent is the percentage of visual tokens KEPT, above 0 and up to 100"):
        keep_from_percent(percent, visual_tokens=576)


def test_keep_counts_are_1_to_n() -> None:
    assert [check_keep(k, visual_tokens=576) for k in (1, 166, 576)] == [1, 166, 576]
    for keep in (0, -1, 577):
        with pytest.raises(UsageError, match=f"--keep {keep} is out of range: an image has 576 visual tokens, keep 1 to 576 of them"):
            check_keep(keep, visual_tokens=576)


def test_splits_are_1_to_l_minus_1() -> None:
    assert [check_split(k, layers=12) for k in (1, 11)] == [1, 11]
    for split in (0, -1, 12):
        with pytest.raises(
            UsageError, match=f"--split-layer {split} is out of range: the decoder has 12 layers, split before layer 1 to 11"
        ):
            check_split(split, layers=12)
