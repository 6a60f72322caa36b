"""Settings with their cost and what they keep of the model's answers; the Pareto front of the two, and the choice of one by a rule.

    min-agreement P    the cheapest setting whose agreement is at least P percent, by its interval's lower bound where it has one
    max-ttft-ms T      the best agreement among those whose first token comes within T milliseconds
    avg-keep A         the best agreement among those that keep at most A visual tokens, averaged over all layers

Controls are never chosen and are not on the front. Knows nothing about models or images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calibration.first_token import FirstToken
from calibration.grid import Setting
from calibration.resampling import Figure
from runtime.errors import UsageError

__all__ = ["Measured", "Rule", "choose", "front"]


@dataclass(frozen=True, slots=True)
class Measured:
    """One setting.

    Attributes:
        control: shown and compared with, never chosen.
        average_keep: visual tokens averaged over all layers.
        flops_share: prefill FLOPs of the decoder over the unpruned ones, with the mean number of text tokens: the cost.
        flops_share_visual: the same without text.
        kv_bytes: of one image's visual tokens.
        first_token: None without profiles.
        kl: nats, mean over answer positions.
        agreement: share of answer positions with the same most likely token.
        unchanged: share of questions whose whole answer stays.
        accuracy: share of labels given; None without labels.
        mass: kept share of the score mass, mean over images.
    """

    setting: Setting
    control: bool
    average_keep: float
    flops_share: float
    flops_share_visual: float
    kv_bytes: int
    first_token: FirstToken | None
    kl: Figure
    agreement: Figure
    unchanged: Figure
    accuracy: Figure | None
    mass: float


@dataclass(frozen=True, slots=True)
class Rule:
    """Exactly one of the three; `min_agreement` in percent."""

    min_agreement: float | None = None
    max_ttft_ms: float | None = None
    avg_keep: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.min_agreement, self.max_ttft_ms, self.avg_keep) if value is not None]
        if len(given) != 1:
            raise UsageError("give one of --min-agreement, --max-ttft-ms and --avg-keep")
        if self.min_agreement is not None and not 0 < self.min_agreement <= 100:
            raise UsageError(f"--min-agreement is {self.min_agreement:g}, expected percent, above 0 and up to 100")
        for name, value in (("--max-ttft-ms", self.max_ttft_ms), ("--avg-keep", self.avg_keep)):
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value:g}, expected a number above 0")

    @property
    def option(self) -> str:
        """As on the command line."""
        if self.min_agreement is not None:
            return f"--min-agreement {self.min_agreement:g}"
        return f"--max-ttft-ms {self.max_ttft_ms:g}" if self.max_ttft_ms is not None else f"--avg-keep {self.avg_keep:g}"

    @property
    def cheapest(self) -> bool:
        """Whether the rule asks for the lowest cost; otherwise for the best agreement."""
        return self.min_agreement is not None

    def lacking(self, row: Measured) -> float:
        """By how much a setting misses the rule: agreement in percent, milliseconds or tokens; 0 or less where it fits."""
        if self.min_agreement is not None:
            return self.min_agreement - 100 * row.agreement.sure
        if self.avg_keep is not None:
            return row.average_keep - self.avg_keep
        if row.first_token is None or self.max_ttft_ms is None:
            raise UsageError("--max-ttft-ms needs --profile: a profile.json of python -m runtime.profile")
        return row.first_token.ms - self.max_ttft_ms

    def order(self, row: Measured) -> tuple[float, ...]:
        """The least of those that fit is chosen."""
        agreement, cost = -row.agreement.mean, row.flops_share
        return (cost, agreement, row.kl.mean) if self.cheapest else (agreement, cost, row.kl.mean)


def choose(rows: Sequence[Measured], rule: Rule) -> Measured:
    """The setting that a rule chooses.

    Raises:
        UsageError: none fits; the message names the nearest.
    """
    eligible = [row for row in rows if not row.control]
    fitting = [row for row in eligible if rule.lacking(row) <= 0]
    if fitting:
        return min(fitting, key=lambda row: (rule.order(row), row.setting))
    nearest = min(eligible, key=lambda row: (rule.lacking(row), rule.order(row), row.setting))
    raise UsageError(f"no setting meets {rule.option}; nearest: {nearest.setting.describe()} {_reached(nearest, rule)}: {_advice(rule)}")


def _reached(row: Measured, rule: Rule) -> str:
    agreement = row.agreement
    if rule.min_agreement is not None:
        interval = "" if agreement.interval is None else f", 95 % interval from {100 * agreement.sure:.2f} %"
        return f"(agreement {100 * agreement.mean:.2f} %{interval})"
    if rule.max_ttft_ms is not None and row.first_token is not None:
        return f"(first token after {row.first_token.ms:.2f} ms{'' if row.first_token.measured else ', estimated'})"
    return f"(average {row.average_keep:.2f} visual tokens)"


def _advice(rule: Rule) -> str:
    if rule.min_agreement is not None:
        return "ask for less, try later --splits or larger --keep, or narrow the interval with more images"
    return "allow more, or try earlier --splits or smaller --keep"


def front(rows: Sequence[Measured]) -> list[Measured]:
    """The settings that no other one beats: none is as cheap and agrees more, or is cheaper and agrees as much. By ascending cost."""
    best: list[Measured] = []
    for row in sorted((row for row in rows if not row.control), key=lambda row: (row.flops_share, -row.agreement.mean, row.setting)):
        last = best[-1] if best else None
        if last is None or row.agreement.mean > last.agreement.mean:
            best.append(row)
        elif (row.flops_share, row.agreement.mean) == (last.flops_share, last.agreement.mean):
            best.append(row)  # neither beats the other
    return best
