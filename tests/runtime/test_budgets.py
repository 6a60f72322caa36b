"""Budgets for each image: which may be asked for, and which one "auto" chooses for constructed scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.budgets import AUTO, check_held, check_keep, choose_budget, kept_mass, largest_kept, smallest_kept
from runtime.errors import UsageError
from runtime.manifest import Manifest, read_manifest

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def fixed(tiny_bundle: Path) -> Manifest:
    """Budgets 4 and 2 of 16, no threshold."""
    return read_manifest(tiny_bundle)


@pytest.fixture(scope="module")
def offering(fixed: Manifest) -> Manifest:
    return dataclasses.replace(fixed, schema_version=2, auto_keep=0.9)


# ---------------------------------------------------------------- the mass


@pytest.mark.parametrize(
    ("scores", "mass"),
    [
        ([1, 2, 3, 5], [4 / 7, 6 / 7, 1, 1]),
        ([5, 1, 3, 2], [4 / 7, 6 / 7, 1, 1]),
        ([-1, -5, -3, -4], [4 / 7, 6 / 7, 1, 1]),
        ([0.5, 0.5, 0.5], [1, 1, 1]),
        ([7], [1]),
        ([NAN, 1, 3, NAN], [1, 1, 1, 1]),
        ([1, 2, 3, 5, INF, -INF, NAN], [4 / 7, 6 / 7, 1, 1, 1, 1, 1]),
        ([NAN, INF], [1, 1]),
        ([NAN, 2, 2], [1, 1, 1]),
    ],
)
def test_the_mass_is_the_share_above_the_lowest_score(scores: list[float], mass: list[float]) -> None:
    assert kept_mass(np.array(scores, np.float32)).tolist() == pytest.approx(mass)


def test_the_mass_of_all_is_exactly_one_and_never_falls() -> None:
    for seed in range(20):
        scores = np.random.default_rng(seed).lognormal(sigma=3, size=576).astype(np.float32)
        mass = kept_mass(scores)
        assert mass[-1] == mass[-2] == 1.0, "the lowest score adds nothing"
        assert (np.diff(mass) >= 0).all()


def test_scores_near_the_end_of_float32_do_not_overflow() -> None:
    scores = np.array([3e38, -3e38, 3e38, 0], np.float32)
    assert kept_mass(scores).tolist() == pytest.approx([0.4, 0.8, 1, 1])


def test_the_mass_is_calibrations() -> None:
    pytest.importorskip("torch", reason="calibration runs models")
    from calibration.selection import Ranking

    for seed in range(10):
        random = np.random.default_rng(seed)
        scores = random.normal(size=50)
        scores[random.random(50) < 0.2] = NAN
        ranking = Ranking(np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable"), scores)
        assert kept_mass(scores).tolist() == pytest.approx([ranking.kept_mass(keep) for keep in range(1, 51)], abs=1e-12)


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("threshold", "chosen"),
    [(0.01, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.71, 4), (1.0, 4)],
)
def test_the_smallest_budget_that_reaches_the_threshold_is_chosen(threshold: float, chosen: int) -> None:
    scores = np.array([0, 4, 1, 2, 3], np.float32)  # masses 0.4, 0.7, 0.9, 1, 1
    for budgets in ((1, 2, 4), (4, 1, 2), (2, 4, 1)):
        assert choose_budget(scores, budgets, threshold) == chosen


def test_where_no_budget_reaches_it_the_largest_is_chosen() -> None:
    assert choose_budget(np.arange(100, dtype=np.float32), (10, 20, 5), 0.9) == 20


def test_a_budget_of_all_tokens_or_more_holds_all_of_the_mass() -> None:
    scores = np.arange(8, dtype=np.float32)
    assert choose_budget(scores, (2, 8), 1.0) == 8
    assert choose_budget(scores, (2, 30, 20), 1.0) == 20
    assert choose_budget(scores, (20, 30), 0.5) == 20


def test_equal_scores_need_no_more_than_the_smallest_budget() -> None:
    assert choose_budget(np.full(16, 0.3, np.float32), (8, 2, 4), 1.0) == 2
    assert choose_budget(np.full(16, NAN, np.float32), (8, 2, 4), 1.0) == 2


# ---------------------------------------------------------------- what may be asked for


def test_auto_is_offered_by_a_threshold_alone(fixed: Manifest, offering: Manifest) -> None:
    assert check_keep(offering, "auto") == AUTO
    message = "this bundle has no threshold for keep auto: export it with several budgets and --auto-keep T, or keep 4, 2 and all"
    with pytest.raises(UsageError, match=f"^{message}$"):
        check_keep(fixed, "auto")
    with pytest.raises(UsageError, match=message):
        check_held(fixed, "auto")
    check_held(offering, "auto")


def test_everything_else_is_as_without_it(fixed: Manifest, offering: Manifest) -> None:
    asked: list[Any] = [None, "all", 4, 2, 16, np.int64(2)]
    for manifest in (fixed, offering):
        assert [check_keep(manifest, keep) for keep in asked] == [4, None, 4, 2, 16, 2]
        check_held(manifest, None)
        check_held(manifest, 4)


@pytest.mark.parametrize("keep", [3, 0, -4, True, 4.0, "4", "Auto", "", b"auto", [4], np.zeros(2)])
def test_a_budget_that_is_not_held_is_told_with_those_that_are(fixed: Manifest, offering: Manifest, keep: Any) -> None:
    with pytest.raises(UsageError, match=r"this bundle holds the budgets 4, 2 and all, not .*: export it with --keep"):
        check_keep(fixed, keep)
    with pytest.raises(UsageError, match=r"this bundle holds the budgets 4, 2, auto and all, not .*: export it with --keep"):
        check_keep(offering, keep)


def test_bounds_of_what_may_be_kept() -> None:
    assert [smallest_kept(keep, (4, 2, 8)) for keep in (None, 4, "auto")] == [None, 4, 2]
    assert [largest_kept(keep, (4, 2, 8)) for keep in (None, 4, "auto")] == [None, 4, 8]
