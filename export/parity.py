"""The parity ladder: a bundle's chain of engines against the eager reference, stage by stage, with controls that must fail.

Knows nothing about command lines; `export.verify` and the tests run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from export.eager import EagerPrunedLlava, Prefill
from export.exact_dpp import greedy_shortfall, log_determinant
from export.exact_score import HIDDEN_MODES, select_tokens
from export.tolerances import GREEDY_TOKENS, RELATIVE
from runtime import names
from runtime.chain import EngineChain
from runtime.conversation import Conversation
from runtime.generation import Stopwatch
from runtime.host_executor import HostExecutor
from runtime.prompt import Prompt


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. `error` is relative (see `export.tolerances`), or a count of differing tokens with tolerance 0.

    A control (`must_fail`) passes when its error is above the tolerance.
    """

    name: str
    error: float
    tolerance: float
    must_fail: bool = False

    @property
    def passed(self) -> bool:
        return (self.error > self.tolerance) == self.must_fail and bool(np.isfinite(self.error))


@dataclass(frozen=True, slots=True)
class SelectionQuality:
    """The score graph's kept set against the exact one.

    Attributes:
        overlap: the share in common.
        swap_distance: how far a swapped token's score is from the threshold. 0 with `dpp`, where one choice changes the scores after it.
        score_error: largest difference of a score; NaN with `dpp` where the sets differ, for the same reason.
        shortfall: `dpp` only: see `export.exact_dpp.greedy_shortfall`, of the graph's order on the reference's hidden states.
        determinant_gap: `dpp` only: between the log-determinants of the two sets, for each kept token; 0 where they are the same.
    """

    overlap: float
    swap_distance: float
    score_error: float
    shortfall: float = 0.0
    determinant_gap: float = 0.0


def relative_error(actual: np.ndarray, expected: np.ndarray | torch.Tensor) -> float:
    """Largest absolute difference over the reference's largest absolute value; infinite where shapes or finiteness differ."""
    reference = np.asarray(expected)
    if actual.shape != reference.shape or not np.isfinite(actual).all():
        return float("inf")
    return float(np.abs(actual - reference).max() / max(np.abs(reference).max(), 1e-12)) if reference.size else 0.0


# ---------------------------------------------------------------- the ladder


def compare_prompt(chain: EngineChain, eager: EagerPrunedLlava, prompt: Prompt, kept: np.ndarray | None, label: str) -> Iterator[Check]:
    """Prefill, every cache tensor, greedy decoding; `kept` indices are injected into both (None: nothing is pruned)."""
    ids, pixels = torch.from_numpy(prompt.ids.input_ids)[None], _tensor(prompt.pixel_values)
    reference = eager.prefill(ids, pixels, kept_indices=kept)
    trace: dict[str, np.ndarray] = {}
    conversation, logits = _prefill(chain, prompt, kept, trace)
    precision = chain.manifest.precision
    yield _check(label, "hidden_states", trace[names.HIDDEN_STATES][0], reference.hidden_states, precision)
    yield _check(label, "score_states", trace[names.SCORE_STATES][0], reference.score_states, precision)
    yield from compare_caches(conversation, reference.keys, reference.values, label, precision)
    yield _check(label, "logits", logits, reference.logits[-1], precision)
    yield _greedy(chain, eager, conversation, logits, reference, label)
    keys, values = eager.cached()
    yield from compare_caches(conversation, keys, values, f"{label}, after decoding", precision)


def compare_caches(
    conversation: Conversation, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], label: str, precision: str = "fp32"
) -> Iterator[Check]:
    """Every layer's keys and values; one check for all keys, one for all values (the worst layer's error)."""
    for stage, side, expected in (("keys", 0, keys), ("values", 1, values)):
        groups = [(group, i) for group in (conversation.pre, conversation.post) for i in group.layers]
        errors = [relative_error(group.layer(i)[side], expected[i]) for group, i in groups]
        yield Check(f"{label}: {stage} of all layers", max(errors), RELATIVE[stage, precision])


