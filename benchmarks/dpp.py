"""How long the score graph of mode `dpp` takes, at the sizes of published models: `python -m benchmarks.score --dpp`.

Every kept token is one step, and the steps run one after the other. A row gives the steps, the graph's nodes and bytes, the seconds that a
session takes to be made, and the milliseconds of a run, beside the definition's answer: the share of its kept set that was kept, and the
most variance that a step forwent (`export.exact_dpp.greedy_shortfall`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

# Visual tokens, kept, width: LLaVA-1.5-7B at an average of 64, 128 and 192 tokens; LLaVA-NeXT-7B at 320.
SIZES = ((576, 29, 4096), (576, 98, 4096), (576, 166, 4096), (2880, 149, 4096))
HEADER = "tokens   kept  width  steps  nodes     kB  session s   ms p10   median  overlap  forgone"


@dataclass(frozen=True, slots=True)
class DppRow:
    """One size. Times are of `threads` threads; `steps` run one after the other."""

    tokens: int
    keep: int
    width: int
    steps: int
    nodes: int
    graph_bytes: int
    session_s: float
    best_decile_ms: float
    median_ms: float
    runs: int
    threads: int
    overlap: float
    shortfall: float

    def __str__(self) -> str:
        return (
            f"{self.tokens:6} {self.keep:6} {self.width:6} {self.steps:6} {self.nodes:6} {self.graph_bytes / 1e3:6.0f} "
            f"{self.session_s:10.2f} {self.best_decile_ms:8.1f} {self.median_ms:8.1f} {self.overlap:8.3f} {self.shortfall:8.1e}"
        )


def measure(tokens: int, keep: int, width: int, runs: int, threads: int) -> DppRow:
    """Builds the graph, makes a session, and runs it on seeded rows with a mean larger than their spread; the first run is not counted."""
    import onnx_ir as ir
    import onnxruntime

    from export.exact_dpp import dpp_order, greedy_shortfall
    from export.graphs.score import ScoreSpec, build_score
    from runtime import names
    from runtime.engines.onnxruntime import session_options

    spec = ScoreSpec(heads=32, head_size=width // 32, hidden_size=width, position_rows=1, keep=keep, mode="dpp", grid_width=24)
    model = ir.to_proto(build_score(spec).model())
    graph = model.SerializeToString()
    began = time.perf_counter()
    session = onnxruntime.InferenceSession(graph, session_options(threads), providers=["CPUExecutionProvider"])
    session_s = time.perf_counter() - began
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(tokens, width)) * np.exp(rng.normal(size=width)) + 3 * rng.normal(size=width)).astype(np.float32)
    feeds = {names.SCORE_STATES: rows, names.HIDDEN_STATES: rows, names.POSITION_IDS: np.arange(tokens)[None]}
    times_ms = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        kept, scores = session.run([names.KEPT_INDICES, names.TOKEN_ENTROPY], feeds)
        times_ms.append((time.perf_counter() - began) * 1e3)
    exact = dpp_order(rows, keep, 24)[0]
    shortfall = greedy_shortfall(rows, kept[np.argsort(-scores[kept], kind="stable")], 24)
    decile, median = (float(t) for t in np.percentile(times_ms[1:], (10, 50)))
    return DppRow(
        tokens, keep, width, keep, len(model.graph.node), len(graph), session_s, decile, median, runs, threads,
        len(np.intersect1d(kept, exact)) / keep, shortfall,
    )  # fmt: skip
