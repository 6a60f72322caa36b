"""How exact and how fast the score graph is, beside what it replaces: `python -m benchmarks.score`.

Methods, all of them ranking tokens by the entropy of mode `trace` (see `export.graphs.entropy`):
    graph        the score graph as it is exported: tridiagonal form, then pivots
    elimination  the same quadrature with every shifted matrix eliminated by itself: what the tridiagonal form saves
    eigvalsh32   numpy's eigenvalues in float32, outside any graph
    eigvalsh64   the same in float64: the reference

Errors are in nats over six kinds of spectra; overlap is the share of the exact top k that is kept, k = 64, 128, 192. Times are of one
thread, after one warm-up, methods taking turns; on a busy machine the best decile says most. With --dpp: see `benchmarks.dpp`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {"LLaVA-1.5-7B": (32, 128), "Qwen2.5-VL-7B": (28, 128), "LLaVA-1.5-13B": (40, 128), "tiny-llava": (8, 24)}
KEEP = (64, 128, 192)
Scorer = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one shape."""

    model: str
    heads: int
    head_size: int
    tokens: int
    method: str
    worst_error_nats: float
    worst_overlap: float
    mean_overlap: float
    best_decile_ms: float
    median_ms: float
    runs: int
    nodes: int
    gflop: float | None


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=576, help="visual tokens, above 192 (default: 576)")
    parser.add_argument("--runs", type=int, default=30, help="timed runs of each method (default: 30)")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="models whose heads to use (default: all)")
    parser.add_argument("--dpp", action="store_true", help="time mode dpp at the sizes of published models instead, on all cores")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints a table, and as the last line one JSON object."""
    args = build_parser().parse_args(argv)
    if args.tokens <= max(KEEP) or args.runs < 1:
        print(f"--tokens must be above {max(KEEP)} and --runs 1 or more, got {args.tokens} and {args.runs}", file=sys.stderr)
        return 2
    machine = _machine()
    print(", ".join(f"{k} {v}" for k, v in machine.items()))
    if args.dpp:
        return _dpp(machine, args.runs)
    print("model            H  d_h method        worst error  overlap worst   mean   ms p10   median  nodes  GFLOP")
    rows = [row for name in args.shapes for row in _measure(name, *SHAPES[name], args.tokens, args.runs)]
    print(json.dumps({"benchmark": "score", **machine, "rows": [asdict(r) for r in rows]}))
    return 0


def _dpp(machine: dict[str, str], runs: int) -> int:
    from benchmarks import dpp

    print(dpp.HEADER)
    rows = []
    for size in dpp.SIZES:
        rows.append(dpp.measure(*size, runs, os.cpu_count() or 1))
        print(rows[-1], flush=True)
    print(json.dumps({"benchmark": "dpp", **machine, "rows": [asdict(r) for r in rows]}))
    return 0


def _measure(model: str, heads: int, head_size: int, tokens: int, runs: int) -> list[Row]:
    from benchmarks.spectra import SPECTRA, synthetic_states
    from export.exact_score import select_tokens, token_scores

    inputs = [synthetic_states(kind, tokens, heads, head_size) for kind in SPECTRA]
    exact = [token_scores(states.reshape(len(states), heads, -1), "trace") for states in inputs]
    methods = _methods(heads, head_size)
    times_ms = _times_ms({name: score for name, (score, _, _) in methods.items()}, inputs, runs)
    rows = []
    for name, (score, nodes, flop_per_token) in methods.items():
        scores = [score(states) for states in inputs]
        pairs = [(select_tokens(s, k), select_tokens(e, k)) for s, e in zip(scores, exact, strict=True) for k in KEEP]
        overlaps = [len(np.intersect1d(kept, expected)) / len(expected) for kept, expected in pairs]
        error = max(float(np.abs(s - e).max()) for s, e in zip(scores, exact, strict=True)) * math.log(heads)
        decile, median = (float(t) for t in np.percentile(times_ms[name], (10, 50)))
        gflop = None if flop_per_token is None else flop_per_token * tokens / 1e9
        row = Row(model, heads, head_size, tokens, name, error, min(overlaps), float(np.mean(overlaps)), decile, median, runs, nodes, gflop)
        print(
            f"{model:14} {heads:3} {head_size:4} {name:12} {error:12.1e} {row.worst_overlap:14.3f} {row.mean_overlap:6.4f} "
            f"{decile:8.1f} {median:8.1f} {nodes or '':6} {'' if gflop is None else f'{gflop:.3f}':>6}",
            flush=True,
        )
        rows.append(row)
    return rows


def _times_ms(methods: dict[str, Scorer], inputs: list[np.ndarray], runs: int) -> dict[str, list[float]]:
    """Milliseconds of each run, methods and inputs taking turns; the first round is not counted."""
    times_ms: dict[str, list[float]] = {name: [] for name in methods}
    for run in range(runs + 1):
        for name, score in methods.items():
            began = time.perf_counter()
            score(inputs[run % len(inputs)])
            if run:
                times_ms[name].append((time.perf_counter() - began) * 1e3)
    return times_ms


def _methods(heads: int, head_size: int) -> dict[str, tuple[Scorer, int, float | None]]:
    """Method -> (scorer of float32 [N, H * d_h], graph nodes, operations for each token)."""
    from export.exact_score import token_scores
    from export.graphs.score import ScoreSpec, build_score

    spec = ScoreSpec(heads, head_size, hidden_size=1, position_rows=1, keep=64, mode="trace", grid_width=24)

    def narrow(states: np.ndarray) -> np.ndarray:
        return _eigenvalue_scores(states, heads)

    return {
        "graph": _graph_scorer(build_score(spec)),
        "elimination": _graph_scorer(_elimination_graph(heads, head_size)),
        "eigvalsh32": (narrow, 0, None),
        "eigvalsh64": (lambda states: token_scores(states.reshape(len(states), heads, -1), "trace"), 0, None),
    }


def _eigenvalue_scores(states: np.ndarray, heads: int) -> np.ndarray:
    """Mode `trace` by float32 eigenvalues."""
    q = states.reshape(len(states), heads, -1)
    z = q - q.mean(1, keepdims=True)
    gram = z @ z.transpose(0, 2, 1) if heads <= z.shape[2] else z.transpose(0, 2, 1) @ z
    gram /= np.maximum(np.trace(gram, axis1=1, axis2=2), 1e-30)[:, None, None]
    eigenvalues = np.linalg.eigvalsh(gram).clip(1e-10)
    return np.asarray(-(eigenvalues * np.log(eigenvalues)).sum(1) / np.float32(math.log(heads)))


def _elimination_graph(heads: int, head_size: int) -> Any:
    """Log-determinants by unpivoted elimination of [nodes, n, n, N]: the direct form of the same quadrature."""
    from export.graphs import entropy
    from export.graphs.builder import GraphBuilder
    from export.graphs.quadrature import ENTROPY

    b = GraphBuilder("elimination")
    op = b.op
    q = b.reshape(b.input("score_states", "float32", ["N", heads * head_size]), [0, heads, head_size])
    matrices, size = entropy.gram(b, op.Sub(q, op.ReduceMean(q, b.constant([1]), keepdims=1)), heads, head_size)
    matrices = op.Div(matrices, entropy.trace(b, matrices, size))
    nodes = np.array(ENTROPY.nodes, np.float32).reshape(-1, 1, 1, 1)
    rest = op.Add(op.Unsqueeze(matrices, b.constant([0])), b.constant(nodes * np.eye(size, dtype=np.float32)[None, :, :, None]))
    pivots = []
    for m in range(size, 0, -1):
        corner = op.Slice(rest, b.constant([0, 0]), b.constant([1, 1]), b.constant([1, 2]))
        pivots.append(op.Max(corner, b.constant(nodes)))
        if m > 1:
            column = op.Slice(rest, b.constant([1, 0]), b.constant([m, 1]), b.constant([1, 2]))
            row = op.Slice(rest, b.constant([0, 1]), b.constant([1, m]), b.constant([1, 2]))
            inner = op.Slice(rest, b.constant([1, 1]), b.constant([m, m]), b.constant([1, 2]))
            rest = op.Sub(inner, op.Mul(column, op.Div(row, pivots[-1])))
    ratios = op.Mul(op.Concat(*pivots, axis=1), b.constant(1 / nodes))
    weights = b.constant(np.array(ENTROPY.weights, np.float32).reshape(-1, 1, 1, 1))
    total = op.ReduceSum(op.Mul(op.Log(ratios), weights), b.constant([0, 1, 2]), keepdims=0)
    square = op.ReduceSumSquare(matrices, b.constant([0, 1]), keepdims=0)
    turned = op.Transpose(matrices, perm=[2, 0, 1])
    cube = op.ReduceSum(op.Mul(op.MatMul(turned, turned), turned), b.constant([1, 2]), keepdims=0)
    for coefficient, term in zip(ENTROPY.traces[1:], (square, cube), strict=True):
        total = op.Add(total, op.Mul(term, b.constant(coefficient)))
    score = op.Mul(op.Add(total, b.constant(ENTROPY.traces[0])), b.constant(1 / math.log(heads)))
    b.output(score, "token_entropy", "float32", ["N"])
    return b


def _graph_scorer(b: Any) -> tuple[Scorer, int, float]:
    import onnx_ir as ir

    from runtime.engines.onnxruntime import session_options
    from runtime.engines.telemetry import without_telemetry

    with without_telemetry():
        import onnxruntime

    model = ir.to_proto(b.model())
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def score(states: np.ndarray) -> np.ndarray:
        tokens = len(states)
        others = {"hidden_states": np.zeros((tokens, 1), np.float32), "position_ids": np.arange(tokens)[None]}
        feeds = {"score_states": states} | {k: v for k, v in others.items() if k in names}
        return np.asarray(session.run(["token_entropy"], feeds)[0])

    return score, len(model.graph.node), _operations(model)


def _operations(model: Any, tokens: int = 192) -> float:
    """Arithmetic for one token: 2 for each multiply-add of a matrix product, 1 for each element of any other arithmetic step."""
    import onnx

    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "N":
                dim.dim_value = tokens
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    moving = {"Concat", "Gather", "Identity", "Reshape", "Shape", "Slice", "Split", "Squeeze", "TopK", "Transpose", "Unsqueeze"}
    total = 0
    for node in inferred.node:
        if node.op_type == "MatMul":
            total += 2 * math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
        elif node.op_type not in moving:
            total += math.prod(shapes[node.input[0] if node.op_type.startswith("Reduce") else node.output[0]])
    return total / tokens


def _machine() -> dict[str, str]:
    import onnxruntime

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine()
    )
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), "cpu": cpu, "cores": str(os.cpu_count()), "load": load,
        "python": platform.python_version(), "numpy": np.__version__, "onnxruntime": onnxruntime.__version__,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
