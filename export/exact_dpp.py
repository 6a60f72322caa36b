"""The definition of mode `dpp` in float64: the kept set whose tokens are least alike, in what they hold and where they are.

Which tokens score high one by one says nothing about whether they say the same thing. This mode looks at the set: with x the hidden states
less their mean over the tokens, each divided by its norm, and p the tokens' places, in units of the image's width, their kernel is

    L_ij = (1 + cos(x_i, x_j)) / 2  *  exp(-2 |p_i - p_j|^2)

1 on the diagonal, 0 between opposite directions, positive semi-definite as both factors are. The second factor says that two like things at
two places are two things; its width, half an image, was chosen on other scenes than those that results are reported on. The images of a
group lie one below the other.

The kept set is built greedily so that the determinant of its part of L grows most: each step takes the token with the largest variance left
once those taken are known (the greedy maximum of a determinantal point process, by an incremental Cholesky factor; Chen, Zhang and Zhou,
NeurIPS 2018). The order does not depend on how many are kept, so a smaller budget's set lies within a larger one's.

Two tokens may be as good as equal, and a choice between them changes what is taken after: float32 may take another set than float64 and be
right. `greedy_shortfall` and `log_determinant` judge such a set.

What the graph computes is measured against this. Shares no code with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["dpp_order", "greedy_shortfall", "log_determinant"]

VARIANCE_FLOOR = 1e-5  # variances below count as 0: float32 leaves up to 4.2e-6 of copies and of exhausted dimensions
AT_THE_MEAN = 1e-6  # a row closer to the mean than this share of the largest entry has no direction: what is left is rounding


def dpp_order(hidden_states: npt.ArrayLike, count: int, grid_width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens in the order they are taken.

    Args:
        hidden_states: [N, d], what enters layer K.
        count: 1..N, how many to take.
        grid_width: patches in one row of an image.

    Returns:
        int64 [count], first taken first; of equal variances the lower index, tokens that are not finite last. And float64 [N]: each token's
        variance when it was taken, or what is left of it at the end; 0 below `VARIANCE_FLOOR`, NaN for a token that is not finite.
    """
    state = _Greedy.start(hidden_states, grid_width)
    variances = np.zeros(len(state.left))
    for _ in range(count):
        rank = state.rank()
        best = int(rank.argmax())
        variances[best] = rank[best]
        state = state.take(best)
    rest = np.setdiff1d(np.arange(len(variances)), state.taken)
    variances[rest] = state.rank()[rest]
    return np.array(state.taken, np.int64), np.where(state.finite, variances, np.nan)


def greedy_shortfall(hidden_states: npt.ArrayLike, order: npt.ArrayLike, grid_width: int) -> float:
    """How far an order is from greedy: the most variance that a step forwent, against the best token left at that step. 0 to 2.

    Args:
        hidden_states: [N, d].
        order: int [R], tokens in the order they were taken, each at most once.
    """
    state, worst = _Greedy.start(hidden_states, grid_width), 0.0
    for token in np.asarray(order):
        rank = state.rank()
        worst = max(worst, float(rank.max() - rank[token]))
        state = state.take(int(token))
    return worst


def log_determinant(hidden_states: npt.ArrayLike, kept: npt.ArrayLike, grid_width: int) -> float:
    """ln det of the kept tokens' part of the kernel, `VARIANCE_FLOOR` added to its diagonal so that copies leave it finite.

    Args:
        hidden_states: [N, d].
        kept: int [R].
    """
    kernel, finite = _kernel(hidden_states, grid_width)
    tokens: npt.NDArray[np.int64] = np.asarray(kept, np.int64)
    tokens = tokens[finite[tokens]]
    return float(np.linalg.slogdet(kernel[np.ix_(tokens, tokens)] + VARIANCE_FLOOR * np.eye(len(tokens)))[1])


def _kernel(hidden_states: npt.ArrayLike, grid_width: int) -> tuple[np.ndarray, np.ndarray]:
    """The kernel, float64 [N, N] with 1 on its diagonal, and which tokens are finite, bool [N]."""
    x = np.asarray(hidden_states, np.float64)
    finite = np.asarray(np.isfinite(x).all(axis=1))
    x = np.where(finite[:, None], x, 0.0)
    largest = np.abs(x).max(initial=0.0)
    x = np.where(finite[:, None], x - x[finite].mean(axis=0) if finite.any() else x, 0.0)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x = np.divide(x, norms, out=np.zeros_like(x), where=norms > AT_THE_MEAN * largest)
    places = np.stack(np.divmod(np.arange(len(x)), grid_width), axis=1) / grid_width
    squares = ((places[:, None] - places[None, :]) ** 2).sum(axis=2)
    kernel = (1.0 + x @ x.T) / 2.0 * np.exp(-2.0 * squares)
    np.fill_diagonal(kernel, 1.0)
    return kernel, finite


@dataclass(frozen=True, slots=True, eq=False)
class _Greedy:
    """After some steps: the kernel [N, N], its Cholesky factor so far [r, N], the variances left [N], the tokens taken."""

    kernel: np.ndarray
    finite: np.ndarray
    factor: np.ndarray
    left: np.ndarray
    taken: tuple[int, ...]

    @classmethod
    def start(cls, hidden_states: npt.ArrayLike, grid_width: int) -> _Greedy:
        kernel, finite = _kernel(hidden_states, grid_width)
        return cls(kernel, finite, np.zeros((0, len(kernel))), np.ones(len(kernel)), ())

    def rank(self) -> np.ndarray:
        """What the next step takes the largest of: -1 for tokens that are not finite, -2 for those taken."""
        rank = np.where(self.finite, np.where(self.left < VARIANCE_FLOOR, 0.0, self.left), -1.0)
        rank[list(self.taken)] = -2.0
        return rank

    def take(self, token: int) -> _Greedy:
        row = (self.kernel[token] - self.factor[:, token] @ self.factor) / np.sqrt(max(self.left[token], VARIANCE_FLOOR))
        return _Greedy(self.kernel, self.finite, np.vstack([self.factor, row]), self.left - row**2, (*self.taken, token))
