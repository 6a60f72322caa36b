"""The chain of engines: vision, pre_ecl, score, post_ecl, and the two cache groups between them. Knows nothing about text.

`extend` moves a conversation forward by the rest of a prompt, `decode` by one token. One call runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from runtime import budgets, names
from runtime.budgets import Keep
from runtime.conversation import Conversation, ImageGroup, ImageSpan, Selection
from runtime.engines.base import Engine
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import BundleError
from runtime.generation import Stopwatch
from runtime.kv_cache import KVGroup, round_capacity
from runtime.manifest import Manifest

Select = Callable[[ImageGroup], np.ndarray]  # replaces the score in parity tests: a group's kept indices, ascending
Trace = dict[str, np.ndarray]


class EngineChain:
    """A bundle's engines, run one after the other. Safe to call from several threads, each with its own conversation."""

    def __init__(self, bundle: Path, manifest: Manifest, threads: int | None = None) -> None:
        self.manifest = manifest
        _check_tables(manifest)
        self._dtype = _dtype_of_halves(manifest)
        self._engines: dict[str, Engine] = {
            name: OnnxRuntimeEngine(bundle / graph.file, graph, threads) for name, graph in manifest.graphs.items()
        }
        geometry = manifest.geometry
        self._embedding = _map_embedding(bundle / manifest.embedding, (geometry.vocab_size, geometry.hidden_size))
        self._lock = threading.Lock()

    def new_conversation(self, tokens: int, kept_tokens: int) -> Conversation:
        """Empty caches with room for `tokens` before the split and `kept_tokens` after it (they grow when they must)."""
        g, k, limit = self.manifest.geometry, self.manifest.split_layer, self.manifest.max_context
        if self.manifest.kv_write == names.TENSOR_SCATTER:
            tokens = kept_tokens = limit  # the graphs take caches of this length alone
        pre = KVGroup(range(k), g.kv_heads, g.head_size, tokens, limit, self._dtype)
        post = KVGroup(range(k, g.layers), g.kv_heads, g.head_size, kept_tokens, limit, self._dtype)
        return Conversation(pre, post)

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
        watch = watch or Stopwatch()
        least = budgets.smallest_kept(keep, self.manifest.budgets)
        scored = [select is None and least is not None and least < len(group.rows) for group in groups]
        if any(scored):
            budgets.check_held(self.manifest, keep)
        begin = conversation.next_position
        visual_rows = np.concatenate([g.rows for g in groups]) if groups else np.zeros(0, np.int64)
        with self._lock:
            embeds = self.embed(input_ids[begin:], visual_rows - begin, pixel_values, watch)
            positions = np.arange(begin, len(input_ids), dtype=np.int64)
            with watch.stage(names.PRE_ECL):
                outputs = [names.HIDDEN_STATES] + ([names.SCORE_STATES] if any(scored) or trace is not None else [])
                results = self.run_half(names.PRE_ECL, embeds, positions, conversation.pre, outputs)
                hidden, score_states = results[0], results[-1]
            if trace is not None:
                trace.update(zip(outputs, results, strict=True))
            selections, stays = [], np.ones(len(positions), bool)
            for group, choose in zip(groups, scored, strict=True):
                rows = group.rows - begin
                if choose:
                    with watch.stage(names.SCORE):
                        selections.append(self._score(group, keep, hidden[0][rows], score_states[0][rows], positions[rows]))
                else:
                    kept = np.arange(len(rows)) if select is None else select(group)
                    selections.append(Selection(group, kept, None, keep, least))
                stays[np.delete(rows, selections[-1].kept_indices)] = False
            with watch.stage(names.POST_ECL):
                hidden = hidden if stays.all() else np.ascontiguousarray(hidden[:, stays])
                (logits,) = self.run_half(names.POST_ECL, hidden, positions[stays], conversation.post, [names.LOGITS])
        conversation.token_ids = np.array(input_ids, np.int64)
        conversation.selections += tuple(selections)
        row: np.ndarray = logits[0]
        return row

    def decode(self, conversation: Conversation, token_id: int) -> np.ndarray:
        """Appends one token to both groups; returns the logits [vocab] float32 that follow it."""
        position = np.array([conversation.next_position], dtype=np.int64)
        embeds = np.ascontiguousarray(self._embedding[token_id][None, None], self._dtype)
        with self._lock:
            (hidden,) = self.run_half(names.PRE_ECL, embeds, position, conversation.pre, [names.HIDDEN_STATES])
            (logits,) = self.run_half(names.POST_ECL, hidden, position, conversation.post, [names.LOGITS])
        conversation.token_ids = np.append(conversation.token_ids, token_id)
        row: np.ndarray = logits[0]
        return row

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

    # ------------------------------------------------------------ the stages

    def embed(self, input_ids: np.ndarray, visual_rows: np.ndarray, pixel_values: np.ndarray | None, watch: Stopwatch) -> np.ndarray:
        """[1, S, d] of the halves' type: rows of the token table, and the images' rows at `visual_rows`."""
        image_embeds = None
        if pixel_values is not None:
            with watch.stage(names.VISION):
                (image_embeds,) = self._engines[names.VISION].run({names.PIXEL_VALUES: pixel_values}, [names.IMAGE_EMBEDS])
        with watch.stage("embed"):
            input_ids = np.array(input_ids)
            input_ids[visual_rows] = 0  # the placeholder may lie beyond the table
            embeds = np.array(self._embedding[input_ids], self._dtype)
            if image_embeds is not None:
                if len(image_embeds) != len(visual_rows):
                    raise BundleError(
                        f"the vision graph gave {len(image_embeds)} rows for {len(visual_rows)} visual tokens: export the bundle again"
                    )
                embeds[visual_rows] = image_embeds
        return embeds[None]

    def run_half(self, name: str, hidden: np.ndarray, positions: np.ndarray, cache: KVGroup, outputs: list[str]) -> list[np.ndarray]:
        """Runs one half over new rows [1, S, d] at `positions` [S], writing their keys and values into `cache`."""
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

    def _score(self, group: ImageGroup, keep: Keep, hidden: np.ndarray, score_states: np.ndarray, positions: np.ndarray) -> Selection:
        """Chooses among a group's rows: hidden [N, d], score_states [N, H * d_h], positions [N].

        For "auto", the largest budget's graph gives the scores. The kept set is that of the chosen budget's own graph: the one that asking
        for this budget gives, whatever the mode is, and whatever an engine does with ties.
        """
        feeds = {names.SCORE_STATES: score_states, names.HIDDEN_STATES: hidden, names.POSITION_IDS: positions[None]}
        if self.manifest.score_mode == "random":
            feeds[names.IMAGE_SEED] = np.array([group.seed], dtype=np.int64)

        def scored(budget: int) -> list[np.ndarray]:
            return self._engines[names.score_graph(budget)].run(feeds, [names.KEPT_INDICES, names.TOKEN_ENTROPY])

        if isinstance(keep, int):
            kept, entropy = scored(keep)
            return Selection(group, kept, entropy, keep, keep)
        threshold, tokens = self.manifest.auto_keep, len(positions)
        assert threshold is not None, "extend has checked it"
        largest = max(budget for budget in self.manifest.budgets if budget < tokens)  # a graph refuses to keep more than there are
        kept, entropy = scored(largest)
        chosen = budgets.choose_budget(entropy, self.manifest.budgets, threshold)
        if chosen != largest:
            kept = np.arange(tokens) if chosen >= tokens else scored(chosen)[0]
        return Selection(group, kept, entropy, keep, chosen)


