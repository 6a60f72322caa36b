"""From the images' sums to one row for each setting: means with intervals, costs, and comparisons with the controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibration.agreement_collection import AgreementRecord
from calibration.cost import average_keep, flops_share, kv_bytes
from calibration.first_token import FirstTokens
from calibration.grid import Grid, Setting
from calibration.pareto import Measured
from calibration.per_image import ImageBudgets
from calibration.resampling import Figure, Resampler
from export.spec import ModelSpec

__all__ = ["Comparison", "Results"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A setting's agreement less that of a control at the same split and keep count, paired over images."""

    control: str
    difference: Figure


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """All records of a grid, in an order of their contents; `seed` is the bootstrap's."""

    grid: Grid
    records: tuple[AgreementRecord, ...]
    spec: ModelSpec
    resampler: Resampler
    first_tokens: FirstTokens | None

    @property
    def questions(self) -> int:
        return int(self._counts("questions").sum())

    @property
    def positions(self) -> int:
        return int(self._counts("positions").sum())

    @property
    def labelled(self) -> int:
        return int(self._counts("labelled").sum())

    @property
    def text_tokens(self) -> int:
        """Mean prompt tokens besides the image, rounded."""
        return round(float(self._counts("text_tokens").sum()) / self.questions)

    @property
    def unpruned_accuracy(self) -> Figure | None:
        return self.resampler.ratio(self._counts("unpruned_right"), self._counts("labelled")) if self.labelled else None

    def rows(self) -> list[Measured]:
        """Every setting, by ascending cost."""
        rows = [self._row(index, setting) for index, setting in enumerate(self.grid.settings())]
        return sorted(rows, key=lambda row: (row.flops_share, row.setting.split_layer, row.control, -row.agreement.mean, row.setting))

    def compare(self, setting: Setting) -> list[Comparison]:
        """Against each control that is not the setting's own mode."""
        settings, positions = self.grid.settings(), self._counts("positions")
        agreeing = self._sums("agreeing")
        own = agreeing[:, settings.index(setting)]
        found = []
        for mode in self.grid.modes:
            if mode in ("random", "uniform") and mode != setting.mode:
                other = agreeing[:, settings.index(Setting(mode, setting.split_layer, setting.keep))]
                found.append(Comparison(mode, self.resampler.ratio(own - other, positions)))
        return found

    def image_budgets(self, mode: str, split: int, keeps: Sequence[int]) -> ImageBudgets:
        """What each image does under several budgets, ascending."""
        settings, ascending = self.grid.settings(), sorted(keeps)
        at = [settings.index(Setting(mode, split, keep)) for keep in ascending]
        return ImageBudgets(
            np.array(ascending, np.int64), self._sums("mass")[:, at], self._sums("agreeing")[:, at], self._sums("right")[:, at],
            self._counts("positions"), self._counts("labelled"),
        )  # fmt: skip

    def _row(self, index: int, setting: Setting) -> Measured:
        decoder, count = self.spec.decoder, self.spec.vision.visual_tokens
        split, keep, ratio = setting.split_layer, setting.keep, self.resampler.ratio
        questions, positions = self._counts("questions"), self._counts("positions")
        share, share_visual = (
            flops_share(decoder, visual_tokens=count, keep=keep, split_layer=split, text_tokens=text) for text in (self.text_tokens, 0)
        )
        return Measured(
            setting=setting, control=setting.mode in self.grid.controls,
            average_keep=average_keep(decoder, visual_tokens=count, keep=keep, split_layer=split),
            flops_share=share, flops_share_visual=share_visual,
            kv_bytes=kv_bytes(decoder, visual_tokens=count, keep=keep, split_layer=split),
            first_token=None if self.first_tokens is None else self.first_tokens.of(setting),
            kl=ratio(self._sums("kl")[:, index], positions), agreement=ratio(self._sums("agreeing")[:, index], positions),
            unchanged=ratio(self._sums("unchanged")[:, index], questions),
            accuracy=ratio(self._sums("right")[:, index], self._counts("labelled")) if self.labelled else None,
            mass=float(self._sums("mass")[:, index].mean()),
        )  # fmt: skip

    def _counts(self, name: str) -> Floats:
        """[images]."""
        return np.array([getattr(record.found, name) for record in self.records], np.float64)

    def _sums(self, name: str) -> Floats:
        """[images, settings]."""
        return np.array([getattr(record.found, name) for record in self.records], np.float64)
