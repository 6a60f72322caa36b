"""Control baselines that look at no activation: pseudo-random tokens and an even grid, each as graph and as numpy twin.

Both rank by integers below 2^24, exact in int64 and in float32, so every engine and the twins agree bit for bit.

random: x -> (48271 x^5 + 11) mod (2^31 - 1) permutes the residues (5 is coprime to 2^31 - 2) and all its products fit in int64.
    The image's seed goes through it once, the token's index is added, the sum goes through it twice; the upper 24 bits are the score.

uniform: a token at (row, column) has the phase (a row + b column) mod 2^24, with a / 2^24 and b / 2^24 the inverse powers of the plastic
    number, the two-dimensional counterpart of the golden ratio. The tokens with the smallest phases form a nearly regular lattice for any
    number kept and any grid; the middle token has phase 0. A fixed stride through the tokens would line up with the grid's columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export.graphs.builder import GraphBuilder

PRIME = 2**31 - 1
FACTOR, OFFSET = 48271, 11
BITS = 24
SCALE = 2**BITS
ROW_PHASE = 12664745  # 2^24 / p, p = 1.3247... the real root of p^3 = p + 1
COLUMN_PHASE = 9560334  # 2^24 / p^2


def random_scores(seed: int, tokens: int) -> npt.NDArray[np.float32]:
    """The scores of mode `random`: float32 [tokens] in [0, 1). Seeds that differ by a multiple of 2^31 - 1 are the same."""

    def permute(x: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        fourth = (x * x % PRIME) ** 2 % PRIME
        return (FACTOR * (fourth * x % PRIME) + OFFSET) % PRIME

    key = permute(np.array([seed % PRIME], np.int64))
    value = permute(permute((key + np.arange(tokens, dtype=np.int64)) % PRIME))
    return (value // 2 ** (31 - BITS)).astype(np.float32) / np.float32(SCALE)


def uniform_scores(tokens: int, grid_width: int) -> npt.NDArray[np.float32]:
    """The scores of mode `uniform`: float32 [tokens] in (0, 1], 1 in the middle of the grid of `grid_width` tokens a row."""
    index = np.arange(tokens, dtype=np.int64)
    middle = ROW_PHASE * (tokens // grid_width // 2) + COLUMN_PHASE * (grid_width // 2)
    phase = (ROW_PHASE * (index // grid_width) + COLUMN_PHASE * (index % grid_width) + SCALE - middle % SCALE) % SCALE
    return (SCALE - phase).astype(np.float32) / np.float32(SCALE)


def random_graph(b: GraphBuilder, seed: ir.Value, index: ir.Value) -> ir.Value:
    """`random_scores` as nodes, from the seed int64 [1] and the tokens' indices int64 [N]."""
    op, prime = b.op, b.constant(PRIME)

    def permute(x: ir.Value) -> ir.Value:
        square = op.Mod(op.Mul(x, x), prime)
        fifth = op.Mod(op.Mul(op.Mod(op.Mul(square, square), prime), x), prime)
        return op.Mod(op.Add(op.Mul(fifth, b.constant(FACTOR)), b.constant(OFFSET)), prime)

    key = permute(op.Mod(seed, prime))
    value = permute(permute(op.Mod(op.Add(key, index), prime)))
    return _fraction(b, op.Div(value, b.constant(2 ** (31 - BITS))))


def uniform_graph(b: GraphBuilder, tokens: ir.Value, index: ir.Value, grid_width: int) -> ir.Value:
    """`uniform_scores` as nodes, from the number of tokens int64 [1] and their indices int64 [N]."""
    op, scale, width = b.op, b.constant(SCALE), b.constant(grid_width)
    middle_row = op.Div(tokens, b.constant(2 * grid_width))
    middle = op.Add(op.Mul(middle_row, b.constant(ROW_PHASE)), b.constant(COLUMN_PHASE * (grid_width // 2)))
    row = op.Div(index, width)
    phase = op.Add(op.Mul(row, b.constant(ROW_PHASE)), op.Mul(op.Sub(index, op.Mul(row, width)), b.constant(COLUMN_PHASE)))
    shifted = op.Sub(op.Add(phase, scale), op.Mod(middle, scale))
    return _fraction(b, op.Sub(scale, op.Mod(shifted, scale)))


def _fraction(b: GraphBuilder, integers: ir.Value) -> ir.Value:
    return b.op.Mul(b.cast(integers, "float32"), b.constant(1 / SCALE))