def compare_continuation(chain: EngineChain, prompt: Prompt, tokens: Sequence[int], label: str) -> Check:
    """Prefill then decode equals one prefill of the whole sequence (nothing pruned)."""
    conversation, _ = _prefill(chain, prompt, None)
    for token in tokens:
        logits = chain.decode(conversation, token)
    whole_ids = np.concatenate([prompt.ids.input_ids, np.asarray(tokens, np.int64)])
    mask = np.concatenate([prompt.ids.visual_mask, np.zeros(len(tokens), bool)])
    _, expected = chain.prefill(whole_ids, mask, prompt.pixel_values, keep=None)
    return _check(label, "logits", logits, expected, chain.manifest.precision)


def compare_selection(chain: EngineChain, eager: EagerPrunedLlava, prompt: Prompt, keep: int) -> tuple[SelectionQuality, np.ndarray]:
    """The score graph's choice against the float64 definition on the eager model's tensors; also returns the graph's kept indices."""
    reference = eager.prefill(torch.from_numpy(prompt.ids.input_ids)[None], _tensor(prompt.pixel_values))
    conversation, _ = chain.prefill(
        prompt.ids.input_ids, prompt.ids.visual_mask, prompt.pixel_values, keep=keep, image_seed=prompt.image_seed
    )
    kept = conversation.kept_indices
    visual = torch.from_numpy(prompt.ids.visual_mask)
    hidden = reference.hidden_states[visual]
    exact = eager.exact_selection(reference.score_states[visual], hidden, len(kept))
    scores = conversation.token_entropy
    if eager.score_mode in HIDDEN_MODES:
        return determinantal_quality(hidden.numpy(), exact.kept_indices, exact.scores, kept, scores, eager.grid_width), kept
    error = float(np.abs(scores - exact.scores).max()) if scores is not None else float("nan")
    return selection_quality(exact.scores, kept, error), kept


def selection_quality(exact: np.ndarray, kept: np.ndarray, score_error: float = float("nan")) -> SelectionQuality:
    """Compares kept indices [R] with the exact choice by scores [N]."""
    best = select_tokens(exact, len(kept))
    threshold = float(np.sort(exact)[-len(kept)])
    swapped = np.setxor1d(kept, best)
    distance = float(np.abs(exact[swapped] - threshold).max()) if len(swapped) else 0.0
    return SelectionQuality(len(np.intersect1d(kept, best)) / len(kept), distance, score_error)


def determinantal_quality(
    hidden: np.ndarray, best: np.ndarray, exact: np.ndarray, kept: np.ndarray, scores: np.ndarray | None, grid_width: int
) -> SelectionQuality:
    """Compares a set that was chosen by `dpp` with the exact one.

    Args:
        hidden: [N, d], what the exact set `best` [R] and its variances `exact` [N] were computed from.
        kept: [R], ascending; `scores` [N] are the variances that it was chosen by, which tell the order; None where nothing was scored.
    """
    if scores is None:
        return SelectionQuality(len(np.intersect1d(kept, best)) / len(kept), 0.0, float("nan"), float("inf"), float("inf"))
    order = kept[np.argsort(-np.nan_to_num(scores[kept], nan=-1.0), kind="stable")]
    same = np.array_equal(kept, best)
    error = float(np.abs(scores - exact).max()) if same else float("nan")
    gap = 0.0 if same else abs(log_determinant(hidden, kept, grid_width) - log_determinant(hidden, best, grid_width)) / len(kept)
    return SelectionQuality(len(np.intersect1d(kept, best)) / len(kept), 0.0, error, greedy_shortfall(hidden, order, grid_width), gap)


# ---------------------------------------------------------------- controls: each must fail