def _check_tables(manifest: Manifest) -> None:
    """Compares the graphs' tables of inputs and outputs with the geometry, which caches are made by."""
    g, k = manifest.geometry, manifest.split_layer
    missing = [name for name in (names.VISION, names.PRE_ECL, names.POST_ECL) if name not in manifest.graphs]
    if missing:
        raise BundleError(f"the manifest has no graph {missing[0]}: export the bundle again")
    tensors = sum(len(graph.inputs) for graph in manifest.graphs.values())
    if g.layers > tensors:  # before a table is made of them
        raise BundleError(f"the graphs have no caches for {g.layers} layers: export the bundle again")
    for name, layers in ((names.PRE_ECL, range(k)), (names.POST_ECL, range(k, g.layers))):
        wanted = {tensor: (1, g.kv_heads, g.head_size) for i in layers for tensor in (names.past_key(i), names.past_value(i))}
        listed = {t.name: (*t.shape[:2], *t.shape[3:]) for t in manifest.graphs[name].inputs if t.name.startswith(names.PAST)}
        if listed != wanted:
            raise BundleError(
                f"{name}'s caches are not those of layers {layers[0]} to {layers[-1]} with {g.kv_heads} key-value heads of {g.head_size}: "
                "export the bundle again"
            )
        lengths = {tensor.shape[2] for tensor in manifest.graphs[name].inputs if tensor.name.startswith(names.PAST)}
        static = round_capacity(manifest.max_context) if manifest.kv_write == names.TENSOR_SCATTER else None
        if any(length != static if isinstance(length, int) else static is not None for length in lengths):
            raise BundleError(
                f"{name}'s caches have the length {', '.join(map(str, lengths))}, and kv_write {manifest.kv_write} with a context of "
                f"{manifest.max_context} means {static or 'any'}: export the bundle again"
            )
    for keep in manifest.budgets:
        shapes = {t.name: t.shape for t in manifest.graphs[names.score_graph(keep)].outputs}
        if shapes.get(names.KEPT_INDICES) != (keep,):
            raise BundleError(f"the graph {names.score_graph(keep)} does not keep {keep} tokens: export the bundle again")


def _dtype_of_halves(manifest: Manifest) -> str:
    """numpy's name of the type of activations and caches, by what enters the decoder; the engines check what they are given."""
    dtype = next((tensor.dtype for tensor in manifest.graphs[names.PRE_ECL].inputs if tensor.name == names.INPUTS_EMBEDS), "float32")
    if dtype == "bfloat16":
        raise BundleError("the decoder's type is bfloat16, ONNX Runtime on a CPU runs float32 and float16: export the bundle as fp32")
    return dtype if dtype == "float16" else "float32"


def _map_embedding(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The token table, mapped into memory: only the rows that are used are read."""
    expected = shape[0] * shape[1] * 4
    if path.stat().st_size != expected:
        raise BundleError(f"{path.name} has {path.stat().st_size} bytes, a table of {shape} needs {expected}: export the bundle again")
    return np.memmap(path, np.float32, "r", shape=shape)
