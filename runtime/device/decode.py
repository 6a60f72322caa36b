"""The decode step on a device: one set of addresses and shapes for each pair of caches, so that it can be captured and replayed.

What changes from step to step (the token's row, position, both past lengths) goes through one page-locked buffer in one copy; logits
come back into another one. A pair's first step runs as it is, the second is captured, all further ones are replays: engines may allocate
in their first run of a shape, which a capture does not take.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from runtime import names
from runtime.device.base import ITEM_BYTES, Device, DeviceArray
from runtime.device.cache import Block
from runtime.device.half import Arrays, DeviceHalf
from runtime.device.memory import Scratch, host_dtype, round_up
from runtime.errors import EngineError
from runtime.kv_cache import KVGroup

_log = logging.getLogger(__name__)
PRE_LENGTH, POST_LENGTH = "pre.past_length", "post.past_length"


@dataclass(slots=True, eq=False)
class _Step:
    """One pair of caches: what both halves are bound to, how often it ran, and its capture."""

    pre: Arrays
    post: Arrays
    runs: int = 0
    replay: Callable[[], None] | None = None


class DecodeStep:
    """Decodes one token at a time.

    Args:
        hidden_size, dtype: of a row [1, 1, hidden_size]; `dtype` is the manifest's name.
        capture: whether steps are captured where the engines allow it.
    """

    def __init__(
        self, device: Device, pre: DeviceHalf, post: DeviceHalf, *, hidden_size: int, vocab_size: int, dtype: str, capture: bool = True
    ) -> None:
        self._device, self._pre, self._post, self._scratch = device, pre, post, Scratch(device)
        obstacle = pre.engine.uncapturable or post.engine.uncapturable
        if capture and obstacle is not None:
            _log.info("decode steps are not captured: %s", obstacle)
        self.captures = capture and obstacle is None
        self.steps: dict[tuple[int, int], _Step] = {}
        self._lay_out(hidden_size, dtype)
        self._logits = self._scratch.array(names.LOGITS, (1, vocab_size), "float32")
        self._logits_host = device.host_buffer(self._logits.nbytes).view(np.float32)

    def run(self, row: np.ndarray, position: int, caches: tuple[KVGroup, KVGroup], blocks: tuple[Block, Block]) -> np.ndarray:
        """Enqueues a step; the logits are in the returned array [vocab] float32 after `synchronize`, until the next step.

        Args:
            row: [1, 1, hidden_size] of the token table.
            caches: both groups, with room for one row; not advanced here.
            blocks: what they hold now.
        """
        self._row[:] = row
        for name, value in zip(self._numbers, (position, caches[0].length, caches[1].length, 0), strict=True):
            self._numbers[name][0] = value
        key = (blocks[0].number, blocks[1].number)
        step = self.steps.get(key)
        if step is None:
            step = self.steps[key] = self._bind(caches)
        if step.replay is None and step.runs and self.captures:
            self._capture(step)
        if step.replay is not None:
            step.replay()
        else:
            self._enqueue(step)
        step.runs += 1
        return self._logits_host

    def forget(self, block: Block) -> None:
        """Drops what was captured with a block, whose memory is about to go."""
        for key in [key for key in self.steps if block.number in key]:
            del self.steps[key]

    def close(self) -> None:
        self.steps.clear()
        self._scratch.close()

    def _lay_out(self, hidden_size: int, dtype: str) -> None:
        """The buffer that goes up at once: the row, and each number at an aligned place of its own."""
        row_bytes = round_up(hidden_size * ITEM_BYTES[dtype])
        items = (names.POSITION_IDS, PRE_LENGTH, POST_LENGTH, names.LAST_INDEX)
        block = round_up(8)
        self._host = self._device.host_buffer(row_bytes + len(items) * block)
        self._input = self._scratch.array("decode.input", (len(self._host) // 4,), "int32")
        self._row = self._host[: hidden_size * ITEM_BYTES[dtype]].view(host_dtype(dtype)).reshape(1, 1, hidden_size)
        self._row_at = DeviceArray(self._input.address, self._row.shape, dtype)
        starts = {name: row_bytes + i * block for i, name in enumerate(items)}
        self._numbers = {name: self._host[start : start + 8].view(np.int64) for name, start in starts.items()}
        self._numbers_at = {name: DeviceArray(self._input.address + start, (1,), "int64") for name, start in starts.items()}
        self._hidden = self._scratch.array("decode.hidden", self._row.shape, dtype)

    def _bind(self, caches: tuple[KVGroup, KVGroup]) -> _Step:
        at = self._numbers_at
        position = DeviceArray(at[names.POSITION_IDS].address, (1, 1, 1), "int64")
        pre = {names.POSITION_IDS: position, names.PAST_LENGTH: at[PRE_LENGTH]}
        post = {names.POSITION_IDS: position, names.PAST_LENGTH: at[POST_LENGTH], names.LAST_INDEX: at[names.LAST_INDEX]}
        return _Step(
            self._pre.bind(self._row_at, pre, caches[0], {names.HIDDEN_STATES: self._hidden}, self._scratch),
            self._post.bind(self._hidden, post, caches[1], {names.LOGITS: self._logits}, self._scratch),
        )

    def _enqueue(self, step: _Step) -> None:
        self._device.upload(self._input.address, self._host)
        self._pre.enqueue(step.pre)
        self._post.enqueue(step.post)
        self._device.download(self._logits_host, self._logits.address)

    def _capture(self, step: _Step) -> None:
        try:
            step.replay = self._device.capture(lambda: self._enqueue(step))
        except EngineError as error:
            _log.warning("decode steps are not captured, each is enqueued anew: %s", error)
            self.captures = False


def finite(logits: np.ndarray) -> bool:
    """Whether all are; one that is not makes the sum so, too."""
    return math.isfinite(float(logits.sum(dtype=np.float64)))
