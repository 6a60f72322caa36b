"""What a generation gives back, and how long each part of it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer and its statistics.

    Attributes:
        text: the answer.
        token_ids: generated tokens, the end token included where it was reached.
        prompt_tokens: length of the unpruned prompt, visual tokens included.
        reused_tokens: prompt tokens that a state or the cache already held.
        visual_tokens: N, over all images.
        kept_tokens: visual tokens kept after the split (N where nothing was pruned).
        kept_indices: which, counted within the visual tokens, ascending.
        token_entropy: [N] float32, the score of every visual token; None where nothing was scored.
        ttft_ms: milliseconds from the call to the first token.
        tpot_ms: milliseconds per further token (0 where there is none).
        stages_ms: milliseconds by stage of the prefill; `decode` is the sum over all further tokens.
        finish_reason: "eos", "stop", "length" or "cancelled".
        unscored_tokens: visual tokens whose score was not finite (they rank last).
        auto_budgets: with keep="auto", the budget chosen for each message with images, in order; empty otherwise.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    reused_tokens: int
    visual_tokens: int
    kept_tokens: int
    kept_indices: tuple[int, ...]
    token_entropy: np.ndarray | None
    ttft_ms: float
    tpot_ms: float
    stages_ms: dict[str, float]
    finish_reason: str
    unscored_tokens: int = 0
    auto_budgets: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; times in milliseconds, rounded to a microsecond."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "visual_tokens": self.visual_tokens,
            "kept_tokens": self.kept_tokens,
            "kept_indices": list(self.kept_indices),
            "unscored_tokens": self.unscored_tokens,
            "auto_budgets": list(self.auto_budgets),
            "finish_reason": self.finish_reason,
            "ttft_ms": round(self.ttft_ms, 3),
            "tpot_ms": round(self.tpot_ms, 3),
            "stages_ms": {k: round(v, 3) for k, v in self.stages_ms.items()},
        }


@dataclass(slots=True)
class Stopwatch:
    """Adds up milliseconds by stage. Engines return when their outputs are ready, so a stage's time is its own."""

    began: float = field(default_factory=time.perf_counter)
    stages_ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages_ms[name] = self.stages_ms.get(name, 0.0) + (time.perf_counter() - start) * 1e3

    def elapsed_ms(self) -> float:
        """Milliseconds since the stopwatch was made."""
        return (time.perf_counter() - self.began) * 1e3
