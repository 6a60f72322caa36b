"""What a run of the kit measures and where it writes: the real thing on a GPU, or a rehearsal of every step on a CPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from runtime.errors import UsageError

ROOT: Final = Path(__file__).resolve().parents[2]
RESULTS: Final = ROOT / "docs" / "results"
REHEARSAL: Final = "rehearsal on a CPU: not a GPU result"
GPU_BACKENDS: Final = ("cuda", "tensorrt", "tensorrt_rtx")
SPLIT_LAYER: Final = 2
BUDGETS: Final = (166, 98, 29)  # the paper's averages of 192, 128 and 64 visual tokens over LLaVA-1.5-7B's layers, split before layer 2
REHEARSAL_BUDGETS: Final = (8, 4, 2)  # of 16
LEAST_RUNS: Final = 3  # fewer pairs give no interval


@dataclass(frozen=True, slots=True)
class Settings:
    """One run of the kit.

    Args:
        output: where each piece's JSON goes.
        work: where bundles go: 14 GB and, with both engine libraries, twice as much again. A local disk.
        results: where the summary goes.
        rehearse: a tiny random model on the CPU instead of a GPU.
        device_index: which GPU.
        runs: rounds that are counted, at most; `seconds` bounds them too, after LEAST_RUNS.
        warmup: rounds before them.
        new_tokens: generated in each answer.
        parity_images: held-out scenes that backends are compared on.
        seed: of the random weights.

    Raises:
        UsageError: a number out of range, or a rehearsal that would write among the results.
    """

    output: Path
    work: Path
    results: Path
    rehearse: bool = False
    device_index: int = 0
    runs: int = 50
    seconds: float = 300.0
    warmup: int = 5
    new_tokens: int = 32
    parity_images: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("device_index", 0), ("runs", LEAST_RUNS), ("warmup", 0), ("new_tokens", 2), ("parity_images", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give {least} or more")
        if not self.seconds > 0:
            raise UsageError(f"--seconds is {self.seconds}: give more than 0")
        for folder in (self.output, self.results):
            if self.rehearse and folder.resolve().is_relative_to(RESULTS):
                raise UsageError(f"a rehearsal is no result and does not write into {RESULTS}: name another folder")

    @property
    def backends(self) -> tuple[str, ...]:
        """What is compared and measured, as `runtime.pipeline.load` calls it."""
        return ("cpu",) if self.rehearse else GPU_BACKENDS

    @property
    def budgets(self) -> tuple[int, ...]:
        """Visual tokens kept, besides keeping all."""
        return REHEARSAL_BUDGETS if self.rehearse else BUDGETS

    @property
    def precision(self) -> str:
        """Of the measured bundle."""
        return "fp32" if self.rehearse else "fp16"

    @property
    def bundle(self) -> Path:
        """The measured bundle."""
        return self.work / ("rehearsal" if self.rehearse else "llava15-7b-fp16")

    def recorded(self) -> dict[str, Any]:
        """What decides a piece's figures, as plain data: a piece made with others is not taken for this run's."""
        entries = dataclasses.asdict(self)
        return {
            name: entries[name] for name in ("rehearse", "device_index", "runs", "seconds", "warmup", "new_tokens", "parity_images", "seed")
        }
