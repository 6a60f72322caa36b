"""The `score` graph: ranks one image's visual tokens, keeps R of them, and gathers what layer K needs.

| input | dtype | shape | |
|---|---|---|---|
| `score_states` | `dtype` | [N, H * d_h] | queries of layer K-1 as projected: unscaled, before rotary embedding |
| `hidden_states` | `dtype` | [N, d] | what layer K would read; all that `dpp` looks at |
| `position_ids` | int64 | [P, N] | P = 1, or 3 rows for M-RoPE |
| `image_seed` | int64 | [1] | mode `random` only: the same image always loses the same tokens |

| output | dtype | shape | |
|---|---|---|---|
| `kept_hidden_states` | `dtype` | [R, d] | rows of `hidden_states` as they are |
| `kept_position_ids` | int64 | [P, R] | original positions |
| `kept_indices` | int64 | [R] | ascending |
| `token_entropy` | float32 | [N] | the value that ranks the tokens, whatever the mode: largest kept |

`dtype` is that of the decoder halves, whose buffers are bound without a copy: one Cast of `score_states` at the entrance, and
everything from there to `token_entropy` is float32; the hidden states are gathered as they came.

R is constant, N symbolic unless given; 1 <= R <= N. Of equal scores the lower index is kept (ONNX defines TopK so). Scores that are
not finite rank lowest, and stay visible in `token_entropy`. The first three inputs are there even where a mode has no use for them.

A token is a matrix of its H heads, Q [H, d_h]; Z = Q minus the mean over heads; t the trace of A = Z Z^T / H; S the entropy, in nats,
of A's spectrum divided by its sum. Z Z^T and Z^T Z share their nonzero eigenvalues, so the smaller one is used; H stays the denominator.

| mode | score |
|---|---|
| `trace` | S / ln H: von Neumann entropy |
| `raw` | t (S - ln t) / ln H, the entropy of A as it is |
| `row` | the same, after the rows of Z are divided by their norms |
| `energy-high`, `energy-low` | t, -t |
| `dpp` | not of the queries: the variance of a hidden state when its token was taken, see `export.graphs.dpp` |
| `random`, `uniform` | see `export.graphs.controls` |

A trace below 1e-30 counts as zero and scores 0. float32 throughout, matrix products too: TF32 or half precision moves the kept set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.graphs import controls, dpp, entropy
from export.graphs.builder import GraphBuilder
from export.graphs.controls import random_scores, uniform_scores
from runtime import names
from runtime.errors import UsageError

__all__ = ["ScoreSpec", "build_score", "random_scores", "uniform_scores"]

ENTROPY_MODES = ("trace", "row", "raw")
MIN_TRACE = 1e-30  # float32 squares lose their digits below about 1e-38
MIN_ROW_NORM = 1e-15  # rows with a smaller norm shrink to zero instead of being blown up to 1
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """One budget's selection.

    Args:
        heads: H, the query heads (also with grouped-query attention).
        head_size: d_h.
        hidden_size: d.
        position_rows: P.
        keep: R, the tokens kept.
        mode: one of `runtime.names.SCORE_MODES`.
        grid_width: patches in one row of an image; only `uniform` looks at it.
        visual_tokens: N, or None for any number.
        dtype: of `score_states` and the hidden states: float32, float16 or bfloat16.

    Raises:
        UsageError: a mode or size that cannot be built.
    """

    heads: int
    head_size: int
    hidden_size: int
    position_rows: int
    keep: int
    mode: str
    grid_width: int
    visual_tokens: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.mode not in names.SCORE_MODES:
            raise UsageError(f"unknown score mode {self.mode!r}; expected one of {', '.join(names.SCORE_MODES)}")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise UsageError(f"a score graph cannot read states of dtype {self.dtype!r}; expected float32, float16 or bfloat16")
        for name in ("heads", "head_size", "hidden_size", "position_rows", "keep", "grid_width"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.visual_tokens is not None and self.keep > self.visual_tokens:
            raise UsageError(f"cannot keep {self.keep} of {self.visual_tokens} visual tokens: keep at most {self.visual_tokens}")
        if self.mode in ENTROPY_MODES and self.heads < 3:
            raise UsageError(
                f"score mode {self.mode!r} needs at least 3 heads, got {self.heads}: after centring over them the entropy is always 0; "
                "score another tensor, or use dpp, energy-high, energy-low, random or uniform"
            )
        if self.mode in ENTROPY_MODES and self.head_size < 2:
            raise UsageError(f"score mode {self.mode!r} needs a head size of at least 2, got {self.head_size}: every entropy would be 0")

    @property
    def tokens(self) -> int | str:
        """N as a dimension."""
        return "N" if self.visual_tokens is None else self.visual_tokens


def build_score(spec: ScoreSpec) -> GraphBuilder:
    """Builds the score graph of one budget; the module's table says what goes in and out."""
    b = GraphBuilder(names.SCORE)
    n, op = spec.tokens, b.op
    states = b.input(names.SCORE_STATES, spec.dtype, [n, spec.heads * spec.head_size])
    hidden = b.input(names.HIDDEN_STATES, spec.dtype, [n, spec.hidden_size])
    positions = b.input(names.POSITION_IDS, "int64", [spec.position_rows, n])
    if spec.mode == "random":
        seed = b.input(names.IMAGE_SEED, "int64", [1])
        scores = controls.random_graph(b, seed, _indices(b, hidden, spec))
    elif spec.mode == "uniform":
        scores = controls.uniform_graph(b, b.size(hidden, 0), _indices(b, hidden, spec), spec.grid_width)
    elif spec.mode == "dpp":
        scores = dpp.dpp_variances(b, b.cast(hidden, "float32"), _indices(b, hidden, spec), spec.keep, spec.grid_width)
    else:
        scores = _activation_scores(b, b.cast(states, "float32"), spec)
    kept = _select(b, scores, spec.keep)
    b.output(op.Gather(hidden, kept, axis=0), names.KEPT_HIDDEN_STATES, spec.dtype, [spec.keep, spec.hidden_size])
    b.output(op.Gather(positions, kept, axis=1), names.KEPT_POSITION_IDS, "int64", [spec.position_rows, spec.keep])
    b.output(kept, names.KEPT_INDICES, "int64", [spec.keep])
    b.output(scores, names.TOKEN_ENTROPY, "float32", [n])
    return b


