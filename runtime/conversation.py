"""A running conversation: what both cache groups hold, token by token and image by image, and how much of it a new prompt shares.

Knows nothing about engines or text. What follows an image cannot change its selection (attention is causal), so everything up to
the first difference can be kept, exactly: truncating sets two lengths and copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.budgets import AUTO, Keep
from runtime.kv_cache import KVGroup


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where one image's visual tokens are in a prompt: rows `start` to `stop`; `digest` tells images apart."""

    start: int
    stop: int
    digest: str


@dataclass(frozen=True, slots=True)
class ImageGroup:
    """The images of one message, which share one budget; `seed` is derived from their bytes (for the control `random`)."""

    spans: tuple[ImageSpan, ...]
    seed: int

    @property
    def start(self) -> int:
        return self.spans[0].start

    @property
    def stop(self) -> int:
        return self.spans[-1].stop

    @property
    def rows(self) -> np.ndarray:
        """int64 [N]: the prompt's rows that are visual tokens of this group."""
        return np.concatenate([np.arange(s.start, s.stop) for s in self.spans])


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Which of a group's N visual tokens were kept: `kept_indices` [R] int64 ascending, `token_entropy` [N] float32 (None: not scored).

    `budget` is what was asked for: a keep count, "auto", or None for all. `chosen` is the keep count that was used (None: all); with more
    of it than the group has tokens, all were kept.
    """

    group: ImageGroup
    kept_indices: np.ndarray
    token_entropy: np.ndarray | None
    budget: Keep
    chosen: int | None

    @property
    def visual_tokens(self) -> int:
        return sum(s.stop - s.start for s in self.group.spans)

    @property
    def dropped(self) -> int:
        return self.visual_tokens - len(self.kept_indices)


@dataclass(slots=True, eq=False)
class Conversation:
    """Two cache groups of different lengths, and what they hold: `token_ids` [pre.length], one `Selection` per image group."""

    pre: KVGroup
    post: KVGroup
    token_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    selections: tuple[Selection, ...] = ()
    in_use: bool = False

    @property
    def next_position(self) -> int:
        """The position that the next token gets in both groups: that of the unpruned prompt."""
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of both groups' buffers."""
        return self.pre.nbytes + self.post.nbytes

    def shared_with(self, token_ids: np.ndarray, groups: Sequence[ImageGroup], budget: Keep) -> int:
        """How many tokens of a prompt this conversation already holds, at most all but the last (whose logits are wanted).

        An image group counts whole or not at all: its selection was made over all of its images, under one budget. "auto" is a budget of
        its own, also where it chose the number that is asked for.
        """
        length = min(len(self.token_ids), len(token_ids) - 1)
        differs = np.flatnonzero(self.token_ids[:length] != token_ids[:length])
        shared = int(differs[0]) if len(differs) else length
        mine = [s.group.spans for s in self.selections if s.budget == budget]
        for group in groups:
            if group.start < shared and (group.spans not in mine or group.stop > shared):
                return group.start
        for selection in self.selections:  # a group here that the prompt has text for
            if selection.group.start < shared < selection.group.stop:
                return selection.group.start
        return shared

    def truncate(self, tokens: int) -> None:
        """Forgets everything from token `tokens` on, which must not lie inside an image group."""
        self.selections = tuple(s for s in self.selections if s.group.stop <= tokens)
        self.token_ids = self.token_ids[:tokens]
        self.pre.truncate(tokens)
        self.post.truncate(tokens - sum(s.dropped for s in self.selections))

    def clone(self) -> Conversation:
        """An independent copy, buffers included."""
        return Conversation(self.pre.clone(), self.post.clone(), self.token_ids, self.selections)

    # ------------------------------------------------------------ over all image groups

    @property
    def visual_tokens(self) -> int:
        return sum(s.visual_tokens for s in self.selections)

    @property
    def kept_indices(self) -> np.ndarray:
        """int64 [R of all groups], within the visual tokens of the whole prompt, ascending."""
        offsets = np.cumsum([0, *(s.visual_tokens for s in self.selections)])
        parts = [s.kept_indices + offset for s, offset in zip(self.selections, offsets, strict=False)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    @property
    def token_entropy(self) -> np.ndarray | None:
        """float32 [N of all groups], NaN for groups that were not scored; None where none was."""
        if all(s.token_entropy is None for s in self.selections):
            return None
        return np.concatenate(
            [np.full(s.visual_tokens, np.nan, np.float32) if s.token_entropy is None else s.token_entropy for s in self.selections]
        )

    @property
    def auto_budgets(self) -> tuple[int, ...]:
        """The budget chosen for each image group that was asked about with "auto"."""
        return tuple(s.chosen for s in self.selections if s.budget == AUTO and s.chosen is not None)

    @property
    def unscored_tokens(self) -> int:
        """Visual tokens whose score was not finite (they rank last)."""
        return sum(int((~np.isfinite(s.token_entropy)).sum()) for s in self.selections if s.token_entropy is not None)
