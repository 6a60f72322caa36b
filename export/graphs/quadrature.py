"""The entropy of a positive semi-definite matrix from determinants and traces: the numbers, and how they were found.

Neither ONNX nor TensorRT has an eigenvalue operator. With the trace at 1 and eigenvalues x, the entropy is the sum of f(x) = -x ln x, and

    f(x) ~ sum_j w_j ln(1 + x / s_j) + c_1 x + c_2 x^2 + c_3 x^3,    s_j = 4^-j,  j = 0..11.

Summed over the spectrum, ln(1 + x / s) becomes ln det(A / s + I) and the powers become traces: no eigenvalue is ever needed. The form is
the trapezoidal rule, in ln s, of the integral of ln(1 + x / s) - x / (1 + s) over s > 0, which equals -x ln x up to a linear term; hence
weights near ln(4) s_j (1.386 s_j), except at the small end. Powers of four, because both s_j and 1 / s_j are then exact in float32:
with other nodes the rounding of 1 / s_j alone moved every entropy by 1e-5.

Knows nothing about graphs. The constants are stored, so that a bundle does not depend on the linear algebra library that builds it;
`derive` finds them again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NODES = 12
REFERENCE_SIZE = 32  # the fit bounds the entropy's error of a matrix of this size by twice `Quadrature.error`


@dataclass(frozen=True, slots=True)
class Quadrature:
    """Nodes s_j, weights w_j / s_j and the coefficients c_1, c_2, c_3 of the traces of A, A^2 and A^3.

    `error` is the largest |fit - f(x)| / (x + 1 / 32) on [0, 1]: the entropy of n eigenvalues that sum to 1 errs by at most
    error * (1 + n / 32).
    """

    nodes: tuple[float, ...]
    relative_weights: tuple[float, ...]
    traces: tuple[float, float, float]
    error: float

    @property
    def weights(self) -> tuple[float, ...]:
        """w_j, one for each node."""
        return tuple(w * s for w, s in zip(self.relative_weights, self.nodes, strict=True))

    def entropy(self, eigenvalues: np.ndarray) -> np.ndarray:
        """The formula in float64, from eigenvalues [..., n] in [0, 1] that sum to 1; nats, [...]."""
        x = np.asarray(eigenvalues, np.float64)
        logs = sum(w * np.log1p(x / s) for w, s in zip(self.weights, self.nodes, strict=True))
        powers = sum(c * x**k for k, c in enumerate(self.traces, start=1))
        return np.asarray(logs + powers).sum(-1)


def derive(nodes: int = NODES, rounds: int = 200) -> Quadrature:
    """Fits weights and coefficients: Lawson's method, least squares reweighted until the largest error is levelled.

    The error at x is weighed by 1 / (x + 1 / 32), because eigenvalues that sum to 1 cannot all be large.
    """
    scales = 4.0 ** -np.arange(nodes)
    x = np.geomspace(1e-10, 1.0, 4000)
    weight = 1.0 / (x + 1.0 / REFERENCE_SIZE)
    basis = np.concatenate([np.log1p(x[:, None] / scales) * scales, x[:, None] ** np.arange(1, 4)], axis=1) * weight[:, None]
    target = -x * np.log(x) * weight
    emphasis = np.full(len(x), 1.0 / len(x))
    best, best_error = np.zeros(nodes + 3), np.inf
    for _ in range(rounds):
        root = np.sqrt(emphasis)
        solution = np.linalg.lstsq(basis * root[:, None], target * root, rcond=1e-14)[0]
        residual = np.abs(basis @ solution - target)
        if residual.max() < best_error:
            best, best_error = solution, float(residual.max())
        emphasis *= residual / residual.max() + 1e-4
        emphasis /= emphasis.sum()
    c1, c2, c3 = (float(c) for c in best[nodes:])
    return Quadrature(tuple(scales.tolist()), tuple(best[:nodes].tolist()), (c1, c2, c3), best_error)


# `derive()`, to ten digits; tests derive them again.
ENTROPY = Quadrature(
    nodes=tuple(4.0**-j for j in range(NODES)),
    relative_weights=(
        1.481220508, 1.379073648, 1.388022971, 1.384549648, 1.390215261, 1.374973290,
        1.419819212, 1.297316068, 1.558464926, 1.304388678, 0.6036049971, 3.690648019,
    ),
    traces=(-1.781923351, -0.1929848784, 0.01378802776),
    error=1.15e-6,
)  # fmt: skip
