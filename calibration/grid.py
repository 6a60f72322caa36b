"""Which settings a budget calibration tries: score modes, split layers and keep counts, all with all. Knows no weights and no images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from export.budget import check_keep, keep_from_percent
from export.exact_score import check_score_mode
from export.spec import ModelSpec
from runtime.errors import UsageError
from runtime.names import SCORE_MODES

__all__ = ["CONTROLS", "Grid", "Setting", "make_grid"]

CONTROLS = ("random", "uniform")  # look at no activation: what a score has to be better than
EXTRA_MODES = ("dpp",)  # tried without being asked for, where this version has them
KEEP_PERCENT = (50.0, 33.0, 22.0, 11.0, 5.5)


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """`keep` of an image's visual tokens stay, chosen by `mode`, after layers 0..split_layer-1."""

    mode: str
    split_layer: int
    keep: int

    def describe(self) -> str:
        """For messages."""
        return f"{self.mode}, split {self.split_layer}, keep {self.keep}"


@dataclass(frozen=True, slots=True)
class Grid:
    """Every mode with every split and every keep count.

    Attributes:
        modes: in the order of `runtime.names.SCORE_MODES`.
        controls: those of them that are compared with but never chosen.
        splits: ascending.
        keeps: descending.
        largest: of the budgets that are chosen among per image; None where they are all of `keeps`.
    """

    modes: tuple[str, ...]
    controls: tuple[str, ...]
    splits: tuple[int, ...]
    keeps: tuple[int, ...]
    largest: int | None = None

    @property
    def scored_keep(self) -> int:
        """The budget that scores are taken at: a bundle scores at its largest one."""
        return self.largest or max(self.keeps)

    def settings(self) -> tuple[Setting, ...]:
        """Split by split, within it keep by keep, within it mode by mode: the order in which numbers are stored."""
        return tuple(Setting(mode, split, keep) for split in self.splits for keep in self.keeps for mode in self.modes)


def make_grid(
    spec: ModelSpec, usual_mode: str, usual_splits: Sequence[int], *, modes: Sequence[str] | None = None,
    splits: Sequence[int] | None = None, keeps: Sequence[int] | None = None, more_keeps: Sequence[int] = (),
) -> Grid:  # fmt: skip
    """A grid from what was asked for, and what is usual where nothing was.

    Args:
        usual_mode: tried with `EXTRA_MODES` unless `modes` are given; the controls are always added.
        usual_splits: those within 1..L-1 are tried unless `splits` are given.
        keeps: keep counts; `KEEP_PERCENT` of N unless given.
        more_keeps: tried besides.

    Raises:
        UsageError: a mode is unknown or needs more heads, a split or a keep count is out of range.
    """
    layers, count = spec.decoder.layers, spec.vision.visual_tokens
    asked = modes or [usual_mode, *(mode for mode in EXTRA_MODES if mode in SCORE_MODES)]
    for mode in asked:
        check_score_mode(mode, spec.decoder.query_heads)
    for split in splits or ():
        if not 1 <= split < layers:
            raise UsageError(f"--splits holds {split}, the decoder has {layers} layers: split before layer 1 to {layers - 1}")
    for keep in more_keeps:
        if not 1 <= keep <= count:
            raise UsageError(f"--auto-budgets holds {keep}, an image has {count} visual tokens: keep 1 to {count} of them")
    chosen_splits = splits or [split for split in usual_splits if 1 <= split < layers]
    if not chosen_splits:
        raise UsageError(f"the model's usual splits do not fit a decoder of {layers} layers: give --splits, 1 to {layers - 1}")
    usual_keeps = [keep_from_percent(percent, visual_tokens=count) for percent in KEEP_PERCENT]
    every = {check_keep(keep, visual_tokens=count) for keep in keeps or usual_keeps} | set(more_keeps)
    return Grid(
        tuple(mode for mode in SCORE_MODES if mode in asked or mode in CONTROLS), tuple(mode for mode in CONTROLS if mode not in asked),
        tuple(sorted(set(chosen_splits))), tuple(sorted(every, reverse=True)),
        max(more_keeps, default=None),
    )  # fmt: skip
