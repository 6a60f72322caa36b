"""Graph pieces: the Gram matrix of every token's heads, and its entropy, from basic operators.

The token axis comes last, so that every elementwise step runs over all tokens at once: one vector register on a CPU, one thread
for each token on a GPU. Two steps, both float32:

1. Householder reflections make each symmetric matrix tridiagonal. They are orthogonal: the spectrum stays, rounding does not grow.
2. A tridiagonal determinant is a product of pivots, a_k + s - b_k^2 / pivot_{k-1}: a few operations for each row and node. In exact
   arithmetic no pivot of a positive semi-definite matrix plus s falls below s; holding them there keeps rank-deficient matrices finite.

So the matrices are worked through once, however many nodes the quadrature has: on ONNX Runtime's CPU a sixth of the time of eliminating
every shifted matrix by itself, at the same error (benchmarks/score.py). Knows nothing about scores and modes.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from export.graphs.builder import GraphBuilder
from export.graphs.quadrature import ENTROPY, Quadrature

Values: TypeAlias = list[ir.Value]

# Added to a squared norm before its root, far below float32's rounding of a matrix with trace 1: a zero column gets a valid reflection.
TINY_SQUARE = 1e-30


def gram(b: GraphBuilder, z: ir.Value, heads: int, head_size: int) -> tuple[ir.Value, int]:
    """Z Z^T or Z^T Z of every token, whichever is smaller: both have the same eigenvalues besides zeros.

    Args:
        z: float32 [N, heads, head_size].

    Returns:
        float32 [n, n, N], and n.
    """
    size = min(heads, head_size)
    turned = b.op.Transpose(z, perm=[0, 2, 1])
    product = b.op.MatMul(z, turned) if heads <= head_size else b.op.MatMul(turned, z)
    flat = b.op.Transpose(b.reshape(product, [0, size * size]), perm=[1, 0])
    return b.reshape(flat, [size, size, -1]), size


def trace(b: GraphBuilder, matrices: ir.Value, size: int) -> ir.Value:
    """The trace of [n, n, N] matrices: float32 [N]."""
    diagonal = b.op.Gather(b.reshape(matrices, [size * size, -1]), b.constant(np.arange(size) * (size + 1)), axis=0)
    return _sum(b, diagonal)


def entropy(b: GraphBuilder, matrices: ir.Value, size: int, quadrature: Quadrature = ENTROPY) -> ir.Value:
    """The entropy of every token's matrix, in nats.

    Args:
        matrices: float32 [n, n, N], symmetric positive semi-definite with trace 1. Another trace gives a meaningless value.

    Returns:
        float32 [N].
    """
    diagonal, squares = tridiagonal(b, matrices, size)
    logs = _log_determinants(b, diagonal, squares, quadrature)
    weights = b.constant(np.array(quadrature.weights, np.float32).reshape(-1, 1))
    return b.op.Add(_sum(b, b.op.Mul(logs, weights)), _trace_terms(b, diagonal, squares, quadrature))


def tridiagonal(b: GraphBuilder, matrices: ir.Value, size: int) -> tuple[Values, Values]:
    """Reduces symmetric matrices [n, n, N] to tridiagonal form with the same eigenvalues.

    Returns:
        The diagonal (n values) and the squared off-diagonal (n - 1 values), each float32 [1, 1, N].
    """
    op, ones = b.op, b.constant([1, 1])
    diagonal: Values = []
    squares: Values = []
    for m in range(size - 1, 1, -1):
        corner, column = op.Split(b.slice(matrices, 0, 1, 0), b.constant([1, m]), axis=1, _outputs=2)
        rest = op.Slice(matrices, ones, b.constant([m + 1, m + 1]), b.constant([0, 1]))
        reflector, square = _reflector(b, column, m)
        diagonal.append(corner)
        squares.append(square)
        matrices = _reflect(b, rest, reflector, m)
    corner, below = op.Split(b.slice(matrices, 0, 1, 0), ones, axis=1, _outputs=2)
    last = op.Slice(matrices, ones, b.constant([2, 2]), b.constant([0, 1]))
    return [*diagonal, corner, last], [*squares, op.Mul(below, below)]


def _reflector(b: GraphBuilder, column: ir.Value, m: int) -> tuple[ir.Value, ir.Value]:
    """u with |u|^2 = 2, so that I - u u^T turns `column` [1, m, N] onto its first axis; and the column's squared norm [1, 1, N]."""
    op = b.op
    first, tail = op.Split(column, b.constant([1, m - 1]), axis=1, _outputs=2)
    tail_square = op.ReduceSumSquare(tail, b.constant([1]), keepdims=1)
    square = op.Add(tail_square, op.Mul(first, first))
    norm = op.Sqrt(op.Add(square, b.constant(TINY_SQUARE)))
    head = op.Add(first, op.Where(op.Less(first, b.constant(0.0)), op.Neg(norm), norm))  # away from zero: nothing cancels
    scale = op.Sqrt(op.Div(b.constant(2.0), op.Add(tail_square, op.Mul(head, head))))
    return op.Mul(op.Concat(head, tail, axis=1), scale), square


