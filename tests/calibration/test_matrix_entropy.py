"""The matrix entropy against a reference written here from the definition, its invariances, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from calibration.matrix_entropy import EntropyDefinition, check_heads, gram_spectrum, head_entropies, layer_entropy
from export.exact_score import token_scores
from runtime.errors import InputError, UsageError

DEFINITIONS = [EntropyDefinition(c, r, t) for c in (True, False) for r in (True, False) for t in (True, False)]
SHAPES = [(7, 19), (19, 7), (12, 12), (2, 5), (5, 2)]


def matrix(n: int, d: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, d)) * rng.uniform(0.1, 3, (n, 1)) + rng.normal(size=d))


def reference(x: np.ndarray, definition: EntropyDefinition) -> float:
    """The definition by singular values: those of X, squared, are the eigenvalues of both Gram matrices."""
    x = np.array(x, np.float64)
    if definition.centre:
        x -= x.mean(axis=0)
    if definition.normalise_rows:
        for row in x:
            norm = math.sqrt(float(row @ row))
            if norm > 0:
                row /= norm
    values = np.linalg.svd(x, compute_uv=False) ** 2
    values /= values.sum() if definition.normalise_trace else len(x)
    return -sum(v * math.log(v) for v in values if v > 0) / math.log(min(x.shape))


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_entropy_is_the_definition(shape: tuple[int, int], definition: EntropyDefinition) -> None:
    x = matrix(*shape)
    assert layer_entropy(x, definition) == pytest.approx(reference(x.numpy(), definition), abs=1e-12)


@pytest.mark.parametrize(("mode", "definition"), [("trace", EntropyDefinition(normalise_rows=False)), ("row", EntropyDefinition())])
def test_head_entropies_are_the_scores_own(mode: str, definition: EntropyDefinition) -> None:
    tokens = torch.from_numpy(np.random.default_rng(1).normal(size=(30, 6, 16)))
    expected = token_scores(tokens, mode)
    assert head_entropies(tokens, definition).numpy() == pytest.approx(expected, abs=1e-7)  # the score clamps eigenvalues at 1e-10
    raw = EntropyDefinition(normalise_rows=False, normalise_trace=False)
    assert head_entropies(tokens, raw).numpy() == pytest.approx(token_scores(tokens, "raw"), abs=1e-7)


@pytest.mark.parametrize("shape", [(4, 6, 16), (4, 16, 6)])
def test_both_gram_matrices_have_the_same_spectrum_and_the_smaller_is_taken(shape: tuple[int, int, int]) -> None:
    x = torch.from_numpy(np.random.default_rng(2).normal(size=shape))
    dual, rows, columns = (gram_spectrum(x, form) for form in ("dual", "rows", "columns"))
    assert dual.shape == (4, 6)
    assert rows.shape == (4, shape[1])
    assert columns.shape == (4, shape[2])
    for full in (rows, columns):
        assert full[:, -6:].numpy() == pytest.approx(dual.numpy(), rel=1e-10)
        assert full[:, :-6].abs().max() < 1e-10 if full.shape[1] > 6 else True


def test_rotation_scale_and_token_order_change_nothing() -> None:
    x, plain = matrix(20, 12), EntropyDefinition()
    rng = np.random.default_rng(3)
    rotation = torch.from_numpy(np.linalg.qr(rng.normal(size=(12, 12)))[0])
    expected = layer_entropy(x, plain)
    assert layer_entropy(x @ rotation, plain) == pytest.approx(expected, abs=1e-12)
    assert layer_entropy(x * 1e3, plain) == pytest.approx(expected, abs=1e-12)
    assert layer_entropy(x[torch.from_numpy(rng.permutation(20))], plain) == pytest.approx(expected, abs=1e-12)
    assert layer_entropy(x + 7, plain) == pytest.approx(expected, abs=1e-12)
    assert layer_entropy(x + 7, EntropyDefinition(centre=False)) < 0.8 * layer_entropy(x, EntropyDefinition(centre=False))


def test_fewer_directions_mean_less_entropy() -> None:
    rng = np.random.default_rng(4)
    values = [layer_entropy(torch.from_numpy(rng.normal(size=(40, r)) @ rng.normal(size=(r, 30))), EntropyDefinition()) for r in (2, 5, 20)]
    assert values == sorted(values)
    assert values[0] < math.log(2) / math.log(30) + 1e-9
    identity = torch.eye(16, dtype=torch.float64)
    assert layer_entropy(identity, EntropyDefinition(centre=False)) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_types_are_read_exactly_and_summed_in_float64(dtype: torch.dtype) -> None:
    stored = (matrix(24, 40) * 5000).to(dtype)  # squares of these overflow in float16
    assert layer_entropy(stored, EntropyDefinition()) == pytest.approx(reference(stored.double().numpy(), EntropyDefinition()), abs=1e-12)


def test_nothing_to_spread_over_is_zero() -> None:
    for x in (torch.zeros(5, 8), torch.ones(5, 8), torch.randn(1, 8), torch.randn(8, 1)):
        assert layer_entropy(x, EntropyDefinition()) == 0.0
    with_zero_row = torch.cat([torch.zeros(1, 8, dtype=torch.float64), matrix(5, 8)])
    definition = EntropyDefinition(centre=False)
    assert layer_entropy(with_zero_row, definition) == pytest.approx(reference(with_zero_row.numpy(), definition), abs=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    x = matrix(4, 6)
    x[1, 2] = value
    with pytest.raises(InputError, match="1 of 24 values are not finite"):
        layer_entropy(x, EntropyDefinition())


def test_shapes_that_are_no_matrix_are_refused() -> None:
    with pytest.raises(UsageError, match=r"have the shape \[0, 6\], expected \[N, d\]"):
        layer_entropy(torch.zeros(0, 6), EntropyDefinition())
    with pytest.raises(UsageError, match=r"have the shape \[4, 6\], expected \[N, H, d_h\]"):
        head_entropies(torch.zeros(4, 6), EntropyDefinition())


def test_too_few_heads_have_one_entropy_for_all_tokens() -> None:
    two = torch.from_numpy(np.random.default_rng(5).normal(size=(9, 2, 16)))
    with pytest.raises(UsageError, match=r"is 0 for every token with 2 head\(s\): centred .* rank 1 at most; 3 are needed"):
        head_entropies(two, EntropyDefinition())
    with pytest.raises(UsageError, match=r"1 head\(s\): one head has one eigenvalue; 2 are needed"):
        check_heads(1, EntropyDefinition(centre=False))
    assert head_entropies(two, EntropyDefinition(centre=False)).std() > 0
    assert layer_entropy(two.reshape(9, 32), EntropyDefinition()) > 0.5  # over tokens, two heads are enough
