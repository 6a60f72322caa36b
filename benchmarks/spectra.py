"""Synthetic head matrices with six kinds of spectra: what a token entropy is measured on besides real activations."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SPECTRA = ("gaussian", "correlated", "power", "exponential", "near-rank-1", "low-rank")


def synthetic_states(kind: str, tokens: int, heads: int, head_size: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Score states float32 [tokens, heads * head_size] whose heads have the spectrum `kind` before centring.

    `gaussian`: independent entries. `correlated`: heads share one direction. `power`, `exponential`: singular values decay so, at a rate of
    each token's own. `near-rank-1`: all singular values but one are 1e-4 to 1e-2. `low-rank`: 2 to 5 singular values, the rest zero.
    """
    rng = np.random.default_rng([seed, SPECTRA.index(kind)])
    if kind == "gaussian":
        return _flat(rng.standard_normal((tokens, heads, head_size)))
    if kind == "correlated":
        shared = rng.standard_normal((tokens, heads, 1)) * rng.standard_normal((tokens, 1, head_size))
        return _flat(0.3 * rng.standard_normal((tokens, heads, head_size)) + shared)
    rank = min(heads, head_size)
    k = np.arange(rank)
    values = {
        "power": lambda: (1.0 + k) ** -rng.uniform(0.5, 2.0, (tokens, 1)),
        "exponential": lambda: np.exp(-k * rng.uniform(0.1, 0.8, (tokens, 1))),
        "near-rank-1": lambda: np.where(k == 0, 1.0, 10 ** rng.uniform(-4, -2, (tokens, 1))),
        "low-rank": lambda: np.where(k < rng.integers(2, 6, (tokens, 1)), rng.uniform(0.5, 1.0, (tokens, rank)), 0.0),
    }[kind]()
    left = np.linalg.qr(rng.standard_normal((tokens, heads, rank)))[0]
    right = np.linalg.qr(rng.standard_normal((tokens, head_size, rank)))[0]
    return _flat((left * values[:, None]) @ right.transpose(0, 2, 1))


def _flat(states: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return states.reshape(len(states), -1).astype(np.float32)
