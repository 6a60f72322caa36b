"""The chain's stages on numpy arrays, with ONNX Runtime on the CPU."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime import names
from runtime.engines.base import Engine
from runtime.engines.onnxruntime import OnnxRuntimeEngine, version
from runtime.errors import BundleError
from runtime.generation import Stopwatch
from runtime.graph_tables import check_tables, dtype_of_halves, first_capacity
from runtime.kv_cache import KVGroup
from runtime.manifest import Manifest
from runtime.token_table import TokenTable


class HostExecutor:
    """See `runtime.executor.Executor`. Not thread-safe but for `lock`."""

    def __init__(self, bundle: Path, manifest: Manifest, threads: int | None = None) -> None:
        check_tables(manifest)
        self.manifest, self.lock, self.max_context = manifest, threading.Lock(), manifest.max_context
        self._dtype = dtype_of_halves(manifest)
        if self._dtype == "bfloat16":
            raise BundleError(
                "the decoder's type is bfloat16, ONNX Runtime on a CPU runs float32 and float16: export the bundle as fp32, "
                "or run it on a GPU"
            )
        self.engines: dict[str, Engine] = {
            name: OnnxRuntimeEngine(bundle / graph.file, graph, threads) for name, graph in manifest.graphs.items()
        }
        geometry = manifest.geometry
        self._table = TokenTable(bundle / manifest.embedding, (geometry.vocab_size, geometry.hidden_size), self._dtype)

    @property
    def label(self) -> str:
        return f"ONNX Runtime {version()} on the CPU"

    def new_group(self, graph: str, layers: range, tokens: int) -> KVGroup:
        g = self.manifest.geometry
        rows = first_capacity(self.manifest, tokens)
        return KVGroup(layers, g.kv_heads, g.head_size, rows, self.manifest.max_context, self._dtype)

    def embed(self, input_ids: np.ndarray, visual_rows: np.ndarray, pixel_values: np.ndarray | None, watch: Stopwatch) -> np.ndarray:
        """[1, S, d] of the halves' type: rows of the token table, and the images' rows at `visual_rows`."""
        image_embeds = None
        if pixel_values is not None:
            with watch.stage(names.VISION):
                (image_embeds,) = self.engines[names.VISION].run({names.PIXEL_VALUES: pixel_values}, [names.IMAGE_EMBEDS])
        with watch.stage("embed"):
            input_ids = np.array(input_ids)
            input_ids[visual_rows] = 0  # the placeholder may lie beyond the table
            embeds = self._table.rows(input_ids)
            if image_embeds is not None:
                check_rows(len(image_embeds), len(visual_rows))
                embeds[visual_rows] = image_embeds
        return embeds[None]

    def pre(self, embeds: np.ndarray, positions: np.ndarray, cache: KVGroup, scored: bool) -> HostRows:
        outputs = [names.HIDDEN_STATES, names.SCORE_STATES] if scored else [names.HIDDEN_STATES]
        results = self.run_half(names.PRE_ECL, embeds, positions, cache, outputs)
        return HostRows(self, positions, results[0], results[1] if scored else None)

    def post(self, new: HostRows, stays: np.ndarray, positions: np.ndarray, cache: KVGroup) -> np.ndarray:
        hidden = new.hidden if stays.all() else np.ascontiguousarray(new.hidden[:, stays])
        (logits,) = self.run_half(names.POST_ECL, hidden, positions, cache, [names.LOGITS])
        row: np.ndarray = logits[0]
        return row

    def decode(self, token_id: int, position: int, pre: KVGroup, post: KVGroup) -> np.ndarray:
        positions = np.array([position], dtype=np.int64)
        (hidden,) = self.run_half(names.PRE_ECL, self._table.row(token_id), positions, pre, [names.HIDDEN_STATES])
        (logits,) = self.run_half(names.POST_ECL, hidden, positions, post, [names.LOGITS])
        row: np.ndarray = logits[0]
        return row

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
        results = self.engines[name].run(feeds, outputs, cache)
        cache.advance(rows)
        return results

    def close(self) -> None:
        self.engines.clear()


@dataclass(frozen=True, slots=True, eq=False)
class HostRows:
    """See `runtime.executor.NewRows`: `hidden` [1, S, d], `score_states` [1, S, H * d_h] where they were asked for, `positions` [S]."""

    executor: HostExecutor
    positions: np.ndarray
    hidden: np.ndarray
    score_states: np.ndarray | None

    def score(self, budget: int, rows: np.ndarray, place: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        assert self.score_states is not None, "asked for before"
        feeds = {
            names.SCORE_STATES: self.score_states[0][rows],
            names.HIDDEN_STATES: self.hidden[0][rows],
            names.POSITION_IDS: self.positions[rows][None],
        }
        if self.executor.manifest.score_mode == "random":
            feeds[names.IMAGE_SEED] = np.array([seed], dtype=np.int64)
        kept, entropy = self.executor.engines[names.score_graph(budget)].run(feeds, [names.KEPT_INDICES, names.TOKEN_ENTROPY])
        return kept, entropy

    def read(self) -> dict[str, np.ndarray]:
        found = {names.HIDDEN_STATES: self.hidden, names.SCORE_STATES: self.score_states}
        return {name: array for name, array in found.items() if array is not None}


def check_rows(given: int, wanted: int) -> None:
    """Raises BundleError where the vision graph gives another number of rows than a prompt has visual tokens."""
    if given != wanted:
        raise BundleError(f"the vision graph gave {given} rows for {wanted} visual tokens: export the bundle again")
