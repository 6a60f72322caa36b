"""Rankings of an image's visual tokens from an unpruned pass: every score mode, on queries, keys, values or hidden states, at any layer.

Float64 definitions throughout (`export.exact_score`, `export.exact_dpp`): what calibration decides must not depend on an engine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibration.pruned_forward import DensePass, PrunedForward
from export.exact_dpp import dpp_order
from export.exact_score import ENTROPY_MODES, check_score_mode, token_scores
from export.graphs.controls import random_scores, uniform_scores
from runtime.errors import UsageError

TENSORS = ("query", "key", "value", "hidden")
MIN_TRACE_HEADS = 3  # centring over heads leaves rank H - 1; with rank 1 every token's entropy is 0


@dataclass(frozen=True, slots=True)
class Selector:
    """How tokens are ranked: a score mode, and the tensor that an activation's score is taken of.

    Attributes:
        mode: one of `runtime.names.SCORE_MODES`.
        tensor: "query", "key" or "value" (layer K-1's projections), or "hidden" (what enters layer K, cut into as many pieces as there are
            query heads). `dpp` looks at hidden states always; `random` and `uniform` at nothing.
        seed: of mode `random`, besides the image's own.
    """

    mode: str
    tensor: str = "query"
    seed: int = 0

    def __post_init__(self) -> None:
        check_score_mode(self.mode, None)
        if self.tensor not in TENSORS:
            raise UsageError(f"tensor is {self.tensor!r}; expected one of {', '.join(TENSORS)}")

    @property
    def name(self) -> str:
        """For tables: the mode, and the tensor where it is not the mode's usual one."""
        return self.mode if self.tensor == "query" or self.mode in ("dpp", "random", "uniform") else f"{self.mode} of {self.tensor}s"


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """`order`: int64 [N], the best token first. `scores`: float64 [N], the largest kept (NaN: not finite)."""

    order: np.ndarray
    scores: np.ndarray

    def kept(self, keep: int) -> np.ndarray:
        """int64 [keep], ascending."""
        return np.sort(self.order[:keep])

    def kept_mass(self, keep: int) -> float:
        """The share of the scores, less the smallest one, that the kept tokens hold; 1 where all scores are alike."""
        above = np.nan_to_num(self.scores - np.nanmin(self.scores)) if np.isfinite(self.scores).any() else np.zeros(len(self.scores))
        total = above.sum()
        return float(above[self.order[:keep]].sum() / total) if total > 0 else 1.0


def rank(
    forward: PrunedForward, dense: DensePass, split_layer: int, selector: Selector, image_seed: int = 0, scored_keep: int | None = None
) -> Ranking:
    """Ranks the visual tokens for a split before layer `split_layer`, 1..L-1.

    Args:
        image_seed: from the image's bytes; with the selector's own it decides mode `random`.
        scored_keep: `dpp` only: scores are the variances left when so many tokens have been taken, as a graph of that budget gives them
            (default: all). The order does not depend on it.

    Raises:
        UsageError: the mode has too few heads to look at, or the split is out of range.
    """
    if not 1 <= split_layer < forward.layers:
        raise UsageError(f"split_layer is {split_layer}; expected 1 to {forward.layers - 1}")
    rows = dense.prompt.visual_rows
    count = len(rows)
    if selector.mode == "random":
        scores = random_scores(image_seed + 7919 * selector.seed, count).astype(np.float64)
    elif selector.mode == "uniform":
        scores = uniform_scores(count, round(count**0.5)).astype(np.float64)
    elif selector.mode == "dpp":
        hidden, width = dense.entering[split_layer][rows].float().cpu().numpy(), round(count**0.5)
        order, scores = dpp_order(hidden, count, width)
        return Ranking(order, scores if scored_keep is None else dpp_order(hidden, scored_keep, width)[1])
    else:
        scores = token_scores(_heads(forward, dense, split_layer, selector), selector.mode)
    order = np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable")
    return Ranking(order, scores)


def _heads(forward: PrunedForward, dense: DensePass, split_layer: int, selector: Selector) -> np.ndarray:
    """[N, heads, size] of the selector's tensor."""
    if selector.tensor == "hidden":
        states, heads = dense.entering[split_layer][dense.prompt.visual_rows], forward.heads
    else:
        states = dense.states[selector.tensor][split_layer - 1]
        heads = forward.heads if selector.tensor == "query" else forward.kv_heads
    if selector.mode in ENTROPY_MODES and heads < MIN_TRACE_HEADS:
        raise UsageError(
            f"{selector.mode} of {selector.tensor}s needs {MIN_TRACE_HEADS} heads or more, the model has {heads}: score the queries instead"
        )
    return states.float().cpu().numpy().reshape(len(states), heads, -1)
