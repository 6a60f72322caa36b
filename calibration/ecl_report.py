"""What finding the collapse layer has to say: the evidence in the plan, and the table on stdout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from calibration.activations import Probe
from calibration.audit import HEADROOM, PrecisionAudit
from calibration.collapse import Collapse, CollapseRule
from calibration.collection import Collection

__all__ = ["describe_collapse", "make_evidence", "short_subject", "subject"]

LISTED = 10  # skipped files named on stdout; the plan has them all


def make_evidence(
    found: Collapse, rule: CollapseRule, given: int | None, collection: Collection, audit: PrecisionAudit, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The plan's evidence as JSON data.

    Args:
        given: a split layer given by hand, which the plan holds in place of the rule's.
        settings: what the numbers depend on besides images and model.
    """
    collapse = {
        "rule": dataclasses.asdict(rule), "layer": found.layer, "split_layer_given": given, "entropy_falls": found.falls,
        "recovers_at": found.recovers_at,
        "runner_up": found.runner_up, "margin": found.margin, "margin_interval_95": _listed(found.margin_interval),
        "resample_share": found.resample_share, "image_share": found.image_share, "candidates": [1, found.candidates],
        "mean": list(found.mean), "std": list(found.std), "drops": list(found.drops),
    }  # fmt: skip
    return {
        "settings": dict(settings),
        "collapse": collapse,
        "audit": {
            "largest": {name: list(values) for name, values in audit.largest.items()}, "tensor": audit.tensor, "layer": audit.layer,
            "value": audit.value, "headroom": HEADROOM, "fits_fp16": audit.fits_fp16, "summary": audit.describe(),
        },
        "images": {
            "used": len(collection.records), "repeated": list(collection.repeated),
            "skipped": [{"name": name, "reason": reason} for name, reason in collection.skipped],
            "list": [{"name": record.name, "sha256": record.image} for record in collection.records],
        },
    }  # fmt: skip


def describe_collapse(
    found: Collapse, rule: CollapseRule, given: int | None, collection: Collection, audit: PrecisionAudit, probe: Probe
) -> str:
    """The table and the sentences under it."""
    count = len(collection.records)
    tokens = sorted({record.visual_tokens for record in collection.records})
    visual = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
    lines = [
        f"{subject(probe)}; {visual} visual tokens, {_count(count, 'image')}",
        f"{'index':>7}{'entropy':>10}{'spread':>10}{'drop':>10}",
    ]
    split = found.layer if given is None else given
    for index, (mean, std) in enumerate(zip(found.mean, found.std, strict=True)):
        drop = f"{found.drops[index - 1]:>10.4f}" if index else " " * 10
        marks = [f"  <- split K = {index}"] * (index == split) + [f"  <- {rule.name} would choose {index}"] * (
            index == found.layer != split
        )
        lines.append(f"{index:>7}{mean:>10.4f}{std if count > 1 else 0:>10.4f}{drop}{''.join(marks)}".rstrip())
    return "\n".join([*lines, *_verdict(found, rule, given), f"activations: {audit.describe()}", *_files(collection)])


def subject(probe: Probe) -> str:
    """What the curve is of, in words."""
    e = probe.entropy
    what = "hidden states entering layer l" if probe.tensor == "hidden" else f"{probe.tensor} projections of layer l"
    matrix = "over tokens" if probe.matrix == "tokens" else "over each token's heads"
    steps = ["centred" if e.centre else "not centred", "rows normalised" if e.normalise_rows else "rows not normalised"]
    return f"entropy {matrix} of the {what} ({', '.join(steps)}, {'trace 1' if e.normalise_trace else 'raw'})"


def short_subject(probe: Probe) -> str:
    """The same for a picture's title."""
    what = "hidden states entering each layer" if probe.tensor == "hidden" else f"{probe.tensor} projections of each layer"
    return f"matrix entropy of the {what}" + (" (per token, over its heads)" if probe.matrix == "heads" else "")


def _verdict(found: Collapse, rule: CollapseRule, given: int | None) -> list[str]:
    threshold = "" if rule.threshold is None else f" above {rule.threshold:g}"
    lines = []
    if given is not None:
        lines.append(f"split K = {given}, given by hand; {rule.name}{threshold} would choose {found.layer}")
    line = f"{rule.name}{threshold}: layer {found.layer} of 1..{found.candidates}, a drop of {found.drops[found.layer - 1]:.4f}"
    if found.margin is not None and found.runner_up is not None:
        over = "of the threshold" if rule.threshold is not None else f"over layer {found.runner_up}"
        line += f"; margin {found.margin:.4f} {over}"
    if found.margin_interval is not None:
        line += f", 95 % interval [{found.margin_interval[0]:.4f}, {found.margin_interval[1]:.4f}]"
    lines.append(line)
    if not found.falls:
        lines.append("no layer searched loses entropy: the chosen one gains least, which is no collapse; choose by accuracy instead")
    elif found.recovers_at is not None:
        level = f"the entropy is back at its level before the drop at index {found.recovers_at}"
        lines.append(f"{level}: a dip, not a lasting collapse; check by accuracy")
    if found.images == 1 or found.resample_share is None:
        lines.append("one image: no interval, and no telling whether other images agree; give more")
    else:
        lines.append(f"chosen by {found.image_share:.1%} of the images by themselves, by {found.resample_share:.1%} of 2000 resamples")
    return lines


def _files(collection: Collection) -> list[str]:
    lines = []
    if collection.resumed:
        lines.append(f"{_count(collection.resumed, 'image')} measured by an earlier run of the same settings")
    if collection.repeated:
        lines.append(f"{_count(len(collection.repeated), 'file')} counted once with an identical one: {_few(collection.repeated)}")
    if collection.skipped:
        lines.append(f"{_count(len(collection.skipped), 'file')} skipped:")
        lines += [f"  {reason}" for _, reason in collection.skipped[:LISTED]]
        lines += [f"  and {len(collection.skipped) - LISTED} more, listed in the plan"] * (len(collection.skipped) > LISTED)
    return lines


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _listed(pair: tuple[float, float] | None) -> list[float] | None:
    return None if pair is None else list(pair)