def _reflect(b: GraphBuilder, matrices: ir.Value, row: ir.Value, m: int) -> ir.Value:
    """(I - u u^T) A (I - u u^T) as A - u w^T - w u^T with w = A u - (u^T A u / 2) u, for A [m, m, N] and u [1, m, N]."""
    op = b.op
    column = b.reshape(row, [m, 1, -1])
    product = op.ReduceSum(op.Mul(matrices, column), b.constant([0]), keepdims=1)  # A u: A is symmetric, and rows are contiguous
    half = op.Mul(op.ReduceSum(op.Mul(product, row), b.constant([1]), keepdims=1), b.constant(0.5))
    w = op.Sub(product, op.Mul(row, half))
    return op.Sub(op.Sub(matrices, op.Mul(column, w)), op.Mul(b.reshape(w, [m, 1, -1]), row))


def _log_determinants(b: GraphBuilder, diagonal: Values, squares: Values, quadrature: Quadrature) -> ir.Value:
    """ln det(A / s_j + I) of tridiagonal matrices: float32 [nodes, N]."""
    op = b.op
    nodes = np.array(quadrature.nodes, np.float32).reshape(-1, 1)
    shift = b.constant(nodes)
    pivots: Values = []
    for k, entry in enumerate(diagonal):
        pivot = op.Add(entry, shift)
        if k:
            pivot = op.Sub(pivot, op.Div(squares[k - 1], pivots[-1]))
        pivots.append(op.Max(pivot, shift))
    ratios = op.Mul(op.Concat(*pivots, axis=0), b.constant(1 / nodes))
    return _sum(b, op.Log(ratios))


def _trace_terms(b: GraphBuilder, diagonal: Values, squares: Values, quadrature: Quadrature) -> ir.Value:
    """c_1 + c_2 tr A^2 + c_3 tr A^3 of tridiagonal matrices with trace 1: float32 [N]."""
    op, size = b.op, len(diagonal)
    c1, c2, c3 = (b.constant(c) for c in quadrature.traces)
    a = b.reshape(op.Concat(*diagonal, axis=1), [size, -1])
    off = b.reshape(op.Concat(*squares, axis=1), [size - 1, -1])
    a_square = op.Mul(a, a)
    second = op.Add(_sum(b, a_square), op.Mul(_sum(b, off), b.constant(2.0)))
    neighbours = op.Add(b.slice(a, 0, size - 1, 0), b.slice(a, 1, size, 0))
    third = op.Add(_sum(b, op.Mul(a_square, a)), op.Mul(_sum(b, op.Mul(off, neighbours)), b.constant(3.0)))
    return op.Add(op.Add(op.Mul(third, c3), op.Mul(second, c2)), c1)


def _sum(b: GraphBuilder, x: ir.Value) -> ir.Value:
    return b.op.ReduceSum(x, b.constant([0]), keepdims=0)
