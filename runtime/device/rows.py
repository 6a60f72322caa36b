"""A prompt's rows on a device: put together from text and images, scored where they lie, gathered for the second half.

Rows move by copies of contiguous stretches, and not at all where they lie right: the score's kept rows are written straight to their
places in the second half's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from runtime import names
from runtime.device.base import Device, DeviceArray
from runtime.device.half import Arrays, concrete_shape
from runtime.device.memory import is_aligned, read_array, reshaped, round_up, runs_of
from runtime.errors import EngineError
from runtime.kv_cache import KVGroup

if TYPE_CHECKING:
    from runtime.device.executor import DeviceExecutor


def place_images(
    device: Device, embeds: DeviceArray, text: DeviceArray, text_rows: np.ndarray, images: Sequence[DeviceArray], visual_rows: np.ndarray
) -> None:
    """Fills `embeds` [1, S, d] with rows of text at `text_rows` and of images [n, d] each, one after the other, at `visual_rows`."""
    for index, row, count in runs_of(text_rows):
        copy_rows(device, text.rows(index, index + count), embeds.rows(row, row + count))
    for i, image in enumerate(images):
        tokens = image.shape[0]
        for index, row, count in runs_of(visual_rows[i * tokens : (i + 1) * tokens]):
            copy_rows(device, image.rows(index, index + count), embeds.rows(row, row + count))


def copy_rows(device: Device, source: DeviceArray, target: DeviceArray) -> None:
    device.copy(target.address, source.address, source.nbytes)


@dataclass(slots=True, eq=False)
class DeviceRows:
    """See `runtime.executor.NewRows`: `positions` [S] on the host, `hidden` [1, S, d] and `score_states` [1, S, H * d_h] on the device.

    `cache` is that of the first half; `placed` says which rows scores have put where in the second half's input.
    """

    executor: DeviceExecutor
    positions: np.ndarray
    hidden: DeviceArray
    score_states: DeviceArray
    cache: KVGroup
    placed: dict[int, np.ndarray] = field(default_factory=dict)

    def score(self, budget: int, rows: np.ndarray, place: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        executor, graph = self.executor, names.score_graph(budget)
        engine = executor.engines[graph]
        self._check_rows(graph, engine.max_rows, len(rows))
        kept, entropy = np.empty(budget, np.int64), np.empty(len(rows), np.float32)
        with executor.running(graph):
            arrays = self._inputs(rows, seed)
            for tensor in executor.manifest.graphs[graph].outputs:
                shape = concrete_shape(graph, tensor.name, tensor.shape, {"N": len(rows)})
                arrays[tensor.name] = executor.scratch.array(f"score.{tensor.name}", shape, tensor.dtype)
            target = self._post_input(len(self.positions)).rows(place, place + budget)
            scratch = arrays[names.KEPT_HIDDEN_STATES]
            if is_aligned(target):
                arrays[names.KEPT_HIDDEN_STATES] = reshaped(target, scratch.shape)
            engine.enqueue(arrays)
            if not is_aligned(target):
                copy_rows(executor.device, scratch, target)
            executor.device.download(kept, arrays[names.KEPT_INDICES].address)
            executor.device.download(entropy, arrays[names.TOKEN_ENTROPY].address)
        self.placed[place] = rows[kept]
        return kept, entropy

    def gather(self, stays: np.ndarray) -> DeviceArray:
        """The rows that stay (bool [S]), [1, S', d]; enqueues copies of those that are not there yet."""
        if stays.all():
            return self.hidden
        rows = np.flatnonzero(stays)
        target, missing = self._post_input(len(rows)), np.ones(len(rows), bool)
        for place, placed in self.placed.items():
            if np.array_equal(rows[place : place + len(placed)], placed):
                missing[place : place + len(placed)] = False
        places = np.flatnonzero(missing)
        breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(rows[places]) != 1)) + 1
        for stretch in np.split(places, breaks) if len(places) else []:
            first, count = int(stretch[0]), len(stretch)
            row = int(rows[first])
            copy_rows(self.executor.device, self.hidden.rows(row, row + count), target.rows(first, first + count))
        return target

    def read(self) -> dict[str, np.ndarray]:
        found = {names.HIDDEN_STATES: self.hidden, names.SCORE_STATES: self.score_states}
        return {name: read_array(self.executor.device, array) for name, array in found.items()}

    def _inputs(self, rows: np.ndarray, seed: int) -> Arrays:
        """The score's inputs: rows that lie together are bound where they are."""
        stage, seeded = self.executor.stage, self.executor.manifest.score_mode == "random"
        stage.begin(round_up(8 * len(rows)) + round_up(8))
        arrays = {names.POSITION_IDS: stage.put(self.positions[rows][None], "int64")}
        if seeded:
            arrays[names.IMAGE_SEED] = stage.put(np.array([seed], np.int64), "int64")
        stage.upload()
        for name, whole in ((names.HIDDEN_STATES, self.hidden), (names.SCORE_STATES, self.score_states)):
            arrays[name] = self._together(name, whole, rows)
        return arrays

    def _together(self, name: str, whole: DeviceArray, rows: np.ndarray) -> DeviceArray:
        """Rows of an array as [N, width]: a part of it, or a copy where they are apart or lie at an address that engines do not take."""
        shape = (len(rows), whole.shape[-1])
        first, last = int(rows[0]), int(rows[-1])
        part = whole.rows(first, last + 1)
        if last - first + 1 == len(rows) and is_aligned(part):
            return reshaped(part, shape)
        copy = self.executor.scratch.array(f"score.rows.{name}", shape, whole.dtype)
        for index, row, count in runs_of(rows):
            copy_rows(self.executor.device, whole.rows(row, row + count), copy.rows(index, index + count))
        return copy

    def _post_input(self, rows: int) -> DeviceArray:
        """The second half's input, in memory for all S rows: it does not move while scores write into it."""
        whole = self.executor.scratch.array("post.hidden_states", self.hidden.shape, self.hidden.dtype)
        return whole.rows(0, rows)

    def _check_rows(self, graph: str, most: int | None, rows: int) -> None:
        if most is not None and rows > most:
            images = -(-rows // self.executor.manifest.geometry.visual_tokens)
            raise EngineError(
                f"the engine of {graph} takes {most} visual tokens at once, the message has {rows}: compile the bundle again with "
                f"`python -m runtime.compile --images {images}`, or spread the images over several messages"
            )
