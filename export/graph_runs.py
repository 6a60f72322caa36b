"""A real prompt through every graph of a bundle, one graph at a time: what each is given, and what it should give.

The runs are vision, pre_ecl over the prompt and over one more token, score for each budget, post_ecl over what the first budget leaves and
over one more token. Inputs come from the graphs before, run by ONNX Runtime on the CPU. Expected outputs of the vision tower and of both
halves come from eager transformers, which knows nothing of the graphs; of the score, whose near ties no other implementation settles
alike, from ONNX Runtime (float32 whatever the bundle's precision). Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from export.eager import EagerPrunedLlava, Prefill
from export.tolerances import MAX_SWAP_DISTANCE, RELATIVE
from runtime import names
from runtime.engines.onnxruntime import session_options
from runtime.errors import EngineError
from runtime.kv_cache import ROUND_TO
from runtime.manifest import Manifest
from runtime.prompt import Prompt

EAGER, ONNX_RUNTIME = "eager transformers", "ONNX Runtime on the CPU"
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class GraphRun:
    """One run of one graph.

    Args:
        name: the run's, such as "pre_ecl.decode".
        graph: the manifest's name of the graph.
        profile: the name that `runtime.engines.tensorrt_profiles` gives to this use of it.
        inputs: every input.
        outputs: every output as expected; a half's whole cache, with the new rows written.
        actual: the same from ONNX Runtime on the CPU.
        source: who expects that.
        tolerances: the largest absolute difference allowed, for each output.
    """

    name: str
    graph: str
    profile: str
    inputs: Arrays
    outputs: Arrays
    actual: Arrays
    source: str
    tolerances: dict[str, float]


def graph_runs(bundle: Path, manifest: Manifest, prompt: Prompt, reference: EagerPrunedLlava) -> Iterator[GraphRun]:
    """All runs of one prompt with one image.

    Args:
        reference: eager, with the bundle's split layer and `keep` None.

    Raises:
        EngineError: ONNX Runtime refuses a graph.
    """
    chain = _Stages(bundle, manifest, prompt)
    eager = chain.expected(reference)
    precision, visual = manifest.precision, torch.from_numpy(prompt.ids.visual_mask)
    embeds = eager.inputs_embeds[:-1][visual].numpy()
    yield _run("vision", names.VISION, "image", chain.vision, {names.IMAGE_EMBEDS: embeds}, precision)
    rows = len(prompt.ids.input_ids)
    for use, stage, new in (("prefill", chain.pre_prefill, slice(0, rows)), ("decode", chain.pre_decode, slice(rows, None))):
        yield _run(f"pre_ecl.{use}", names.PRE_ECL, use, stage, _pre_outputs(manifest, eager, stage, new), precision)
    for keep, stage in chain.scores.items():
        yield _score_run(keep, stage)
    rows = len(eager.position_ids) - 1
    for use, stage, new in (("prefill", chain.post_prefill, slice(0, rows)), ("decode", chain.post_decode, slice(rows, None))):
        yield _run(f"post_ecl.{use}", names.POST_ECL, use, stage, _post_outputs(manifest, eager, stage, new), precision)


# ---------------------------------------------------------------- the stages


@dataclass(frozen=True, slots=True, eq=False)
class _Stage:
    inputs: Arrays
    outputs: Arrays


class _Stages:
    """The chain, graph by graph, each loaded for its own runs alone. Both groups' caches have one capacity."""

    def __init__(self, bundle: Path, manifest: Manifest, prompt: Prompt) -> None:
        self._bundle, self._manifest, self._prompt = bundle, manifest, prompt
        ids, visual = prompt.ids.input_ids, prompt.ids.visual_mask
        tensors = {tensor.name: tensor for tensor in manifest.graphs[names.PRE_ECL].inputs}
        fixed = tensors[names.past_key(0)].shape[2]
        self._capacity = fixed if isinstance(fixed, int) else -(-(len(ids) + 1) // ROUND_TO) * ROUND_TO
        self._dtype = tensors[names.INPUTS_EMBEDS].dtype
        assert prompt.pixel_values is not None, "the prompt has an image"
        (self.vision,) = self._runs(names.VISION, [{names.PIXEL_VALUES: prompt.pixel_values}])
        table = np.memmap(bundle / manifest.embedding, np.float32, "r", shape=(manifest.geometry.vocab_size, manifest.geometry.hidden_size))
        embeds = np.array(table[np.where(visual, 0, ids)], self._dtype)
        embeds[visual] = self.vision.outputs[names.IMAGE_EMBEDS]
        positions = np.arange(len(ids))
        split, layers = manifest.split_layer, manifest.geometry.layers
        (self.pre_prefill,) = self._runs(names.PRE_ECL, [self._feeds(names.PRE_ECL, embeds, positions, self._empty(range(split)), 0)])
        hidden = self.pre_prefill.outputs[names.HIDDEN_STATES][0]
        self.scores = dict(self._scores(hidden, self.pre_prefill.outputs[names.SCORE_STATES][0], positions))
        first = self.scores.get(manifest.budgets[0])
        self.kept = None if first is None else first.outputs[names.KEPT_INDICES]
        stays = np.ones(len(ids), bool)
        if self.kept is not None:
            stays[np.delete(np.flatnonzero(visual), self.kept)] = False
        empty = self._empty(range(split, layers))
        (self.post_prefill,) = self._runs(names.POST_ECL, [self._feeds(names.POST_ECL, hidden[stays], positions[stays], empty, 0)])
        self.token = self._next_token()
        self._decode(np.array(table[[self.token]], self._dtype), int(stays.sum()))

    def expected(self, reference: EagerPrunedLlava) -> Prefill:
        """The prompt and the one token after it in one eager prefill: attention is causal, so its last row is the decode step."""
        ids = torch.from_numpy(np.append(self._prompt.ids.input_ids, self.token))[None]
        pixels = torch.from_numpy(self._prompt.pixel_values)
        return reference.prefill(ids, pixels, kept_indices=self.kept)

    def _decode(self, embeds: np.ndarray, kept_rows: int) -> None:
        position = np.array([len(self._prompt.ids.input_ids)])
        caches = (_past(self.pre_prefill, int(position[0])), _past(self.post_prefill, kept_rows))
        (self.pre_decode,) = self._runs(names.PRE_ECL, [self._feeds(names.PRE_ECL, embeds, position, caches[0], int(position[0]))])
        hidden = self.pre_decode.outputs[names.HIDDEN_STATES][0]
        (self.post_decode,) = self._runs(names.POST_ECL, [self._feeds(names.POST_ECL, hidden, position, caches[1], kept_rows)])

    def _scores(self, hidden: np.ndarray, states: np.ndarray, positions: np.ndarray) -> Iterator[tuple[int, _Stage]]:
        visual, manifest = self._prompt.ids.visual_mask, self._manifest
        for keep in manifest.budgets:
            if keep < int(visual.sum()):
                feeds = {
                    names.SCORE_STATES: states[visual],
                    names.HIDDEN_STATES: hidden[visual],
                    names.POSITION_IDS: positions[visual][None],
                }
                if any(tensor.name == names.IMAGE_SEED for tensor in manifest.graphs[names.score_graph(keep)].inputs):
                    feeds[names.IMAGE_SEED] = np.array([self._prompt.image_seed], np.int64)
                yield keep, self._runs(names.score_graph(keep), [feeds])[0]

    def _feeds(self, graph: str, rows: np.ndarray, positions: np.ndarray, past: Arrays, length: int) -> Arrays:
        feeds = {
            names.INPUTS_EMBEDS if graph == names.PRE_ECL else names.HIDDEN_STATES: rows[None],
            names.POSITION_IDS: positions.reshape(1, 1, -1).astype(np.int64),
            names.PAST_LENGTH: np.array([length], np.int64), **past,
        }  # fmt: skip
        if graph == names.POST_ECL:
            feeds[names.LAST_INDEX] = np.array([len(rows) - 1], np.int64)
        return feeds

    def _empty(self, layers: range) -> Arrays:
        g = self._manifest.geometry
        shape = (1, g.kv_heads, self._capacity, g.head_size)
        return {name: np.zeros(shape, self._dtype) for i in layers for name in (names.past_key(i), names.past_value(i))}

    def _next_token(self) -> int:
        logits = self.post_prefill.outputs[names.LOGITS][0].copy()
        logits[self._manifest.image_token_id : self._manifest.image_token_id + 1] = -np.inf  # a placeholder would stand for an image
        return int(logits.argmax())

    def _runs(self, graph: str, feeds: Sequence[Arrays]) -> list[_Stage]:
        return run_graph(self._bundle / self._manifest.graphs[graph].file, feeds)


def run_graph(path: Path, feeds: Sequence[Arrays]) -> list[_Stage]:
    """Loads a graph with Polygraphy's runner (on the threads that this process's engines share), runs it, and lets it go."""
    import onnxruntime
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    def load() -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL), OnnxrtRunner(load) as runner:
            return [_Stage(f, dict(runner.infer({n: np.ascontiguousarray(a) for n, a in f.items()}))) for f in feeds]
    except PolygraphyException as error:
        raise EngineError(f"ONNX Runtime could not run {path.name}: {error}; export the bundle again") from error


