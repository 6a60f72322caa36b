"""Graph pieces of mode `dpp`: the tokens least alike in what they hold and where they are, by a greedy determinant (`export.exact_dpp`).

The kernel is one matrix product. Then R steps, unrolled, each of them 11 nodes: the largest variance and its token (TopK), that token's
row of the kernel less what the tokens before explain of it (two Gathers, Gemm), divided by the variance's root (Max, Sqrt, Div), appended
to the Cholesky factor (Concat), its squares taken from the variances (ReduceSumSquare, Sub), the token marked as taken (ScatterElements).

A step needs the token that the step before has chosen, so the R steps run one after the other on any machine.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from export.graphs.builder import GraphBuilder

AT_THE_MEAN = 1e-6  # rows closer to the mean than this share of the largest entry have no direction
VARIANCE_FLOOR = 1e-5  # variances below count as 0
NO_SIZE = 1e-30  # stands in for a size of 0, so that nothing is divided by it
LARGEST = float(np.finfo(np.float32).max)
NOT_FINITE, TAKEN = -1.0, -4.0  # in place of a variance: below every real one, the taken ones lowest


def dpp_variances(b: GraphBuilder, hidden: ir.Value, indices: ir.Value, keep: int, grid_width: int) -> ir.Value:
    """Each token's variance when it was taken, or what is left of it after `keep` steps.

    Variances never rise, so the tokens taken are those of the largest values, of equal ones the lower index.

    Args:
        hidden: float32 [N, d].
        indices: int64 [N], 0..N-1.
        grid_width: patches in one row of an image.

    Returns:
        float32 [N]: 0 to 1; NaN for a token that is not finite.
    """
    op = b.op
    finite, column = _finite(b, hidden)
    kernel = op.Mul(_kernel(b, _directions(b, hidden, finite, column), column), _nearness(b, indices, grid_width))
    left = b.reshape(op.Where(finite, b.constant(1.0), b.constant(NOT_FINITE)), [-1])
    left, taken, variances = _take(b, kernel, left, keep)
    left = op.ScatterElements(left, taken, variances, axis=0)
    shown = op.Where(op.Less(left, b.constant(VARIANCE_FLOOR)), b.constant(0.0), left)
    return op.Where(op.Less(left, b.constant(NOT_FINITE / 2)), b.constant(math.nan), shown)


def _finite(b: GraphBuilder, hidden: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Which rows are finite in every entry: bool [N, 1], and the same as float32."""
    op = b.op
    entries = op.LessOrEqual(op.Abs(hidden), b.constant(LARGEST))  # NaN fails the comparison
    column = op.ReduceMin(b.cast(entries, "float32"), b.constant([1]), keepdims=1)
    return op.Greater(column, b.constant(0.5)), column


def _directions(b: GraphBuilder, hidden: ir.Value, finite: ir.Value, column: ir.Value) -> ir.Value:
    """Rows less their mean, of length 1; zeros where a row is not finite or lies at the mean: float32 [N, d].

    The mean is taken off twice: what the rounding of the first one leaves in every row, the second takes away.
    """
    op = b.op
    x = op.Where(finite, hidden, b.constant(0.0))
    x = op.Div(x, op.Max(op.ReduceMax(op.Abs(x), keepdims=1), b.constant(NO_SIZE)))
    count = op.Max(op.ReduceSum(column, b.constant([0]), keepdims=1), b.constant(1.0))
    weights = op.Transpose(op.Div(column, count), perm=[1, 0])
    for _ in range(2):
        x = op.Sub(x, op.MatMul(weights, x))
    norms = op.Sqrt(op.ReduceSumSquare(x, b.constant([1]), keepdims=1))
    inverse = op.Div(column, op.Max(norms, b.constant(AT_THE_MEAN)))
    return op.Mul(x, op.Where(op.Greater(norms, b.constant(AT_THE_MEAN)), inverse, b.constant(0.0)))


def _kernel(b: GraphBuilder, directions: ir.Value, column: ir.Value) -> ir.Value:
    """(1 + cosine) / 2 of all pairs, rows and columns of tokens that are not finite 0: float32 [N, N]."""
    ones = b.op.Mul(column, b.op.Transpose(column, perm=[1, 0]))
    return b.op.Gemm(directions, directions, ones, alpha=0.5, beta=0.5, transB=1)


def _nearness(b: GraphBuilder, indices: ir.Value, grid_width: int) -> ir.Value:
    """exp(-2 |p_i - p_j|^2) of all pairs of places, the image's width as unit: float32 [N, N]."""
    op, width = b.op, b.constant(grid_width)
    row = op.Div(indices, width)
    exponent: ir.Value | None = None
    for coordinate in (row, op.Sub(indices, op.Mul(row, width))):
        place = b.cast(coordinate, "float32")
        difference = op.Sub(op.Unsqueeze(place, b.constant([1])), op.Unsqueeze(place, b.constant([0])))
        square = op.Mul(op.Mul(difference, difference), b.constant(-2.0 / grid_width**2))
        exponent = square if exponent is None else op.Add(exponent, square)
    return op.Exp(exponent)


def _take(b: GraphBuilder, kernel: ir.Value, left: ir.Value, keep: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """`keep` greedy steps.

    Returns:
        What is left of the variances, float32 [N]; the tokens in the order they were taken, int64 [R]; their variances, float32 [R].
    """
    op, one, floor, mark = b.op, b.constant([1]), b.constant(VARIANCE_FLOOR), b.constant(np.array([TAKEN], np.float32))
    factor: ir.Value | None = None
    taken, variances = [], []
    for _ in range(keep):
        variance, token = op.TopK(left, one, axis=0, largest=1, sorted=1, _outputs=2)
        row = op.Gather(kernel, token, axis=0)
        if factor is not None:
            row = op.Gemm(op.Gather(factor, token, axis=1), factor, row, alpha=-1.0, transA=1)
        row = op.Div(row, op.Sqrt(op.Max(variance, floor)))
        factor = row if factor is None else op.Concat(factor, row, axis=0)
        left = op.Sub(left, op.ReduceSumSquare(row, b.constant([0]), keepdims=0))
        left = op.ScatterElements(left, token, mark, axis=0)
        taken.append(token)
        variances.append(variance)
    return left, op.Concat(*taken, axis=0), op.Concat(*variances, axis=0)