def negative_controls(chain: EngineChain, eager: EagerPrunedLlava, prompt: Prompt, kept: np.ndarray) -> Iterator[Check]:
    """The same comparison with a known mistake in the chain: the ladder is worth something only if it sees each."""
    ids, pixels = torch.from_numpy(prompt.ids.input_ids)[None], _tensor(prompt.pixel_values)
    expected = eager.prefill(ids, pixels, kept_indices=kept).logits[-1]
    tolerance = RELATIVE["logits", chain.manifest.precision]
    mistakes = [("renumbered positions", _renumber)]
    if chain.manifest.geometry.layers - chain.manifest.split_layer > 1:  # with one layer left, the last row sees every order alike
        mistakes.append(("unsorted indices", _unsort))
    for name, mistake in mistakes:
        yield Check(f"control: {name}", relative_error(_pieces(chain, prompt, kept, mistake), expected), tolerance, must_fail=True)
    token = int(expected.argmax())
    after = eager.decode(token)
    conversation, _ = _prefill(chain, prompt, kept)
    for name, buffer in conversation.post.buffers.items():
        conversation.post.buffers[name] = np.roll(buffer, 1, axis=2)
    conversation.post.generation += 1  # the buffers are new ones
    yield Check(
        "control: post cache shifted by one",
        relative_error(chain.decode(conversation, token), after),
        tolerance,
        must_fail=True,
    )


def _renumber(hidden: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return hidden, np.arange(len(positions), dtype=np.int64)


def _unsort(hidden: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows before the last, back to front, each with its own position."""
    order = np.r_[np.arange(len(positions) - 1)[::-1], len(positions) - 1]
    return np.ascontiguousarray(hidden[:, order]), positions[order]


def _pieces(chain: EngineChain, prompt: Prompt, kept: np.ndarray, change: Callable[..., tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The chain's prefill from its pieces, with `change` applied to what enters the second half."""
    ids, rows = prompt.ids.input_ids, np.flatnonzero(prompt.ids.visual_mask)
    conversation = chain.new_conversation(len(ids), len(ids))
    positions = np.arange(len(ids), dtype=np.int64)
    host = chain.executor
    assert isinstance(host, HostExecutor), "the controls meddle with host arrays"
    embeds = host.embed(ids, rows, prompt.pixel_values, Stopwatch())
    (hidden,) = host.run_half(names.PRE_ECL, embeds, positions, conversation.pre, [names.HIDDEN_STATES])
    stays = np.setdiff1d(positions, np.delete(rows, kept))
    hidden, positions = change(np.ascontiguousarray(hidden[:, stays]), positions[stays])
    (logits,) = host.run_half(names.POST_ECL, hidden, positions, conversation.post, [names.LOGITS])
    result: np.ndarray = logits[0]
    return result


# ---------------------------------------------------------------- helpers


def _prefill(
    chain: EngineChain, prompt: Prompt, kept: np.ndarray | None, trace: dict[str, np.ndarray] | None = None
) -> tuple[Conversation, np.ndarray]:
    return chain.prefill(prompt.ids.input_ids, prompt.ids.visual_mask, prompt.pixel_values, keep=None, kept_indices=kept, trace=trace)


def _greedy(
    chain: EngineChain, eager: EagerPrunedLlava, conversation: Conversation, logits: np.ndarray, reference: Prefill, label: str
) -> Check:
    """Both decode greedily, each fed by its own choice; counts tokens that differ."""
    ours, theirs = [int(logits.argmax())], [int(reference.logits[-1].argmax())]
    for _ in range(GREEDY_TOKENS - 1):
        ours.append(int(chain.decode(conversation, ours[-1]).argmax()))
        theirs.append(int(eager.decode(theirs[-1]).argmax()))
    return Check(f"{label}: {GREEDY_TOKENS} greedy tokens", float(np.sum(np.array(ours) != np.array(theirs))), 0.0)


def _check(label: str, stage: str, actual: np.ndarray, expected: np.ndarray | torch.Tensor, precision: str) -> Check:
    return Check(f"{label}: {stage}", relative_error(actual, expected), RELATIVE[stage, precision])


def _tensor(array: np.ndarray | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array)
