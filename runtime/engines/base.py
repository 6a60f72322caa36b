"""The contract of an engine: a loaded graph that runs on numpy arrays and writes into a key-value cache in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from runtime.kv_cache import KVGroup


class Engine(Protocol):
    """One graph of a bundle, ready to run. Not thread-safe; the pipeline runs one call at a time."""

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str], cache: KVGroup | None = None) -> list[np.ndarray]:
        """Runs the graph once.

        Args:
            feeds: the inputs that are not cache buffers, C-contiguous, in the manifest's dtypes.
            outputs: names of the outputs wanted, in the order they are returned.
            cache: bound as past and present of its layers; its rows from `cache.length` on are overwritten.

        Raises:
            EngineError: the engine refused the run.
        """
        ...
