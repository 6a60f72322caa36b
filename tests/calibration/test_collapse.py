"""Rules that choose the collapse layer, on curves whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.collapse import RESAMPLES, CollapseRule, find_collapse
from runtime.errors import UsageError

LARGEST, RELATIVE = CollapseRule(), CollapseRule("relative-drop")
#                 l = 0    1     2     3     4     5     6     7     8
CURVE = np.array([0.90, 0.80, 0.78, 0.50, 0.48, 0.20, 0.19, 0.05, 0.04])


def noisy(count: int, spread: float, seed: int = 0) -> np.ndarray:
    return CURVE + np.random.default_rng(seed).normal(0, spread, (count, len(CURVE)))


def test_the_largest_drop_of_the_first_half_is_chosen() -> None:
    found = find_collapse([CURVE], 8, LARGEST)
    assert (found.layer, found.runner_up, found.candidates) == (3, 1, 4)  # the drop at 5 is larger, and too late
    assert found.margin == pytest.approx(0.28 - 0.10)
    assert found.drops == pytest.approx((0.1, 0.02, 0.28, 0.02, 0.28, 0.01, 0.14, 0.01))
    assert find_collapse([CURVE], 6, LARGEST).layer == 3
    assert find_collapse([CURVE], 4, LARGEST).layer == 1


def test_a_relative_drop_compares_with_what_was_there() -> None:
    curve = [1.0, 0.7, 0.6, 0.35, 0.34]  # drops 0.3, 0.1, 0.25; relative 0.3, 0.14, 0.42
    assert find_collapse([curve], 6, LARGEST).layer == 1
    found = find_collapse([curve], 6, RELATIVE)
    assert found.layer == 3
    assert found.margin == pytest.approx(0.25 / 0.6 - 0.3)
    assert find_collapse([[0.0, 0.0, 0.0]], 4, RELATIVE).layer == 1


def test_the_first_drop_above_a_threshold_is_chosen() -> None:
    assert find_collapse([CURVE], 8, CollapseRule("first-drop", 0.05)).layer == 1
    found = find_collapse([CURVE], 8, CollapseRule("first-drop", 0.12))
    assert found.layer == 3
    assert found.margin == pytest.approx(0.02)  # layer 1 lacks 0.02 to the threshold
    with pytest.raises(UsageError, match=r"no layer of 1\.\.4 drops by more than --threshold 0\.5; the largest drop is 0\.28, at layer 3"):
        find_collapse([CURVE], 8, CollapseRule("first-drop", 0.5))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("first-drop", None), "--rule first-drop needs --threshold"),
        (("largest-drop", 0.1), "--rule largest-drop takes no --threshold"),
        (("first-drop", 1.5), "--threshold 1.5 is out of range"),
        (("first-drop", float("nan")), "--threshold nan is out of range"),
    ],
)
def test_thresholds_belong_to_one_rule(rule: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CollapseRule(*rule)


def test_the_bootstrap_says_how_sure_the_choice_is() -> None:
    sure = find_collapse(noisy(30, 0.01), 8, LARGEST)
    assert (sure.layer, sure.image_share, sure.resample_share) == (3, 1.0, 1.0)
    assert sure.margin is not None
    assert sure.margin_interval is not None
    assert sure.margin_interval[0] < sure.margin < sure.margin_interval[1]
    assert sure.std[3] == pytest.approx(noisy(30, 0.01)[:, 3].std(ddof=1))
    unsure = find_collapse(noisy(6, 0.3), 8, LARGEST)
    assert unsure.image_share < 1
    assert unsure.resample_share is not None
    assert unsure.resample_share < 0.999
    assert unsure.margin_interval is not None
    assert unsure.margin_interval[0] < 0  # another layer would win in some resamples


def test_the_interval_covers_the_true_margin_about_as_often_as_it_says() -> None:
    true = 0.18
    hits = 0
    for seed in range(60):
        low, high = find_collapse(noisy(40, 0.02, seed), 8, LARGEST).margin_interval or (0.0, 0.0)
        hits += low <= true <= high
    assert 50 <= hits <= 60


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    curves = noisy(12, 0.05)
    assert find_collapse(curves, 8, LARGEST, seed=1) == find_collapse(curves, 8, LARGEST, seed=1)
    assert find_collapse(curves, 8, LARGEST, seed=1).margin_interval != find_collapse(curves, 8, LARGEST, seed=2).margin_interval


def test_one_image_has_no_interval() -> None:
    found = find_collapse([CURVE], 8, LARGEST)
    assert (found.margin_interval, found.resample_share, found.image_share) == (None, None, 1.0)
    assert set(found.std) == {0.0}


def test_one_candidate_has_no_runner_up() -> None:
    found = find_collapse([[0.9, 0.5, 0.4], [0.8, 0.5, 0.4]], 2, LARGEST)
    assert (found.layer, found.runner_up, found.margin, found.margin_interval) == (1, None, None, None)
    assert found.resample_share == 1.0


def test_a_curve_that_only_rises_is_no_collapse() -> None:
    found = find_collapse([[0.1, 0.2, 0.25, 0.6, 0.7]], 6, LARGEST)
    assert (found.layer, found.falls) == (2, False)
    assert find_collapse([CURVE], 8, LARGEST).falls


def test_a_dip_that_later_layers_take_back_is_told_from_a_collapse() -> None:
    assert find_collapse([[0.5, 0.3, 0.4, 0.5, 0.6]], 4, LARGEST).recovers_at == 3
    assert find_collapse([[0.5, 0.3, 0.4, 0.45, 0.49]], 4, LARGEST).recovers_at is None


def test_curves_that_end_early_are_refused() -> None:
    with pytest.raises(UsageError, match=r"curves of shape \[1, 9\] do not reach layer 10, half of 20"):
        find_collapse([CURVE], 20, LARGEST)


def test_equal_drops_give_the_earlier_layer() -> None:
    assert find_collapse([[4.0, 3.0, 2.0, 1.0]], 6, LARGEST).layer == 1
    assert RESAMPLES >= 1000  # enough for the tails of a 95 % interval
