"""What a budget calibration has to say: the table and the sentences on stdout, and the evidence in the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibration.agreement_collection import Collected
from calibration.budget_tables import Comparison, Results
from calibration.pareto import Measured, Rule, front
from calibration.per_image import Threshold
from calibration.resampling import Figure
from runtime.units import format_bytes

__all__ = ["Decision", "PerImage", "describe_decision", "describe_grid", "make_evidence"]

BETTER, WORSE = "better than", "worse than"
LISTED = 10  # skipped files named on stdout; the evidence has them all


@dataclass(frozen=True, slots=True)
class PerImage:
    """Budgets ascending, what each threshold gives, and the chosen one (None: budgets stay fixed)."""

    budgets: tuple[int, ...]
    thresholds: tuple[Threshold, ...]
    chosen: Threshold | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What a rule chose, beside the controls; `per_image` only where it was asked for."""

    rule: Rule
    chosen: Measured
    comparisons: tuple[Comparison, ...]
    per_image: PerImage | None


def make_evidence(
    results: Results, rows: Sequence[Measured], decision: Decision | None, collected: Collected, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The evidence as JSON data: everything that the report shows, without rounding."""
    best = {row.setting for row in front(rows)}
    unpruned = results.unpruned_accuracy
    return {
        "settings": dict(settings),
        "measured": {
            "images": len(collected.records), "questions": results.questions, "labelled": results.labelled,
            "positions": results.positions, "text_tokens": results.text_tokens,
            "unpruned_accuracy": None if unpruned is None else dataclasses.asdict(unpruned),
        },
        "table": [dataclasses.asdict(row) | {"pareto": row.setting in best, "compared": _compared(results, row)} for row in rows],
        "rule": None if decision is None else dataclasses.asdict(decision.rule),
        "chosen": None if decision is None else dataclasses.asdict(decision.chosen.setting),
        "per_image": None if decision is None or decision.per_image is None else dataclasses.asdict(decision.per_image),
        "images": {
            "repeated": list(collected.repeated),
            "skipped": [{"name": name, "reason": reason} for name, reason in collected.skipped],
            "list": [{"name": record.name, "sha256": record.image} for record in collected.records],
        },
    }  # fmt: skip


def _compared(results: Results, row: Measured) -> list[dict[str, Any]]:
    return [] if row.control else [dataclasses.asdict(one) for one in results.compare(row.setting)]


# ---------------------------------------------------------------- the table


def describe_grid(results: Results, rows: Sequence[Measured], chosen: Measured | None) -> str:
    """The table: one line a setting, by ascending FLOPs."""
    timed, labelled = results.first_tokens is not None, results.labelled > 0
    best = {row.setting for row in front(rows)}
    lines = [
        f"{_count(len(results.records), 'image')}, {_count(results.questions, 'question')} ({results.labelled} with a label), "
        f"{_count(results.positions, 'answer position')}; {results.spec.vision.visual_tokens} visual and {results.text_tokens} text tokens",
    ]
    if results.unpruned_accuracy is not None:
        lines.append(f"the unpruned model gives the label of {_percent(results.unpruned_accuracy, 'of them')}")
    lines.append(
        f"{'mode':<13}{'K':>3}{'keep':>6}{'average':>9}{'FLOPs %':>9}{'visual':>8}{'KV':>10}" + f"{'first ms':>11}" * timed
        + f"{'KL nats':>10}{'agreement %':>23}{'whole %':>9}" + f"{'accuracy %':>23}" * labelled + f"{'mass':>7}"
    )  # fmt: skip
    for row in rows:
        marks = ["*"] * (row.setting in best) + ["control"] * row.control
        marks += ["<- chosen"] * (chosen is not None and row.setting == chosen.setting)
        lines.append(f"{_cells(row, timed, labelled)}  {' '.join(marks)}".rstrip())
    lines.append(
        "* on the Pareto front of FLOPs and agreement; controls are shown and compared with, never chosen unless --modes names them"
    )
    lines.append(
        f"FLOPs: matrix products of the decoder's prefill, of the unpruned ones, with {results.text_tokens} text tokens; visual: without"
    )
    if timed:
        lines.append("first: time to first token; ~ estimated from the nearest profile by FLOPs, otherwise measured")
    return "\n".join(lines)


def _cells(row: Measured, timed: bool, labelled: bool) -> str:
    s = row.setting
    first = ""
    if timed and row.first_token is not None:
        first = f"{'' if row.first_token.measured else '~'}{row.first_token.ms:.2f}".rjust(11)
    accuracy = f"{_cell(row.accuracy):>23}" if labelled and row.accuracy is not None else ""
    return (
        f"{s.mode:<13}{s.split_layer:>3}{s.keep:>6}{row.average_keep:>9.1f}{100 * row.flops_share:>9.1f}"
        f"{100 * row.flops_share_visual:>8.1f}{format_bytes(row.kv_bytes):>10}{first}{row.kl.mean:>10.4f}{_cell(row.agreement):>23}"
        f"{100 * row.unchanged.mean:>9.1f}{accuracy}{row.mass:>7.3f}"
    )


def _cell(figure: Figure) -> str:
    interval = "" if figure.interval is None else f" [{100 * figure.interval[0]:.1f}, {100 * figure.interval[1]:.1f}]"
    return f"{100 * figure.mean:.1f}{interval}"


# ---------------------------------------------------------------- the sentences


def describe_decision(results: Results, decision: Decision | None, collected: Collected) -> str:
    """What was chosen and why, what controls do there, per-image budgets, and which images were passed over."""
    lines = []
    if len(results.records) == 1:
        lines.append("one image: there are no intervals, and the figures say nothing about other images")
    else:
        lines += _beside_controls(results)
    if decision is None:
        lines.append("no rule was given, so nothing is chosen and no plan is written: add --min-agreement, --max-ttft-ms or --avg-keep")
    else:
        lines += _chosen(decision)
        if decision.per_image is not None:
            lines += _per_image(decision.per_image, decision.rule)
    if collected.resumed:
        lines.append(f"{_count(collected.resumed, 'image')} from an earlier run")
    if collected.repeated:
        lines.append(
            f"{_count(len(collected.repeated), 'file')} counted once with an identical one: {', '.join(collected.repeated[:LISTED])}"
        )
    if collected.skipped:
        lines.append(f"{_count(len(collected.skipped), 'image')} skipped:")
        lines += [f"  {reason}" for _, reason in collected.skipped[:LISTED]]
        lines += [f"  and {len(collected.skipped) - LISTED} more, listed by --json"] * (len(collected.skipped) > LISTED)
    return "\n".join(lines)


def _beside_controls(results: Results) -> list[str]:
    """For each mode that may be chosen, how often its agreement is above or below the controls', beyond chance."""
    lines = []
    for mode in (mode for mode in results.grid.modes if mode not in results.grid.controls):
        found = [results.compare(setting) for setting in results.grid.settings() if setting.mode == mode]
        verdicts = [[_verdict(one.difference) for one in comparisons] for comparisons in found]
        above = sum(all(verdict == BETTER for verdict in one) for one in verdicts)
        below = sum(any(verdict == WORSE for verdict in one) for one in verdicts)
        controls = " and ".join(one.control for one in found[0])
        lines.append(
            f"{mode} beside {controls}: agreement above at {above} of {len(found)} splits and budgets, below (one of) them at {below}, "
            "by 95 % intervals"
        )
    return lines


def _chosen(decision: Decision) -> list[str]:
    row, rule = decision.chosen, decision.rule
    by = ""
    if rule.cheapest:
        by = ", by the mean, for want of an interval" if row.agreement.interval is None else ", by the 95 % interval's lower bound"
    elif rule.max_ttft_ms is not None and row.first_token is not None:
        by = f", {row.first_token.ms:.2f} ms {'measured' if row.first_token.measured else 'estimated'}"
    lines = [
        f"{rule.option}{by}: {row.setting.describe()}; agreement {_percent(row.agreement)}, "
        f"{100 * row.flops_share:.1f} % of the FLOPs, {row.average_keep:.1f} visual tokens averaged over the layers"
    ]
    for one in decision.comparisons:
        verdict = _verdict(one.difference)
        lines.append(f"  {verdict} the control {one.control} at the same split and keep: {_points(one.difference)} of agreement")
    return lines


def _verdict(difference: Figure) -> str:
    low, high = difference.interval or (0.0, 0.0)
    return BETTER if low > 0 else WORSE if high < 0 else "not shown to be better than"


def _per_image(found: PerImage, rule: Rule) -> list[str]:
    budgets = ", ".join(map(str, found.budgets))
    labelled = any(row.accuracy is not None for row in found.thresholds)
    lines = [
        f"budgets per image ({budgets}): each image takes the smallest that keeps the share T of its score mass",
        f"{'T':>8}{'average':>9}{'images per budget, %':>24}{'agreement %':>23}{'fixed':>8}{'gain, points':>23}"
        + f"{'accuracy %':>23}{'fixed':>8}{'gain, points':>23}" * labelled,
    ]
    for row in found.thresholds:
        shares = " / ".join(f"{100 * share:.0f}" for share in row.shares)
        line = f"{row.threshold:>8.4f}{row.tokens:>9.1f}{shares:>24}{_against(row.agreement, row.fixed_agreement, row.gain)}"
        if row.accuracy is not None and row.fixed_accuracy is not None and row.accuracy_gain is not None:
            line += _against(row.accuracy, row.fixed_accuracy, row.accuracy_gain)
        lines.append(line + "  <- auto_keep" * (found.chosen == row))
    lines.append(
        "fixed: the best blind mix of two fixed budgets with the same average; gains: paired over images, 95 % intervals for all "
        "thresholds together"
    )
    above, count = sum(row.above for row in found.thresholds), len(found.thresholds)
    better = f"budgets per image agree more than fixed ones at {above} of {count} thresholds"
    if found.chosen is not None:
        lines.append(f"{better}: auto_keep {found.chosen.threshold:g}")
    elif above:
        lines.append(f"{better}, but at none of these is {rule.option} met better than by the fixed budget: auto_keep stays unset")
    else:
        lines.append("budgets per image do not agree more than fixed ones at the same average: auto_keep stays unset")
    return lines


def _against(figure: Figure, fixed: float, gain: Figure) -> str:
    interval = "" if gain.interval is None else f" [{100 * gain.interval[0]:+.2f}, {100 * gain.interval[1]:+.2f}]"
    return f"{_cell(figure):>23}{100 * fixed:>8.1f}{f'{100 * gain.mean:+.2f}{interval}':>23}"


def _percent(figure: Figure, of: str = "") -> str:
    interval = "" if figure.interval is None else f" [{100 * figure.interval[0]:.2f}, {100 * figure.interval[1]:.2f}]"
    return f"{100 * figure.mean:.2f} %{f' {of}' if of else ''}{interval}"


def _points(figure: Figure) -> str:
    interval = "" if figure.interval is None else f" [{100 * figure.interval[0]:+.2f}, {100 * figure.interval[1]:+.2f}]"
    return f"{100 * figure.mean:+.2f} points{interval}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
