"""The definition of mode `dpp` in float64: the kept set whose hidden states are least alike.

Which tokens score high one by one says nothing about whether they say the same thing. This mode looks at the set: with x the hidden states
less their mean over the tokens, each divided by its norm, the tokens' kernel is

    L_ij = (1 + cos(x_i, x_j)) / 2        1 on the diagonal, 0 between opposite directions; positive semi-definite

and the kept set is built greedily so that the determinant of its part of L grows most: each step takes the token with the largest
variance left once those taken are known (the greedy maximum of a determinantal point process, by an incremental Cholesky factor;
Chen, Zhang and Zhou, NeurIPS 2018). The order does not depend on how many are kept, so a smaller budget's set lies within a larger one's.

What the graph computes is measured against this. Shares no code with it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["dpp_order"]

VARIANCE_FLOOR = 1e-6  # variances below count as 0: rounding, not information


def dpp_order(hidden_states: npt.ArrayLike, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens in the order they are taken.

    Args:
        hidden_states: [N, d], what enters layer K.
        count: 1..N, how many to take.

    Returns:
        int64 [count], first taken first; of equal variances the lower index, tokens that are not finite last. And float64 [N]: each token's
        variance when it was taken, or what is left of it at the end; NaN for a token that is not finite.
    """
    x = np.asarray(hidden_states, np.float64)
    finite = np.asarray(np.isfinite(x).all(axis=1))
    x = np.where(finite[:, None], x, 0.0)
    x = np.where(finite[:, None], x - x[finite].mean(axis=0) if finite.any() else x, 0.0)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x = np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)
    kernel = (1.0 + x @ x.T) / 2.0
    left = np.ones(len(x))
    factor = np.zeros((0, len(x)))
    variances = np.zeros(len(x))
    taken: list[int] = []
    for _ in range(count):
        rank = np.where(finite, np.where(left < VARIANCE_FLOOR, 0.0, left), -1.0)
        rank[taken] = -2.0
        best = int(rank.argmax())
        taken.append(best)
        variances[best] = max(left[best], 0.0)
        row = (kernel[best] - factor[:, best] @ factor) / np.sqrt(max(left[best], VARIANCE_FLOOR))
        factor = np.vstack([factor, row])
        left = left - row**2
    rest = np.setdiff1d(np.arange(len(x)), taken)
    variances[rest] = left[rest].clip(0.0)
    return np.array(taken, np.int64), np.where(finite, variances, np.nan)
