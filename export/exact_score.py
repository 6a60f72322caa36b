"""The score's definition in float64 with an eigensolver, as `token_scores`, and the choice it leads to.

What graphs approximate is measured against this. Shares no code with them.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from runtime.errors import UsageError
from runtime.names import SCORE_MODES, SCORELESS_MODES

__all__ = ["SCORELESS_MODES", "check_score_mode", "checked_indices", "select_tokens", "token_scores"]

EIGENVALUE_FLOOR = 1e-10  # eigenvalues are clamped here before the logarithm, as in the paper's code
ENTROPY_MODES = ("trace", "row", "raw")


def token_scores(queries: npt.ArrayLike, mode: str) -> np.ndarray:
    """Scores visual tokens by the spectrum of their heads; the definition, in float64.

    With Z the queries less their mean over the heads: `trace`, `row` and `raw` give -sum(x ln x) / ln H over the eigenvalues x of
    Z Z^T / tr(Z Z^T), of Z Z^T / H with the rows of Z normalised first, and of Z Z^T / H. `energy-high` and `energy-low` give
    tr(Z Z^T) / H and its negative.

    Args:
        queries: [N, H, d_h], any float dtype; a torch tensor on the CPU without gradients serves too.
        mode: one of `runtime.names.SCORE_MODES`.

    Returns:
        float64 [N]; the largest are kept. NaN for a token that is not finite, and for all where the mode has no score.

    Raises:
        UsageError: unknown mode, or fewer heads than the mode needs.
    """
    q = np.asarray(queries, np.float64)
    heads = q.shape[1]
    check_score_mode(mode, heads)
    if mode in SCORELESS_MODES:
        return np.full(len(q), np.nan)
    finite = np.asarray(np.isfinite(q).all(axis=(1, 2)))
    q = np.where(finite[:, None, None], q, 0.0)  # the eigensolver refuses NaN
    z = q - q.mean(axis=1, keepdims=True)
    if mode == "row":
        norms = np.linalg.norm(z, axis=2, keepdims=True)
        z = np.divide(z, norms, out=np.zeros_like(z), where=norms > 0)
    gram = z @ z.transpose(0, 2, 1)
    trace = np.trace(gram, axis1=1, axis2=2)
    if mode not in ENTROPY_MODES:
        scores = trace / heads if mode == "energy-high" else -trace / heads
    else:
        divisor = np.where(trace > 0, trace, 1.0) if mode == "trace" else np.full(len(z), float(heads))
        spectrum = np.linalg.eigvalsh(gram / divisor[:, None, None]).clip(EIGENVALUE_FLOOR)
        scores = np.where(trace > 0, -(spectrum * np.log(spectrum)).sum(axis=1) / math.log(heads), 0.0)
    return np.where(finite, scores, np.nan)


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
