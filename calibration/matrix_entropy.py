"""The matrix entropy of a representation: how many directions its rows spread over, as a share of all there are.

    X [N, d]
      -> centre over rows, L2-normalise rows         X
      -> the smaller of X X^T and X^T X              G [m, m], m = min(N, d)
      -> eigenvalues of G / tr G                     p [m]
      -> -sum p ln p / ln m                          S in 0..1

X X^T and X^T X share their nonzero spectrum (the dual Gram identity), so the smaller one is decomposed; everything is float64 whatever
X is stored in. `layer_entropy` takes one layer's tokens as the rows, `head_entropies` each token's own heads. Knows nothing about models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from runtime.errors import InputError, UsageError

__all__ = ["EntropyDefinition", "check_heads", "gram_spectrum", "head_entropies", "layer_entropy"]

Form = Literal["dual", "rows", "columns"]


@dataclass(frozen=True, slots=True)
class EntropyDefinition:
    """What is done to the rows before their spectrum is taken.

    Attributes:
        centre: the rows' mean is subtracted first.
        normalise_rows: each row is divided by its L2 norm; zero rows stay zero.
        normalise_trace: eigenvalues are divided by their sum. Without it ("raw") they are divided by the number of rows, and S falls or
            rises with the rows' energy too. Where all rows have norm 1 the two are the same.
    """

    centre: bool = True
    normalise_rows: bool = True
    normalise_trace: bool = True


def layer_entropy(tokens: Tensor, definition: EntropyDefinition) -> float:
    """S of one matrix [N, d], of any float type, on any device; 0 where all eigenvalues are zero, and where min(N, d) is 1.

    Raises:
        InputError: a value is not finite.
        UsageError: it is not a matrix, or it is empty.
    """
    if tokens.ndim != 2 or not tokens.numel():
        raise UsageError(f"a layer's tokens have the shape {list(tokens.shape)}, expected [N, d] with N and d of at least 1")
    spectrum = _spectrum(tokens[None], definition)
    return float(_entropies(spectrum, math.log(min(tokens.shape)))[0])


def head_entropies(tokens: Tensor, definition: EntropyDefinition) -> Tensor:
    """S of every token's own matrix of heads, as the score reads it: float64 [N] of [N, H, d_h], in units of ln H.

    Raises:
        InputError: a value is not finite.
        UsageError: the shape is wrong, or there are too few heads (`check_heads`).
    """
    if tokens.ndim != 3 or not tokens.numel():
        raise UsageError(f"tokens have the shape {list(tokens.shape)}, expected [N, H, d_h] with each of at least 1")
    check_heads(tokens.shape[1], definition)
    return _entropies(_spectrum(tokens, definition), math.log(tokens.shape[1]))


def check_heads(heads: int, definition: EntropyDefinition) -> None:
    """Raises UsageError where every token's entropy over `heads` heads would be the same, whatever the activations are.

    Centring over H heads leaves rank H - 1, so two heads have one eigenvalue, and one eigenvalue has no entropy.
    """
    needed = 3 if definition.centre else 2
    if heads < needed:
        why = "centred over its heads, a token's matrix has rank 1 at most" if definition.centre else "one head has one eigenvalue"
        raise UsageError(
            f"the entropy of each token's heads is 0 for every token with {heads} head(s): {why}; {needed} are needed: "
            "take the query, or the entropy over tokens"
        )


def gram_spectrum(matrices: Tensor, form: Form = "dual") -> Tensor:
    """Eigenvalues, ascending, of the Gram matrices of a batch [..., n, m]; none below 0.

    Args:
        form: `rows` decomposes X X^T [n, n], `columns` X^T X [m, m], `dual` the smaller. Their nonzero eigenvalues agree.

    Returns:
        [..., n or m], in the type of `matrices`.
    """
    rows, columns = matrices.shape[-2:]
    over_rows = form == "rows" or (form == "dual" and rows <= columns)
    gram = matrices @ matrices.mT if over_rows else matrices.mT @ matrices
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.clamp_min(0)


def _spectrum(matrices: Tensor, definition: EntropyDefinition) -> Tensor:
    """float64 [B, min(n, m)] of [B, n, m]."""
    wrong = int((~torch.isfinite(matrices)).sum())
    if wrong:
        raise InputError(f"{wrong} of {matrices.numel()} values are not finite")
    x = matrices.to(torch.float64)
    if definition.centre:
        x = x - x.mean(dim=-2, keepdim=True)
    if definition.normalise_rows:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        x = x / torch.where(norms > 0, norms, 1.0)
    spectrum = gram_spectrum(x)
    if not definition.normalise_trace:
        return spectrum / matrices.shape[-2]
    total = spectrum.sum(dim=-1, keepdim=True)
    return spectrum / torch.where(total > 0, total, 1.0)


def _entropies(spectrum: Tensor, unit: float) -> Tensor:
    """-sum p ln p / unit along the last dimension; a unit of 0 (one eigenvalue) gives 0."""
    entropies: Tensor = torch.special.entr(spectrum).sum(dim=-1) / unit if unit > 0 else torch.zeros_like(spectrum[..., 0])
    return entropies