def _indices(b: GraphBuilder, hidden: ir.Value, spec: ScoreSpec) -> ir.Value:
    if spec.visual_tokens is not None:
        return b.constant(np.arange(spec.visual_tokens))
    return b.arange(b.size(hidden, 0))


def _activation_scores(b: GraphBuilder, states: ir.Value, spec: ScoreSpec) -> ir.Value:
    """Scores of the modes that look at the queries: float32 [N] from [N, H * d_h]."""
    op, heads = b.op, spec.heads
    q = b.reshape(states, [0, heads, spec.head_size])
    z = op.Sub(q, op.ReduceMean(q, b.constant([1]), keepdims=1))
    if spec.mode in ("energy-high", "energy-low"):
        sign = 1.0 if spec.mode == "energy-high" else -1.0
        per_head = op.ReduceSumSquare(z, b.constant([2]), keepdims=0)
        return op.Mul(op.ReduceSum(per_head, b.constant([1]), keepdims=0), b.constant(sign / heads))
    squares = None
    if spec.mode == "row":
        squares = op.ReduceSumSquare(z, b.constant([2]), keepdims=1)
        z = op.Div(z, op.Max(op.Sqrt(squares), b.constant(MIN_ROW_NORM)))
    matrices, size = entropy.gram(b, z, heads, spec.head_size)
    total = entropy.trace(b, matrices, size)
    divisor = op.Max(total, b.constant(MIN_TRACE))
    nats = entropy.entropy(b, op.Div(matrices, divisor), size)
    if spec.mode != "trace":
        t = op.Mul(divisor, b.constant(1.0 / heads))
        nats = op.Mul(t, op.Sub(nats, op.Log(t)))
    score = op.Mul(nats, b.constant(1.0 / math.log(heads)))
    score = op.Where(op.Greater(total, b.constant(MIN_TRACE)), score, b.constant(0.0))
    energy = total if squares is None else op.ReduceSum(squares, b.constant([1, 2]), keepdims=0)
    return op.Where(op.LessOrEqual(energy, b.constant(LARGEST)), score, b.constant(math.nan))  # NaN fails the comparison


def _select(b: GraphBuilder, scores: ir.Value, keep: int) -> ir.Value:
    """Indices of the `keep` largest scores, ascending: int64 [R]."""
    op, count = b.op, b.constant([keep])
    finite = op.LessOrEqual(op.Abs(scores), b.constant(LARGEST))
    ranked = op.Where(finite, scores, b.constant(-LARGEST))
    _, indices = op.TopK(ranked, count, axis=0, largest=1, sorted=1, _outputs=2)
    ascending, _ = op.TopK(indices, count, axis=0, largest=0, sorted=1, _outputs=2)
    return ascending
