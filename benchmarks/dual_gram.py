"""What the smaller Gram matrix saves: `python -m benchmarks.dual_gram`.

X [n, m] has the same nonzero eigenvalues in X X^T [n, n] and X^T X [m, m]; an eigensolver takes time with the cube of the size, so the
theory says (m / n)^3 for n < m. Measured here in float64 with torch, as `calibration` computes it:

    token entropy   one matrix [heads, head size] for each of N visual tokens, as one batch: what the score's definition decomposes
    layer entropy   one matrix [N, hidden size] for each layer: what finding the collapse layer decomposes

Both forms take turns on the same matrices; ratios are medians of pairs with a 95 % bootstrap interval. The last line of stdout is one
JSON object. The direct layer entropies take seconds each: --layer-runs 0 leaves them out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.command_line import CommandParser, run_command

if TYPE_CHECKING:
    from torch import Tensor

    from runtime.profile_statistics import Ratio

MODELS = {"LLaVA-1.5-7B": (32, 128, 4096), "Qwen2.5-VL-7B": (28, 128, 3584)}  # query heads, head size, hidden size


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one run of one form: the products, and the eigenvalues."""

    gram_s: float
    eigenvalues_s: float

    @property
    def whole_s(self) -> float:
        return self.gram_s + self.eigenvalues_s


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m benchmarks.dual_gram", description="The smaller Gram matrix against the larger one.")
    parser.add_argument("--tokens", type=int, default=576, help="visual tokens (default: 576)")
    parser.add_argument("--token-runs", type=int, default=15, help="pairs of token entropies (default: 15)")
    parser.add_argument("--layer-runs", type=int, default=3, help="pairs of layer entropies (default: 3)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="shapes to measure (default: all)")
    return parser


def _run(args: argparse.Namespace) -> int:
    import torch

    from runtime.errors import UsageError
    from runtime.machine import Machine

    if args.tokens < 2 or args.token_runs < 0 or args.layer_runs < 0:
        raise UsageError(
            f"--tokens must be 2 or more and runs 0 or more, got {args.tokens}, {args.token_runs} and {args.layer_runs}: change them"
        )
    machine = {**dataclasses.asdict(Machine.here(None)), "torch": torch.__version__, "torch_threads": torch.get_num_threads()}
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value is not None))
    print(f"{'':<30}{'direct':>12}{'dual':>12}  {'direct / dual':<24}{'theory':>8}")
    rows = []
    for model in args.models:
        heads, head_size, hidden = MODELS[model]
        for what, shape, runs in (
            ("token", (args.tokens, heads, head_size), args.token_runs),
            ("layer", (1, args.tokens, hidden), args.layer_runs),
        ):
            if runs:
                rows.append({"model": model, "entropy": what, **_measure(f"{model}, {what} entropy", shape, runs)})
    print(json.dumps({"benchmark": "dual_gram", "machine": machine, "rows": rows}))
    return 0


def _measure(name: str, shape: tuple[int, int, int], runs: int) -> dict[str, Any]:
    """Times both forms on a batch [batch, n, m] and prints two lines."""
    import torch

    from runtime.profile_statistics import paired_ratio

    generator = torch.Generator().manual_seed(0)
    forms = ("columns", "rows") if shape[1] <= shape[2] else ("rows", "columns")  # the direct one, the dual one
    times: dict[str, list[Times]] = {form: [] for form in forms}
    difference = 0.0
    warmup = 1 if shape[0] > 1 else 0  # of the batched case; seconds of one solve have no cold start worth another
    for run in range(runs + warmup):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        spectra = {}
        for form in forms if run % 2 else reversed(forms):
            taken, spectra[form] = _timed(x, form)
            if run >= warmup:
                times[form].append(taken)
        difference = max(difference, _difference(*spectra.values()))
        print(f"\r{name}: pair {run + 1} of {runs + warmup}", end="", file=sys.stderr)
    print(file=sys.stderr)
    theory = (max(shape[1:]) / min(shape[1:])) ** 3
    direct, dual = (times[form] for form in forms)
    eigen = paired_ratio([t.eigenvalues_s for t in direct], [t.eigenvalues_s for t in dual])
    whole = paired_ratio([t.whole_s for t in direct], [t.whole_s for t in dual])
    columns = {form: (_median([t.eigenvalues_s for t in times[form]]), _median([t.whole_s for t in times[form]])) for form in forms}
    for index, (part, ratio) in enumerate((("eigenvalues", eigen), ("with the products", whole))):
        label = f"{name}" if not index else ""
        cells = "".join(f"{columns[form][index].median * 1e3:>9.1f} ms" for form in forms)
        interval = f"{ratio.median:.1f}x [{ratio.low:.1f}, {ratio.high:.1f}]"
        print(f"{label}\n  {part:<28}{cells}  {interval:<24}{theory:>7.1f}x" if label else f"  {part:<28}{cells}  {interval}", flush=True)
    return {
        "shape": list(shape), "pairs": runs, "theory": theory, "eigenvalues": dataclasses.asdict(eigen), "whole": dataclasses.asdict(whole),
        "seconds": {
            kind: {"eigenvalues": dataclasses.asdict(columns[form][0]), "whole": dataclasses.asdict(columns[form][1])}
            for kind, form in zip(("direct", "dual"), forms, strict=True)
        },
        "largest_entropy_difference": difference,
    }  # fmt: skip


def _timed(x: Tensor, form: str) -> tuple[Times, Tensor]:
    import torch

    began = time.perf_counter()
    gram = x @ x.mT if form == "rows" else x.mT @ x
    middle = time.perf_counter()
    spectrum = torch.linalg.eigvalsh(gram)
    return Times(middle - began, time.perf_counter() - middle), spectrum


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of the entropies that two spectra give, in nats."""
    import torch

    entropies = []
    for spectrum in (one, other):
        p = spectrum.clamp_min(0) / spectrum.clamp_min(0).sum(-1, keepdim=True)
        entropies.append(torch.special.entr(p).sum(-1))
    return float((entropies[0] - entropies[1]).abs().max())


def _median(values: Sequence[float]) -> Ratio:
    """The median of single values with its interval, in their unit."""
    from runtime.profile_statistics import paired_ratio

    return paired_ratio(values, [1.0] * len(values))


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
