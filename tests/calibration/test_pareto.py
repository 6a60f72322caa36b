"""The Pareto front and the choice by each rule, on made-up tables."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.grid import make_grid
from calibration.pareto import Rule, choose, front
from calibration.resampling import Resampler
from export.configs import load_model_config
from export.spec import ModelSpec
from runtime import names
from runtime.errors import UsageError
from tests.calibration.asking import figure, measured

TABLE = [
    measured("trace", 2, 4, 0.30, figure(0.90, 0.03), ms=10.0),
    measured("row", 2, 4, 0.30, figure(0.88, 0.03), ms=10.0),
    measured("trace", 2, 8, 0.40, figure(0.97, 0.02), ms=14.0),
    measured("trace", 3, 4, 0.45, figure(0.96, 0.00), ms=16.0),
    measured("trace", 3, 8, 0.55, figure(0.99, 0.005), ms=20.0),
    measured("random", 2, 4, 0.30, figure(1.0, 0.0), ms=10.0, control=True),
]


def test_the_front_holds_what_nothing_beats() -> None:
    assert [row.setting.keep + 10 * row.setting.split_layer for row in front(TABLE)] == [24, 28, 38]
    assert front(TABLE[::-1]) == front(TABLE)


def test_equal_settings_are_both_on_the_front() -> None:
    both = [measured("trace", 2, 4, 0.3, 0.9), measured("row", 2, 4, 0.3, 0.9), measured("raw", 2, 8, 0.4, 0.9)]
    assert {row.setting.mode for row in front(both)} == {"trace", "row"}


@pytest.mark.parametrize(
    ("rule", "split", "keep"),
    [
        (Rule(min_agreement=95), 2, 8),  # 0.97 - 0.02, and cheaper than 0.96 - 0
        (Rule(min_agreement=95.5), 3, 4),
        (Rule(min_agreement=85), 2, 4),
        (Rule(max_ttft_ms=15), 2, 8),
        (Rule(max_ttft_ms=16), 2, 8),
        (Rule(max_ttft_ms=1e6), 3, 8),
        (Rule(avg_keep=4), 3, 4),
        (Rule(avg_keep=7.9), 3, 4),
        (Rule(avg_keep=8), 3, 8),
    ],
)
def test_each_rule_chooses_its_setting(rule: Rule, split: int, keep: int) -> None:
    for table in (TABLE, TABLE[::-1]):
        chosen = choose(table, rule).setting
        assert (chosen.mode, chosen.split_layer, chosen.keep) == ("trace", split, keep)


def test_without_an_interval_the_mean_decides() -> None:
    rows = [measured("trace", 2, 4, 0.3, figure(0.9)), measured("trace", 2, 8, 0.4, figure(0.95, 0.1))]
    assert choose(rows, Rule(min_agreement=89)).setting.keep == 4
    with pytest.raises(UsageError, match=r"nearest: trace, split 2, keep 4 \(agreement 90\.00 %\): ask for less"):
        choose(rows, Rule(min_agreement=91))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Rule(min_agreement=99.5),
            r"no setting meets --min-agreement 99\.5; nearest: trace, split 3, keep 8 \(agreement 99\.00 %, 95 % int",
        ),
        (Rule(max_ttft_ms=9), r"no setting meets --max-ttft-ms 9; nearest: trace, split 2, keep 4 \(first token after 10\.00 ms\): allow"),
        (Rule(avg_keep=3), r"no setting meets --avg-keep 3; nearest: trace, split 3, keep 4 \(average 4\.00 visual tokens\): allow more"),
    ],
)
def test_where_nothing_fits_the_nearest_is_named(rule: Rule, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose(TABLE, rule)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((None, None, None), "give one of --min-agreement, --max-ttft-ms and --avg-keep"),
        ((90, None, 5), "give one of"),
        ((0, None, None), "--min-agreement is 0, expected percent, above 0 and up to 100"),
        ((101, None, None), "--min-agreement is 101"),
        ((float("nan"), None, None), "--min-agreement is nan"),
        ((None, -1, None), "--max-ttft-ms is -1, expected a number above 0"),
        ((None, None, float("inf")), "--avg-keep is inf, expected a number above 0"),
    ],
)
def test_a_rule_that_makes_no_sense_is_told(values: tuple[float | None, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Rule(*values)


# ---------------------------------------------------------------- grid and resampling


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    found = load_model_config("llava15").spec
    assert found is not None
    return found


def test_the_usual_grid_has_the_controls_beside_the_mode_and_percentages_of_n(spec: ModelSpec) -> None:
    grid = make_grid(spec, "row", (0, 1, 2, 32))
    assert set(grid.modes) == {"row", "random", "uniform"} | ({"dpp"} & set(names.SCORE_MODES))
    assert (grid.controls, grid.splits, grid.keeps) == (("random", "uniform"), (1, 2), (288, 190, 127, 63, 32))
    assert len(set(grid.settings())) == len(grid.settings()) == len(grid.modes) * 2 * 5


def test_a_mode_of_the_future_is_tried_as_soon_as_it_is_there(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.grid.SCORE_MODES", (*[mode for mode in names.SCORE_MODES if mode != "dpp"], "dpp"))
    monkeypatch.setattr("export.exact_score.SCORE_MODES", (*[mode for mode in names.SCORE_MODES if mode != "dpp"], "dpp"))
    assert "dpp" in make_grid(spec, "trace", (2,)).modes


def test_a_control_that_is_named_is_none_and_what_is_given_replaces_what_is_usual(spec: ModelSpec) -> None:
    grid = make_grid(spec, "row", (2,), modes=("trace", "uniform"), splits=(3, 1), keeps=(5, 9, 5), more_keeps=(7,))
    assert (grid.modes, grid.controls) == (("trace", "random", "uniform"), ("random",))
    assert (grid.splits, grid.keeps) == ((1, 3), (9, 7, 5))


def test_an_interval_holds_the_mean_and_is_the_same_for_the_same_seed() -> None:
    rng = np.random.default_rng(1)
    good, total = rng.integers(0, 5, 40), np.full(40, 4)
    found = Resampler.of(40, 3).ratio(good, total)
    assert found == Resampler.of(40, 3).ratio(good, total)
    assert found != Resampler.of(40, 4).ratio(good, total)
    assert found.interval is not None
    assert found.interval[0] < found.mean == good.sum() / 160 < found.interval[1]
    assert found.interval[1] - found.interval[0] == pytest.approx(2 * 1.96 * (good / 4).std() / 40**0.5, rel=0.1)
    alone = Resampler.of(1, 0).ratio([3], [4])
    assert (alone.mean, alone.interval, alone.sure) == (0.75, None, 0.75)


def test_images_without_a_label_do_not_spoil_the_interval() -> None:
    found = Resampler.of(3, 0).ratio([1, 0, 0], [2, 0, 0])
    assert (found.mean, found.interval) == (0.5, (0.5, 0.5))
