"""The score's definition in float64 with an eigensolver, as `token_scores`, and the choice it leads to.

What graphs approximate is measured against this. Shares no code with them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from runtime.errors import UsageError
from runtime.names import SCORE_MODES

__all__ = ["SCORELESS_MODES", "check_score_mode", "checked_indices", "select_tokens", "token_scores"]

EIGENVALUE_FLOOR = 1e-10  # eigenvalues are clamped here before the logarithm, as in the paper's code
ENTROPY_MODES = ("trace", "row", "raw")
SCORELESS_MODES = ("random", "uniform")


def token_scores(queries: Tensor, mode: str) -> np.ndarray:
    """Scores visual tokens by the spectrum of their heads; the definition, in float64.

    With Z the queries less their mean over the heads: `trace`, `row` and `raw` give -sum(x ln x) / ln H over the eigenvalues x of
    Z Z^T / tr(Z Z^T), of Z Z^T / H with the rows of Z normalised first, and of Z Z^T / H. `energy-high` and `energy-low` give
    tr(Z Z^T) / H and its negative.

    Args:
        queries: [N, H, d_h], any float dtype.
        mode: one of `runtime.names.SCORE_MODES`.

    Returns:
        float64 [N]; the largest are kept. NaN for a token that is not finite, and for all where the mode has no score.

    Raises:
        UsageError: unknown mode, or fewer heads than the mode needs.
    """
    heads = queries.shape[1]
    check_score_mode(mode, heads)
    if mode in SCORELESS_MODES:
        return np.full(queries.shape[0], np.nan)
    z = queries.detach().to("cpu", torch.float64)
    z = z - z.mean(dim=1, keepdim=True)
    finite = z.isfinite().all(dim=2).all(dim=1)
    z = torch.where(finite[:, None, None], z, torch.zeros_like(z))  # the eigensolver refuses NaN
    if mode == "row":
        norms = z.norm(dim=2, keepdim=True)
        z = z / torch.where(norms == 0, torch.ones_like(norms), norms)
    gram = z @ z.transpose(1, 2)
    trace = gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    if mode not in ENTROPY_MODES:
        scores = trace / heads if mode == "energy-high" else -trace / heads
    else:
        divisor = torch.where(trace == 0, torch.ones_like(trace), trace) if mode == "trace" else torch.full_like(trace, heads)
        spectrum = torch.linalg.eigvalsh(gram / divisor[:, None, None]).clamp(min=EIGENVALUE_FLOOR)
        scores = -(spectrum * spectrum.log()).sum(dim=1) / math.log(heads)
        scores = torch.where(trace == 0, torch.zeros_like(scores), scores)
    return torch.where(finite, scores, torch.full_like(scores, math.nan)).numpy()


def select_tokens(scores: np.ndarray, keep: int) -> np.ndarray:
    """The `keep` tokens of the largest scores; the lower index wins a tie, a score that is not finite comes last.

    Args:
        scores: float64 [N].
        keep: 1..N.

    Returns:
        int64 [keep], ascending.
    """
    order = np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable")
    return np.sort(order[:keep]).astype(np.int64)


def check_score_mode(mode: str, heads: int | None) -> None:
    """Refuses unknown modes and, with `heads`, too few of them: after centring, the rank is at most H - 1."""
    if mode not in SCORE_MODES:
        raise UsageError(f"unknown score mode {mode!r}, expected one of {', '.join(SCORE_MODES)}")
    needed = 1 if mode in SCORELESS_MODES else 3 if mode in ("trace", "row") else 2
    if heads is not None and heads < needed:
        raise UsageError(
            f"score mode {mode!r} is the same for all tokens with {heads} heads, it needs at least {needed}: choose another mode"
        )


def checked_indices(kept_indices: np.ndarray, visual_tokens: int, keep: int | None) -> np.ndarray:
    """The given indices as int64 [R], where they are usable; none are only where there are no visual tokens.

    Raises:
        UsageError: not ascending integers within 0..visual_tokens-1, or not as many as `keep` says.
    """
    kept = np.asarray(kept_indices)
    if visual_tokens == 0 and kept.size == 0:
        return np.zeros(0, np.int64)
    if kept.ndim != 1 or kept.size == 0 or not np.issubdtype(kept.dtype, np.integer):
        raise UsageError(f"kept_indices are {kept.dtype} of shape {list(kept.shape)}, expected integers [R] with R >= 1")
    if visual_tokens == 0:
        raise UsageError(f"{len(kept)} kept_indices were given for a prompt without visual tokens: give none, or the prompt's images")
    if kept.min() < 0 or kept.max() >= visual_tokens or (np.diff(kept) <= 0).any():
        raise UsageError(f"kept_indices must ascend within 0..{visual_tokens - 1} without repeats, got {kept[:8].tolist()}: sort them")
    count = len(kept) if keep is None else min(keep, visual_tokens)
    if len(kept) != count:
        raise UsageError(f"{len(kept)} kept_indices were given, expected {count} for keep={keep}: change one of the two")
    return kept.astype(np.int64)