def _past(stage: _Stage, length: int) -> Arrays:
    """What a prefill leaves as the next run's past: its whole caches, or its new rows at their beginning."""
    return {name: _written(array, stage.outputs[_present(name)], 0, length) for name, array in stage.inputs.items() if _is_past(name)}


def _written(past: np.ndarray, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    """A cache with its slots `start` to `stop` taken from `rows` [1, heads, stop - start or more, d_h]."""
    cache = past.copy()
    cache[:, :, start:stop] = rows[:, :, : stop - start]
    return cache


# ---------------------------------------------------------------- what is expected


def _pre_outputs(manifest: Manifest, eager: Prefill, stage: _Stage, new: slice) -> Arrays:
    found = {names.HIDDEN_STATES: eager.hidden_states[new].numpy()[None], names.SCORE_STATES: eager.score_states[new].numpy()[None]}
    found |= {names.tap(i): eager.layer_states[i][new].numpy()[None] for i in range(manifest.split_layer)}
    return found | _caches(eager, stage, new, range(manifest.split_layer))


def _post_outputs(manifest: Manifest, eager: Prefill, stage: _Stage, new: slice) -> Arrays:
    layers = range(manifest.split_layer, manifest.geometry.layers)
    found = {names.LOGITS: eager.logits[new][-1:].numpy(), names.ALL_LOGITS: eager.logits[new].numpy()[None]}
    found |= {names.tap(i): eager.layer_states[i][new].numpy()[None] for i in layers}
    return found | _caches(eager, stage, new, layers)


def _caches(eager: Prefill, stage: _Stage, new: slice, layers: range) -> Arrays:
    """The present caches of the form that the graph gives: all of the past with the new rows in it, or the new rows alone."""
    expected = {}
    for i in layers:
        for name, rows in ((names.past_key(i), eager.keys[i]), (names.past_value(i), eager.values[i])):
            fresh = rows[:, new].numpy()[None].astype(stage.inputs[name].dtype)
            start, count = int(stage.inputs[names.PAST_LENGTH][0]), fresh.shape[2]
            whole = stage.outputs[_present(name)].shape == stage.inputs[name].shape
            expected[_present(name)] = _written(stage.inputs[name], fresh, start, start + count) if whole else fresh
    return expected


def _run(name: str, graph: str, profile: str, stage: _Stage, expected: Arrays, precision: str) -> GraphRun:
    """Puts a run together: of what is expected, the outputs that the graph has, in its types."""
    outputs = {output: expected[output].astype(array.dtype) for output, array in stage.outputs.items()}
    tolerances = {
        output: RELATIVE[_stage_of(output), precision] * max(float(np.abs(array.astype(np.float32)).max()), 1e-12)
        for output, array in outputs.items()
    }
    return GraphRun(name, graph, profile, stage.inputs, outputs, stage.outputs, EAGER, tolerances)


def _score_run(keep: int, stage: _Stage) -> GraphRun:
    """Kept tokens must be the same; scores may differ by what two tokens that change places may (`MAX_SWAP_DISTANCE`)."""
    scores = stage.outputs[names.TOKEN_ENTROPY]
    largest = float(np.abs(scores[np.isfinite(scores)]).max(initial=1.0))
    tolerances = {output: MAX_SWAP_DISTANCE * largest if output == names.TOKEN_ENTROPY else 0.0 for output in stage.outputs}
    graph = names.score_graph(keep)
    return GraphRun(graph, graph, "image", stage.inputs, stage.outputs, stage.outputs, ONNX_RUNTIME, tolerances)


def _stage_of(output: str) -> str:
    """An output's row in the table of tolerances."""
    if output.startswith(names.PRESENT):
        return "keys" if output.endswith(".key") else "values"
    return {names.ALL_LOGITS: names.LOGITS}.get(output, names.HIDDEN_STATES if output.startswith(f"{names.HIDDEN_STATES}.") else output)


def _is_past(name: str) -> bool:
    return name.startswith(names.PAST)


def _present(name: str) -> str:
    return names.PRESENT + name.removeprefix(names.PAST)
