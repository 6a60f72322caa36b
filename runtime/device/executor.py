"""The chain's stages in a device's memory: hidden states never leave it, only logits, kept indices and scores do.

Every stage ends with `Device.synchronize`, so that a stage's time is its own and page-locked buffers may be filled anew.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime import names
from runtime.device.base import Device, DeviceArray, DeviceEngine
from runtime.device.cache import DeviceCaches
from runtime.device.decode import DecodeStep, finite
from runtime.device.half import DeviceHalf
from runtime.device.memory import Scratch, Stage, round_up
from runtime.device.rows import DeviceRows, place_images
from runtime.errors import BundleError, EngineError
from runtime.generation import Stopwatch
from runtime.graph_tables import check_tables, dtype_of_halves, first_capacity
from runtime.host_executor import check_rows
from runtime.kv_cache import KVGroup
from runtime.manifest import Manifest
from runtime.token_table import TokenTable

OnRun = Callable[[str, float], None]  # a graph's name, milliseconds until its results were there


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """`capture`: decode steps are captured and replayed where the engines allow it."""

    capture: bool = True


class DeviceExecutor:
    """See `runtime.executor.Executor`. Owns the device and the engines: `close`, or the last reference to it, closes the device.

    Args:
        engines: one for each graph of the manifest; the table is taken over, and emptied in the end.
        label: what runs, for people.

    Raises:
        BundleError, EngineError: an engine is missing, or the manifest's tables cannot be.
    """

    def __init__(
        self, bundle: Path, manifest: Manifest, device: Device, engines: dict[str, DeviceEngine], label: str,
        options: DeviceOptions | None = None,
    ) -> None:  # fmt: skip
        check_tables(manifest)
        missing = [graph for graph in manifest.graphs if graph not in engines]
        if missing:
            raise EngineError(f"there is no engine of {missing[0]}: compile the bundle again")
        self.manifest, self.device, self.label, self.on_run = manifest, device, label, _ignore
        self.lock = threading.RLock()
        self.engines = engines
        self.dtype, g = dtype_of_halves(manifest), manifest.geometry
        self._table = TokenTable(bundle / manifest.embedding, (g.vocab_size, g.hidden_size), self.dtype)
        self.scratch, self.stage = Scratch(device), Stage(device)
        halves = (names.PRE_ECL, names.POST_ECL)
        self._pre, self._post = (DeviceHalf(name, self.engines, manifest.graphs[name], device, self.scratch) for name in halves)
        self._step = DecodeStep(
            device, self._pre, self._post, hidden_size=g.hidden_size, vocab_size=g.vocab_size, dtype=self.dtype,
            capture=(options or DeviceOptions()).capture,
        )  # fmt: skip
        self.caches = DeviceCaches(device, self.lock, self._step.forget)
        self._unsettled = False
        self._close = weakref.finalize(self, _shut_down, self._step.steps, self.engines, device)

    @property
    def max_context(self) -> int:
        capacities = (self.manifest.max_context, self._pre.engine.capacity, self._post.engine.capacity)
        return min(capacity for capacity in capacities if capacity is not None)

    def new_group(self, graph: str, layers: range, tokens: int) -> KVGroup:
        g, fixed = self.manifest.geometry, self.engines[graph].capacity
        tokens = first_capacity(self.manifest, tokens)
        return KVGroup(layers, g.kv_heads, g.head_size, tokens, self.manifest.max_context, self.dtype, self.caches, fixed)

    # ------------------------------------------------------------ the stages

    def embed(self, input_ids: np.ndarray, visual_rows: np.ndarray, pixel_values: np.ndarray | None, watch: Stopwatch) -> DeviceArray:
        """[1, S, d]: text rows go up together and are put in their places by copies within the device, as the images' rows are."""
        images: list[DeviceArray] = []
        if pixel_values is not None:
            with watch.stage(names.VISION):
                images = self._vision(pixel_values, len(visual_rows))
        with watch.stage("embed"), self._settling():
            text_rows = np.setdiff1d(np.arange(len(input_ids)), visual_rows)
            rows = self._table.rows(input_ids[text_rows])
            self.stage.begin(round_up(rows.nbytes))
            text = self.stage.put(rows, self.dtype)
            self.stage.upload()
            if not images:
                return DeviceArray(text.address, (1, *text.shape), text.dtype)
            embeds = self.scratch.array(names.INPUTS_EMBEDS, (1, len(input_ids), text.shape[1]), self.dtype)
            place_images(self.device, embeds, text, text_rows, images, visual_rows)
        return embeds

    def pre(self, embeds: DeviceArray, positions: np.ndarray, cache: KVGroup, scored: bool) -> DeviceRows:
        rows = embeds.shape[1]
        width = self.manifest.geometry.query_heads * self.manifest.geometry.head_size
        outputs = {
            names.HIDDEN_STATES: self.scratch.array(names.HIDDEN_STATES, embeds.shape, self.dtype),
            names.SCORE_STATES: self.scratch.array(names.SCORE_STATES, (1, rows, width), self.dtype),
        }
        self.caches.block_of(cache).sound = False
        with self.running(names.PRE_ECL):
            self._pre.run(embeds, positions, cache, outputs)
        return DeviceRows(self, positions, outputs[names.HIDDEN_STATES], outputs[names.SCORE_STATES], cache)

    def post(self, new: DeviceRows, stays: np.ndarray, positions: np.ndarray, cache: KVGroup) -> np.ndarray:
        logits = np.empty(self.manifest.geometry.vocab_size, np.float32)
        at = self.scratch.array(names.LOGITS, (1, len(logits)), "float32")
        self.caches.block_of(cache).sound = False
        with self.running(names.POST_ECL):
            self._post.run(new.gather(stays), positions, cache, {names.LOGITS: at})
            self.device.download(logits, at.address)
        self._settle_blocks(logits, new.cache, cache)
        return logits

    def decode(self, token_id: int, position: int, pre: KVGroup, post: KVGroup) -> np.ndarray:
        pre.reserve(1)
        post.reserve(1)
        row, blocks = self._table.row(token_id), (self.caches.block_of(pre), self.caches.block_of(post))
        for block in blocks:
            block.sound = False
        with self.running(names.POST_ECL):
            logits = self._step.run(row, position, (pre, post), blocks)
        pre.advance(1)
        post.advance(1)
        self._settle_blocks(logits, pre, post)
        return logits.copy()

    def close(self) -> None:
        with self.lock:
            if self._close.alive:
                self.caches.close()
                for part in (self._step, self._pre, self._post, self.scratch, self.stage):
                    part.close()
                self._close()

    # ------------------------------------------------------------ for DeviceRows

    @contextmanager
    def running(self, graph: str) -> Iterator[None]:
        """Waits at the end for what is enqueued within, and tells `on_run` how long that took."""
        began = time.perf_counter()
        with self._settling():
            yield
        self.on_run(graph, (time.perf_counter() - began) * 1e3)

    @contextmanager
    def _settling(self) -> Iterator[None]:
        """Nothing of this stage is under way when it ends, also after an error; if that cannot be, the next stage waits first."""
        if not self._close.alive:
            raise EngineError("the model was closed: load the bundle again")
        if self._unsettled:
            self.device.synchronize()
        self._unsettled = True
        try:
            yield
        finally:
            self.device.synchronize()
        self._unsettled = False

    def _vision(self, pixel_values: np.ndarray, visual_tokens: int) -> list[DeviceArray]:
        """Each image's rows [n, d], one image after the other: what engines are built for."""
        tokens, (output,) = self.manifest.geometry.visual_tokens, self.manifest.graphs[names.VISION].outputs
        check_rows(tokens * len(pixel_values), visual_tokens)
        if output.dtype != self.dtype:
            raise BundleError(f"the vision graph gives {output.dtype}, the decoder takes {self.dtype}: export the bundle again")
        shape = (tokens, self.manifest.geometry.hidden_size)
        size = round_up(DeviceArray(0, shape, self.dtype).nbytes)
        address = self.scratch.array(names.IMAGE_EMBEDS, (len(pixel_values), size // 4), "int32").address
        images = [DeviceArray(address + i * size, shape, self.dtype) for i in range(len(pixel_values))]
        with self.running(names.VISION):
            self.stage.begin(len(pixel_values) * round_up(pixel_values[0].nbytes))
            pixels = [self.stage.put(image[None], "float32") for image in pixel_values.astype(np.float32, copy=False)]
            self.stage.upload()
            for one, embeds in zip(pixels, images, strict=True):
                self.engines[names.VISION].enqueue({names.PIXEL_VALUES: one, names.IMAGE_EMBEDS: embeds})
        return images

    def _settle_blocks(self, logits: np.ndarray, *caches: KVGroup) -> None:
        """A later conversation may have the blocks if no number in them is without an end: the last row has seen every row."""
        sound = finite(logits)
        for cache in caches:
            self.caches.block_of(cache).sound = sound


def _ignore(graph: str, ms: float) -> None:
    """The clock of those who do not profile."""


def _shut_down(steps: dict[Any, Any], engines: dict[str, DeviceEngine], device: Device) -> None:
    """Captured steps and engines first: they are the device's."""
    steps.clear()
    engines.clear()
    device.close()
