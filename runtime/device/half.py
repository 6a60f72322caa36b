"""One decoder half on a device: which array every input and output is bound to, and a run in as many pieces as the engine needs.

A half is causal and its cache tells it what came before, so pieces give what one run gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from runtime import names
from runtime.device.base import ITEM_BYTES, Device, DeviceArray, DeviceEngine
from runtime.device.memory import ALIGNMENT, Scratch, Stage, round_up
from runtime.errors import EngineError
from runtime.kv_cache import KVGroup
from runtime.manifest import GraphInfo

Arrays = dict[str, DeviceArray]


class DeviceHalf:
    """`pre_ecl` or `post_ecl`.

    Where the graph gives only the new rows of keys and values (`present.*` as long as the sequence), they go to one buffer for all layers,
    and from there into the cache.
    """

    def __init__(self, name: str, engines: Mapping[str, DeviceEngine], graph: GraphInfo, device: Device, scratch: Scratch) -> None:
        self.name, self._engines, self._graph, self._device, self._scratch = name, engines, graph, device, scratch
        self._stage = Stage(device)
        present = [tensor for tensor in graph.outputs if tensor.name.startswith(names.PRESENT)]
        self._appended = [tensor.name for tensor in present if tensor.shape[2] == "sequence"]
        listed = {tensor.name for tensor in graph.inputs}
        self.first_input = names.INPUTS_EMBEDS if names.INPUTS_EMBEDS in listed else names.HIDDEN_STATES

    @property
    def engine(self) -> DeviceEngine:
        """Looked up each time: who closes the engines drops them from their table, and none may outlive its device."""
        return self._engines[self.name]

    def run(self, hidden: DeviceArray, positions: np.ndarray, cache: KVGroup, outputs: Mapping[str, DeviceArray]) -> None:
        """Enqueues new rows and counts them in the cache.

        Args:
            hidden: [1, S, d].
            positions: [S] int64, on the host.
            cache: its buffers take the new keys and values.
            outputs: where the outputs that are wanted go, for all S rows ([1, S, ...]); the others go to scratch memory.
        """
        rows = len(positions)
        cache.reserve(rows)
        pieces = list(self._pieces(rows, (hidden, *outputs.values())))
        self._stage.begin(sum(round_up(8 * (stop - start)) + 2 * round_up(8) for start, stop in pieces))
        inputs = []
        for start, stop in pieces:
            numbers = {
                names.POSITION_IDS: positions[start:stop].reshape(1, 1, -1),
                names.PAST_LENGTH: np.array([cache.length + start]),
                names.LAST_INDEX: np.array([stop - start - 1]),
            }
            inputs.append({name: self._stage.put(array.astype(np.int64), "int64") for name, array in numbers.items()})
        self._stage.upload()
        for (start, stop), numbers_at in zip(pieces, inputs, strict=True):
            whole = stop - start == rows
            given = {name: out if whole or name == names.LOGITS else out.rows(start, stop) for name, out in outputs.items()}
            self.enqueue(self.bind(hidden.rows(start, stop), numbers_at, cache, given, self._scratch))
        cache.advance(rows)

    def bind(
        self, hidden: DeviceArray, numbers: Mapping[str, DeviceArray], cache: KVGroup, outputs: Mapping[str, DeviceArray], scratch: Scratch
    ) -> Arrays:
        """Every input and output of one run: `numbers` are positions, past length and last index; outputs not given go to `scratch`."""
        sizes = {"sequence": hidden.shape[1], "capacity": cache.capacity}
        arrays: Arrays = {self.first_input: hidden}
        for name in (tensor.name for tensor in self._graph.inputs if tensor.name != self.first_input):
            found = cache.buffers.get(name) if name.startswith(names.PAST) else numbers.get(name)
            if found is None:
                raise EngineError(f"{self.name} has an input {name!r:.60} that the runtime does not know: upgrade, or export again")
            arrays[name] = found
        staged = self._staging(sizes, scratch)
        for tensor in self._graph.outputs:
            if tensor.name in outputs:
                arrays[tensor.name] = outputs[tensor.name]
            elif tensor.name in staged:
                arrays[tensor.name] = staged[tensor.name]
            elif tensor.name.startswith(names.PRESENT):
                arrays[tensor.name] = cache.buffers[names.PAST + tensor.name.removeprefix(names.PRESENT)]
            else:
                shape = concrete_shape(self.name, tensor.name, tensor.shape, sizes)
                arrays[tensor.name] = scratch.array(f"{self.name}.{tensor.name}", shape, tensor.dtype)
        return arrays

    def enqueue(self, arrays: Arrays) -> None:
        """One run, and the new rows into the cache where the graph does not write them itself."""
        self.engine.enqueue(arrays)
        for name in self._appended:
            past = arrays[names.PAST + name.removeprefix(names.PRESENT)]
            self._device.scatter_rows(past, arrays[name], arrays[names.PAST_LENGTH])

    def close(self) -> None:
        self._stage.close()

    def _pieces(self, rows: int, arrays: Iterable[DeviceArray]) -> Iterator[tuple[int, int]]:
        """Stretches that the engine takes, the longest first; each begins at an aligned address of the arrays that are cut."""
        ranges = self.engine.row_ranges or ((1, self.engine.max_rows or rows),)
        row_bytes = [array.shape[-1] * ITEM_BYTES[array.dtype] for array in arrays]
        step = max(ALIGNMENT // math.gcd(ALIGNMENT, nbytes) for nbytes in row_bytes)  # powers of two
        start = 0
        while start < rows:
            fitting = [min(high, rows - start) for low, high in ranges if low <= rows - start]
            if not fitting:
                raise EngineError(
                    f"the engine of {self.name} takes {ranges[0][0]} rows or more at once, {rows - start} are left: "
                    "compile the bundle again"
                )
            count = max(fitting)
            if start + count < rows:
                rounded = count // step * step
                count = rounded if any(low <= rounded <= high for low, high in ranges) else count
            yield start, start + count
            start += count

    def _staging(self, sizes: Mapping[str, int], scratch: Scratch) -> Arrays:
        """Where `present.*` of the new rows goes: one buffer, a part of it for each."""
        tensors = [tensor for tensor in self._graph.outputs if tensor.name in self._appended]
        shapes = {t.name: concrete_shape(self.name, t.name, t.shape, sizes) for t in tensors}
        nbytes = {t.name: round_up(math.prod(shapes[t.name]) * ITEM_BYTES[t.dtype]) for t in tensors}
        if not tensors:
            return {}
        address, arrays = scratch.array(f"{self.name}.present", (sum(nbytes.values()) // 4,), "int32").address, {}
        for tensor in tensors:
            arrays[tensor.name] = DeviceArray(address, shapes[tensor.name], tensor.dtype)
            address += nbytes[tensor.name]
        return arrays


def concrete_shape(graph: str, tensor: str, shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A shape of the manifest with its symbolic sizes filled in.

    Raises:
        EngineError: it has a size that is not known here.
    """
    unknown = [size for size in shape if isinstance(size, str) and size not in sizes]
    if unknown:
        raise EngineError(f"{graph}'s output {tensor} has a size {unknown[0]!r:.40} that the runtime does not know: export it again")
    return tuple(sizes[size] if isinstance(size, str) else size for size in shape)
