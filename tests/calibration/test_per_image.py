"""Budgets per image, on made-up masses and answers: which budget each image takes, and when the rule is better than one budget for all."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.pareto import Measured, Rule
from calibration.per_image import ImageBudgets, Threshold, choose_threshold, evaluate_thresholds, usual_thresholds
from calibration.resampling import Resampler
from tests.calibration.asking import figure, measured

KEEPS = np.array([2, 4, 8])
IMAGES = 60


def budgets(mass: np.ndarray, agreeing: np.ndarray) -> ImageBudgets:
    return ImageBudgets(KEEPS, mass, agreeing, agreeing, np.full(len(mass), 10.0), np.full(len(mass), 10.0))


def telling() -> ImageBudgets:
    """Half of the images are easy: their small budget holds most of the mass and answers everything. The others need the largest."""
    easy = np.arange(IMAGES) % 2 == 0
    mass = np.where(easy[:, None], [0.9, 0.95, 1.0], [0.3, 0.5, 1.0])
    agreeing = np.where(easy[:, None], [10.0, 10.0, 10.0], [2.0, 4.0, 10.0])
    return budgets(mass, agreeing)


def blind() -> ImageBudgets:
    """The same masses, and answers that have nothing to do with them."""
    rng = np.random.default_rng(0)
    agreeing = np.sort(rng.integers(0, 11, (IMAGES, 3)).astype(np.float64), axis=1)
    return budgets(telling().mass, agreeing)


def test_each_image_takes_the_smallest_budget_that_reaches_the_threshold_else_the_largest() -> None:
    mass = np.array([[0.5, 0.7, 0.9], [0.1, 0.2, 0.3], [0.7, 0.8, 0.9], [0.69, 0.7, 0.71]])
    made = budgets(mass, np.ones((4, 3)))
    assert made.assigned(0.7).tolist() == [1, 2, 0, 1]
    assert made.assigned(0.05).tolist() == [0, 0, 0, 0]
    assert made.assigned(1.0).tolist() == [2, 2, 2, 2]


def test_thresholds_lie_within_the_masses_below_the_largest_budget() -> None:
    found = usual_thresholds(telling())
    assert found == tuple(sorted(set(found)))
    assert 0.3 <= found[0] <= found[-1] <= 0.95
    assert usual_thresholds(budgets(np.zeros((3, 3)), np.ones((3, 3)))) == ()


def test_masses_that_tell_easy_images_gain_over_fixed_budgets() -> None:
    (found,) = evaluate_thresholds(telling(), [0.6], Resampler.of(IMAGES, 0))
    assert found.shares == (0.5, 0.0, 0.5)
    assert (found.tokens, found.agreement.mean) == (5.0, 1.0)
    assert found.fixed_agreement == pytest.approx(0.6 + (1.0 - 0.6) * (5 - 2) / (8 - 2))  # 2 and 8 mixed: more than 4 and 8, 0.775
    assert found.gain.mean == pytest.approx(1.0 - found.fixed_agreement)
    assert found.above
    assert found.accuracy == found.agreement


def test_masses_that_tell_nothing_gain_nothing() -> None:
    made = blind()
    found = evaluate_thresholds(made, usual_thresholds(made), Resampler.of(IMAGES, 0))
    assert found
    assert not any(row.above for row in found)
    assert choose_threshold(found, Rule(avg_keep=100), measured("trace", 2, 2, 0.2, 0.1), rows()) is None


def test_one_budget_for_all_images_is_no_gain() -> None:
    for threshold in (0.01, 1.0):  # all take the smallest, all the largest
        (found,) = evaluate_thresholds(telling(), [threshold], Resampler.of(IMAGES, 0))
        assert found.gain.mean == pytest.approx(0, abs=1e-12)
        assert not found.above


def test_more_thresholds_make_wider_intervals_and_one_image_has_none() -> None:
    resampler = Resampler.of(IMAGES, 0)
    alone = evaluate_thresholds(blind(), [0.6], resampler)[0].gain.interval
    among = evaluate_thresholds(blind(), [0.6, 0.5, 0.4, 0.3, 0.2], resampler)[0].gain.interval
    assert alone is not None
    assert among is not None
    assert among[0] < alone[0] < alone[1] < among[1]
    one = ImageBudgets(KEEPS, np.array([[0.1, 0.2, 1.0]]), np.array([[1.0, 2.0, 3.0]]), np.zeros((1, 3)), np.full(1, 4.0), np.zeros(1))
    (found,) = evaluate_thresholds(one, [0.15], Resampler.of(1, 0))
    assert (found.gain.interval, found.above, found.accuracy) == (None, False, None)


# ---------------------------------------------------------------- the choice


def rows() -> list[Measured]:
    return [measured("trace", 2, keep, keep / 10, 0.9, average_keep=float(10 + keep), ms=float(keep)) for keep in (2, 4, 8)]


def threshold(value: float, shares: tuple[float, float, float], agreement: float, gain: float) -> Threshold:
    tokens = float(np.dot(shares, KEEPS))
    return Threshold(value, shares, tokens, figure(agreement, 0.01), agreement - gain, figure(gain, 0.02), None, None, None)


FOUND = [
    threshold(0.3, (0.75, 0.25, 0), 0.90, 0.05),  # 2.5 tokens
    threshold(0.4, (0.5, 0.25, 0.25), 0.95, 0.05),  # 4.0
    threshold(0.5, (0.25, 0.25, 0.5), 0.97, 0.03),  # 5.5
    threshold(0.6, (0, 0.25, 0.75), 0.99, 0.01),  # 7.0, not above fixed budgets
]


@pytest.mark.parametrize(
    ("rule", "fixed_keep", "fixed_agreement", "chosen"),
    [
        (Rule(min_agreement=93), 8, 0.96, 0.4),
        (Rule(min_agreement=89), 8, 0.96, 0.3),
        (Rule(min_agreement=95), 8, 0.96, 0.5),
        (Rule(min_agreement=97), 8, 0.98, None),  # only the one that is not above
        (Rule(min_agreement=93), 4, 0.96, None),  # as many tokens as the fixed one
        (Rule(avg_keep=14.0), 4, 0.90, 0.4),
        (Rule(avg_keep=13.9), 4, 0.80, 0.3),
        (Rule(avg_keep=14.0), 4, 0.96, None),  # the fixed one agrees more
        (Rule(max_ttft_ms=5.5), 4, 0.90, 0.5),
        (Rule(max_ttft_ms=2.4), 2, 0.80, None),
    ],
)
def test_the_rule_picks_among_thresholds_above_fixed_budgets(
    rule: Rule, fixed_keep: int, fixed_agreement: float, chosen: float | None
) -> None:
    fixed = measured("trace", 2, fixed_keep, 0.5, fixed_agreement)
    found = choose_threshold(FOUND, rule, fixed, rows())
    assert (None if found is None else found.threshold) == chosen


def test_a_bundle_chooses_as_the_calibration_did() -> None:
    from runtime.budgets import choose_budget, kept_mass

    rng = np.random.default_rng(0)
    scores, keeps, nothing = rng.random((50, 64)) ** 4, np.array([4, 7, 12]), np.zeros((50, 3))
    masses = np.stack([kept_mass(row)[keeps - 1] for row in scores])
    budgets = ImageBudgets(keeps, masses, nothing, nothing, nothing[:, 0], nothing[:, 0])
    for threshold in (0.1, float(np.median(masses)), 0.99):
        assert keeps[budgets.assigned(threshold)].tolist() == [choose_budget(row, keeps.tolist(), threshold) for row in scores]
