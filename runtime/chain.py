"""The chain of engines: vision, pre_ecl, score, post_ecl, and the two cache groups between them.

Knows nothing about text, nor where its stages run (`runtime.executor`).

`extend` moves a conversation forward by the rest of a prompt, `decode` by one token. One call runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from runtime import budgets, names
from runtime.budgets import Keep
from runtime.conversation import Conversation, ImageGroup, ImageSpan, Selection
from runtime.errors import EngineError
from runtime.executor import Executor
from runtime.generation import Stopwatch
from runtime.host_executor import HostExecutor
from runtime.manifest import Manifest

Scored = Callable[[int], tuple[np.ndarray, np.ndarray]]  # a budget's kept indices and scores
Select = Callable[[ImageGroup], np.ndarray]  # replaces the score in parity tests: a group's kept indices, ascending
Trace = dict[str, np.ndarray]


class EngineChain:
    """A bundle's engines, run one after the other. Safe to call from several threads, each with its own conversation."""

    def __init__(self, bundle: Path, manifest: Manifest, threads: int | None = None, executor: Executor | None = None) -> None:
        """The stages run on `executor`; where it is left out, on the CPU."""
        self.manifest = manifest
        self.executor: Executor = executor or HostExecutor(bundle, manifest, threads)
        self._closed = False

    def close(self) -> None:
        """Gives back what the engines hold; whatever is asked of the chain afterwards is an EngineError."""
        self._closed = True
        self.executor.close()

    @property
    def max_context(self) -> int:
        """The longest prompt and answer, in tokens."""
        self._check_open()
        return min(self.manifest.max_context, self.executor.max_context)

    def new_conversation(self, tokens: int, kept_tokens: int) -> Conversation:
        """Empty caches with room for `tokens` before the split and `kept_tokens` after it (they grow when they must)."""
        self._check_open()
        k, layers = self.manifest.split_layer, self.manifest.geometry.layers
        pre = self.executor.new_group(names.PRE_ECL, range(k), tokens)
        return Conversation(pre, self.executor.new_group(names.POST_ECL, range(k, layers), kept_tokens))

    def extend(
        self, conversation: Conversation, input_ids: np.ndarray, groups: Sequence[ImageGroup], pixel_values: np.ndarray | None, *,
        keep: Keep, watch: Stopwatch | None = None, select: Select | None = None, trace: Trace | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Runs what the conversation does not hold yet of a prompt.

        Args:
            conversation: holds the first `next_position` tokens of the prompt, no image group in part.
            input_ids: [S] int64, the whole prompt, images expanded.
            groups: the image groups that are not in the conversation yet.
            pixel_values: [images, 3, side, side] float32, the images of `groups` in order; None without.
            keep: visual tokens kept after the split, of each group; "auto" chooses a budget for each, None keeps all.
            select: chooses a group's kept indices in place of the score.
            trace: receives `hidden_states` and `score_states` of the new rows.

        Returns:
            Logits [vocab] float32 of the last token.
        """
        self._check_open()
        watch = watch or Stopwatch()
        least = budgets.smallest_kept(keep, self.manifest.budgets)
        scored = [select is None and least is not None and least < len(group.rows) for group in groups]
        if any(scored):
            budgets.check_held(self.manifest, keep)
        begin = conversation.next_position
        visual_rows = np.concatenate([g.rows for g in groups]) if groups else np.zeros(0, np.int64)
        executor = self.executor
        with executor.lock:
            embeds = executor.embed(input_ids[begin:], visual_rows - begin, pixel_values, watch)
            positions = np.arange(begin, len(input_ids), dtype=np.int64)
            with watch.stage(names.PRE_ECL):
                new = executor.pre(embeds, positions, conversation.pre, any(scored) or trace is not None)
            if trace is not None:
                trace.update(new.read())
            selections, stays = [], np.ones(len(positions), bool)
            for group, choose in zip(groups, scored, strict=True):
                rows = group.rows - begin
                if choose:
                    place = int(np.count_nonzero(stays[: rows[0]]))
                    with watch.stage(names.SCORE):
                        scores = partial(new.score, rows=rows, place=place, seed=group.seed)
                        selections.append(self._score(group, keep, len(rows), scores))
                else:
                    kept = np.arange(len(rows)) if select is None else select(group)
                    selections.append(Selection(group, kept, None, keep, least))
                stays[np.delete(rows, selections[-1].kept_indices)] = False
            with watch.stage(names.POST_ECL):
                logits = executor.post(new, stays, positions[stays], conversation.post)
        conversation.token_ids = np.array(input_ids, np.int64)
        conversation.selections += tuple(selections)
        return logits

    def decode(self, conversation: Conversation, token_id: int) -> np.ndarray:
        """Appends one token to both groups; returns the logits [vocab] float32 that follow it."""
        self._check_open()
        with self.executor.lock:
            logits = self.executor.decode(token_id, conversation.next_position, conversation.pre, conversation.post)
        conversation.token_ids = np.append(conversation.token_ids, token_id)
        return logits

    def prefill(
        self, input_ids: np.ndarray, visual_mask: np.ndarray, pixel_values: np.ndarray | None, *, keep: Keep, image_seed: int = 0,
        kept_indices: np.ndarray | None = None, trace: Trace | None = None,
    ) -> tuple[Conversation, np.ndarray]:  # fmt: skip
        """A whole prompt in a new conversation, all of its images as one group: `extend` for those who have no messages.

        Args:
            input_ids, visual_mask: [S] int64 and bool, images expanded.
            kept_indices: used instead of the score's selection, ascending within the visual tokens.
        """
        rows = np.flatnonzero(visual_mask)
        starts = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(rows) else []
        groups = [ImageGroup(tuple(ImageSpan(int(r[0]), int(r[-1]) + 1, "") for r in starts), image_seed)] if len(rows) else []
        conversation = self.new_conversation(len(input_ids) + 1, len(input_ids) + 1)
        select = None if kept_indices is None else lambda _: kept_indices
        logits = self.extend(conversation, input_ids, groups, pixel_values, keep=keep, select=select, trace=trace)
        return conversation, logits

    def check_keep(self, keep: int | str | None) -> Keep:
        """What a user's `keep` means for this bundle: None gives the default budget, "all" no pruning (returned as None)."""
        return budgets.check_keep(self.manifest, keep)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the model was closed: load the bundle again")

    def _score(self, group: ImageGroup, keep: Keep, tokens: int, scored: Scored) -> Selection:
        """Chooses among a group's N tokens.

        For "auto", the largest budget's graph gives the scores. The kept set is that of the chosen budget's own graph: the one that asking
        for this budget gives, whatever the mode is, and whatever an engine does with ties.
        """
        if isinstance(keep, int):
            kept, entropy = scored(keep)
            return Selection(group, kept, entropy, keep, keep)
        threshold = self.manifest.auto_keep
        assert threshold is not None, "extend has checked it"
        largest = max(budget for budget in self.manifest.budgets if budget < tokens)  # a graph refuses to keep more than there are
        kept, entropy = scored(largest)
        chosen = budgets.choose_budget(entropy, self.manifest.budgets, threshold)
        if chosen != largest:
            kept = np.arange(tokens) if chosen >= tokens else scored(chosen)[0]
        return Selection(group, kept, entropy, keep, chosen)
