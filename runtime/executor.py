"""The contract between the chain and what runs its stages: the session differs, the chain does not.

`runtime.host_executor` runs on numpy arrays with engines of the CPU, `runtime.device.executor` in a device's memory. What passes from stage
to stage is the executor's own business; the chain sees logits, kept indices and scores. One call at a time, under `lock`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from runtime.generation import Stopwatch
from runtime.kv_cache import KVGroup
from runtime.manifest import Manifest


class NewRows(Protocol):
    """A prompt's S new rows as they leave `pre_ecl`; valid until `post` has run."""

    def score(self, budget: int, rows: np.ndarray, place: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Ranks visual tokens.

        Args:
            budget: R, whose graph is asked.
            rows: [N] int64 ascending, which of the new rows.
            place: how many of the rows that stay lie before them.
            seed: of the images' bytes, for the control `random`.

        Returns:
            Kept indices [R] int64 ascending, and every token's score [N] float32.
        """
        ...

    def read(self) -> dict[str, np.ndarray]:
        """`hidden_states` and `score_states`, on the host."""
        ...


class Executor(Protocol):
    """Runs a bundle's stages. Each returns when its results are there."""

    @property
    def manifest(self) -> Manifest:
        """The bundle as what runs here sees it: one of its targets."""
        ...

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held during every call below."""
        ...

    @property
    def max_context(self) -> int:
        """The longest prompt and answer in tokens: the bundle's, or what the engines' caches hold."""
        ...

    @property
    def label(self) -> str:
        """What runs, for people."""
        ...

    def new_group(self, graph: str, layers: range, tokens: int) -> KVGroup:
        """An empty cache for one half, with room for `tokens`."""
        ...

    def embed(self, input_ids: np.ndarray, visual_rows: np.ndarray, pixel_values: np.ndarray | None, watch: Stopwatch) -> Any:
        """Rows of the token table for `input_ids` [S], with the rows of the images [images, 3, side, side] at `visual_rows`."""
        ...

    def pre(self, embeds: Any, positions: np.ndarray, cache: KVGroup, scored: bool) -> NewRows:
        """Layers before the split over new rows at `positions` [S]; `scored`: whether score states are wanted."""
        ...

    def post(self, new: Any, stays: np.ndarray, positions: np.ndarray, cache: KVGroup) -> np.ndarray:
        """Layers after the split over the new rows that stay (bool [S]); logits [vocab] float32 of the last one."""
        ...

    def decode(self, token_id: int, position: int, pre: KVGroup, post: KVGroup) -> np.ndarray:
        """One token through both halves; logits [vocab] float32."""
        ...

    def close(self) -> None:
        """Gives everything back. Nothing can run afterwards."""
        ...
