"""What the report says about a choice: better than the controls or not, and what became of budgets per image."""

from __future__ import annotations

import pytest

from calibration.agreement import Agreement
from calibration.agreement_collection import AgreementRecord, Collected
from calibration.budget_report import Decision, PerImage, describe_decision
from calibration.budget_tables import Comparison, Results
from calibration.grid import Grid
from calibration.pareto import Rule
from calibration.per_image import Threshold
from calibration.resampling import Figure, Resampler
from export.configs import load_model_config
from tests.calibration.asking import figure, measured

GRID = Grid(("trace", "random"), ("random",), (2,), (8, 4))


def record(name: str, agreeing: tuple[int, ...], positions: int = 10, mass: tuple[float, ...] = (0.5,) * 4) -> AgreementRecord:
    found = Agreement(2, 1, positions, 26, 1, (0.1,) * 4, agreeing, (1,) * 4, (1,) * 4, mass)
    return AgreementRecord(name, name, name, found)


def results(*records: AgreementRecord) -> Results:
    spec = load_model_config("llava15").spec
    assert spec is not None
    return Results(GRID, records, spec, Resampler.of(len(records), 0), None)


MADE = results(record("a", (10, 8, 6, 8)), record("b", (9, 9, 7, 7), positions=20))  # trace 8, random 8, trace 4, random 4


def test_figures_are_over_positions_not_over_images() -> None:
    rows = {(row.setting.mode, row.setting.keep): row for row in MADE.rows()}
    assert rows["trace", 8].agreement.mean == 19 / 30
    assert rows["random", 4].agreement.mean == 15 / 30
    assert rows["trace", 4].kl.mean == pytest.approx(0.2 / 30)
    assert (rows["trace", 8].unchanged.mean, rows["trace", 8].mass, MADE.text_tokens) == (0.5, 0.5, 13)
    assert [row.setting.keep for row in MADE.rows()] == [4, 4, 8, 8]


def test_a_control_is_compared_at_the_same_split_and_keep_image_by_image() -> None:
    (one,) = MADE.compare(GRID.settings()[2])
    assert (one.control, one.difference.mean) == ("random", (6 - 8 + 7 - 7) / 30)
    assert one.difference.interval is not None
    assert one.difference.interval == pytest.approx((-0.2, 0.0))


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (
            Figure(0.02, (0.01, 0.03)),
            "  better than the control random at the same split and keep: +2.00 points [+1.00, +3.00] of agreement",
        ),
        (Figure(0.02, (-0.01, 0.05)), "  not shown to be better than the control random at the same split and keep: +2.00 points"),
        (Figure(-0.02, (-0.03, -0.01)), "  worse than the control random at the same split and keep: -2.00 points"),
        (Figure(0.02, None), "  not shown to be better than the control random at the same split and keep: +2.00 points of agreement"),
    ],
)
def test_the_verdict_on_a_control_follows_the_interval(difference: Figure, words: str) -> None:
    decision = Decision(Rule(avg_keep=9), measured("trace", 2, 4, 0.3, 0.9), (Comparison("random", difference),), None)
    assert words in describe_decision(MADE, decision, Collected(MADE.records, (), (), 0))


def test_every_mode_is_counted_beside_the_controls() -> None:
    said = describe_decision(MADE, None, Collected(MADE.records, (), (), 0))
    assert "trace beside random: agreement above at 0 of 2 splits and budgets, below (one of) them at 0, by 95 % intervals" in said
    made = results(record("a", (10, 8, 6, 8)), record("b", (9, 8, 5, 7)))
    assert "above at 1 of 2 splits and budgets, below (one of) them at 1," in describe_decision(
        made, None, Collected(made.records, (), (), 0)
    )


def threshold(gain: Figure) -> Threshold:
    return Threshold(0.5, (0.5, 0.5), 6.0, figure(0.9, 0.01), 0.8, gain, None, None, None)


def test_what_became_of_budgets_per_image_is_said_plainly() -> None:
    above, level = threshold(Figure(0.1, (0.05, 0.15))), threshold(Figure(0.1, (0.0, 0.2)))

    def said(*thresholds: Threshold, chosen: Threshold | None = None) -> str:
        decision = Decision(Rule(avg_keep=9), measured("trace", 2, 8, 0.3, 0.9), (), PerImage((4, 8), thresholds, chosen))
        return describe_decision(MADE, decision, Collected(MADE.records, (), (), 0))

    assert "do not agree more than fixed ones at the same average: auto_keep stays unset" in said(level)
    assert "agree more than fixed ones at 1 of 2 thresholds, but at none of these is --avg-keep 9 met better" in said(above, level)
    text = said(above, level, chosen=above)
    assert "agree more than fixed ones at 1 of 2 thresholds: auto_keep 0.5" in text
    assert text.count("<- auto_keep") == 1
