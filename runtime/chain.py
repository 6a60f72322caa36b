"""The chain of engines: vision, pre_ecl, score, post_ecl, and the two cache groups between them. Knows nothing about text.

`Conversation` holds what a running conversation needs; `EngineChain` moves it forward: `prefill`, then `decode` token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from runtime import names
from runtime.engines.base import Engine
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import BundleError, UsageError
from runtime.generation import Stopwatch
from runtime.kv_cache import KVGroup
from runtime.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Selection:
    """Which of N visual tokens were kept: `kept_indices` [R] int64 ascending, `token_entropy` [N] float32 (None: not scored)."""

    visual_tokens: int
    kept_indices: np.ndarray
    token_entropy: np.ndarray | None

    @classmethod
    def everything(cls, visual_tokens: int) -> Selection:
        return cls(visual_tokens, np.arange(visual_tokens), None)


@dataclass(slots=True)
class Conversation:
    """Two cache groups of different lengths, and the position that the next token gets in both."""

    pre: KVGroup
    post: KVGroup
    next_position: int = 0
    selection: Selection = field(default_factory=lambda: Selection.everything(0))


class EngineChain:
    """A bundle's engines, run one after the other."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._engines: dict[str, Engine] = {name: OnnxRuntimeEngine(bundle / g.file, g) for name, g in manifest.graphs.items()}
        geometry = manifest.geometry
        self._embedding = _map_embedding(bundle / manifest.embedding, (geometry.vocab_size, geometry.hidden_size))

    def new_conversation(self, prompt_tokens: int, kept_tokens: int, reserve: int) -> Conversation:
        """Empty caches for a prompt of `prompt_tokens` (after pruning: `kept_tokens`) and `reserve` further tokens."""
        g, k, limit = self.manifest.geometry, self.manifest.split_layer, self.manifest.max_context
        pre = KVGroup(range(k), g.kv_heads, g.head_size, prompt_tokens + reserve, limit)
        post = KVGroup(range(k, g.layers), g.kv_heads, g.head_size, kept_tokens + reserve, limit)
        return Conversation(pre, post)

    def prefill(
        self, input_ids: np.ndarray, visual_mask: np.ndarray, pixel_values: np.ndarray | None, *, keep: int | None, image_seed: int = 0,
        reserve: int = 64, watch: Stopwatch | None = None, kept_indices: np.ndarray | None = None,
        trace: dict[str, np.ndarray] | None = None,
    ) -> tuple[Conversation, np.ndarray]:  # fmt: skip
        """Runs a whole prompt.

        Args:
            input_ids, visual_mask: [S] int64 and bool, images expanded.
            pixel_values: [images, 3, side, side] float32; None without images.
            keep: visual tokens kept after the split; None keeps all.
            reserve: further tokens to make room for at first (the caches grow when they must).
            kept_indices: replaces the score's selection (for parity tests), ascending int64 within the visual tokens.
            trace: receives `hidden_states` [1, S, d] and `score_states` [1, S, H * d_h] of the first half.

        Returns:
            The conversation, and the logits [vocab] float32 of the last token.
        """
        watch = watch or Stopwatch()
        visual = int(visual_mask.sum())
        embeds = self.embed(input_ids, visual_mask, pixel_values, watch)
        positions = np.arange(len(input_ids), dtype=np.int64)
        kept = min(visual, len(kept_indices) if kept_indices is not None else visual if keep is None else keep)
        conversation = self.new_conversation(len(input_ids), len(input_ids) - visual + kept, reserve)
        with watch.stage(names.PRE_ECL):
            outputs = [names.HIDDEN_STATES] + ([names.SCORE_STATES] if kept < visual or trace is not None else [])
            results = self.run_half(names.PRE_ECL, embeds, positions, conversation.pre, outputs)
            hidden, score_states = results[0], results[-1]
        if trace is not None:
            trace.update(zip(outputs, results, strict=True))
        if kept < visual:
            if kept_indices is not None:
                conversation.selection = Selection(visual, kept_indices, None)
            else:
                with watch.stage(names.SCORE):
                    conversation.selection = self._score(kept, hidden, score_states, positions, visual_mask, image_seed)
            hidden, positions = drop_rows(hidden, positions, visual_mask, conversation.selection.kept_indices)
        else:
            conversation.selection = Selection.everything(visual)
        with watch.stage(names.POST_ECL):
            (logits,) = self.run_half(names.POST_ECL, hidden, positions, conversation.post, [names.LOGITS])
        conversation.next_position = len(input_ids)
        return conversation, logits[0]

    def decode(self, conversation: Conversation, token_id: int) -> np.ndarray:
        """Appends one token to both groups; returns the logits [vocab] float32 that follow it."""
        position = np.array([conversation.next_position], dtype=np.int64)
        embeds = np.ascontiguousarray(self._embedding[token_id][None, None])
        (hidden,) = self.run_half(names.PRE_ECL, embeds, position, conversation.pre, [names.HIDDEN_STATES])
        (logits,) = self.run_half(names.POST_ECL, hidden, position, conversation.post, [names.LOGITS])
        conversation.next_position += 1
        row: np.ndarray = logits[0]
        return row

    def check_keep(self, keep: int | str | None) -> int | None:
        """The keep count to use: None gives the default budget, "all" (or N) no pruning (returned as None)."""
        budgets, n = self.manifest.budgets, self.manifest.geometry.visual_tokens
        if keep is None:
            keep = budgets[0]
        if keep in ("all", n):
            return None
        if keep not in budgets:
            raise UsageError(
                f"this bundle holds the budgets {', '.join(map(str, budgets))} and all, not {keep}: export it with --keep {keep}"
            )
        return int(keep)

    # ------------------------------------------------------------ the stages

    def embed(self, input_ids: np.ndarray, visual_mask: np.ndarray, pixel_values: np.ndarray | None, watch: Stopwatch) -> np.ndarray:
        """[1, S, d] float32: rows of the token table, and the image's rows where `visual_mask` says so."""
        image_embeds = None
        if pixel_values is not None:
            with watch.stage(names.VISION):
                (image_embeds,) = self._engines[names.VISION].run({names.PIXEL_VALUES: pixel_values}, [names.IMAGE_EMBEDS])
        with watch.stage("embed"):
            embeds = np.asarray(self._embedding[np.where(visual_mask, 0, input_ids)])
            if image_embeds is not None:
                embeds[visual_mask] = image_embeds
        return embeds[None]

    def run_half(self, name: str, hidden: np.ndarray, positions: np.ndarray, cache: KVGroup, outputs: list[str]) -> list[np.ndarray]:
        rows = hidden.shape[1]
        cache.reserve(rows)
        feeds: dict[str, np.ndarray] = {
            names.INPUTS_EMBEDS if name == names.PRE_ECL else names.HIDDEN_STATES: hidden,
            names.POSITION_IDS: np.ascontiguousarray(positions.reshape(1, 1, -1)),
            names.PAST_LENGTH: np.array([cache.length], dtype=np.int64),
        }
        if name == names.POST_ECL:
            feeds[names.LAST_INDEX] = np.array([rows - 1], dtype=np.int64)
        results = self._engines[name].run(feeds, outputs, cache)
        cache.advance(rows)
        return results

    def _score(
        self, keep: int, hidden: np.ndarray, score_states: np.ndarray, positions: np.ndarray, visual_mask: np.ndarray, image_seed: int
    ) -> Selection:
        feeds: Mapping[str, np.ndarray] = {
            names.SCORE_STATES: score_states[0][visual_mask],
            names.HIDDEN_STATES: hidden[0][visual_mask],
            names.POSITION_IDS: positions[visual_mask][None],
        }
        if self.manifest.score_mode == "random":
            feeds = {**feeds, names.IMAGE_SEED: np.array([image_seed], dtype=np.int64)}
        kept, entropy = self._engines[names.score_graph(keep)].run(feeds, [names.KEPT_INDICES, names.TOKEN_ENTROPY])
        return Selection(int(visual_mask.sum()), kept, entropy)


def drop_rows(hidden: np.ndarray, positions: np.ndarray, visual_mask: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all text and of the kept visual tokens, in their order, with their original positions."""
    stays = ~visual_mask
    stays[np.flatnonzero(visual_mask)[kept]] = True
    return np.ascontiguousarray(hidden[:, stays]), positions[stays]


def _map_embedding(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The token table, mapped into memory: only the rows that are used are read."""
    expected = shape[0] * shape[1] * 4
    if path.stat().st_size != expected:
        raise BundleError(f"{path.name} has {path.stat().st_size} bytes, a table of {shape} needs {expected}: export the bundle again")
    return np.memmap(path, np.float32, "r", shape=shape)
