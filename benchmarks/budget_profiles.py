"""`python -m benchmarks.budget_profiles`: several budgets in one engine, with one prefill profile for all of them or one for each.

    python -m benchmarks.budget_profiles --budgets 288,166,98,29

The graph of `post_ecl` does not know the budget: only its prefill profile could. Builds one decoder layer and a head at LLaVA-1.5-7B's
widths with random weights for RTX cards, without a GPU (pip install tensorrt-rtx-cu13), once in each way. Nothing is run: what a profile's
usual size is worth in speed is not measured here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from runtime.command_line import CommandParser, run_command

Rows = Mapping[str, tuple[int, int, int]]


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m benchmarks.budget_profiles", description="One prefill profile for all budgets, or one for each.")
    parser.add_argument("--budgets", default="288,166,98,29", metavar="R[,R...]", help="visual tokens kept (default: 288,166,98,29)")
    parser.add_argument("--form", default="tensor_scatter", choices=("tensor_scatter", "append"), help="of the cache's write")
    return parser


def profile_sets(budgets: Sequence[int]) -> dict[str, Rows]:
    """The rows of each profile, both ways; `keep="all"` needs a prefill of all visual tokens either way."""
    from benchmarks.engines import TEXT_TOKENS, VISUAL_TOKENS

    usual = 64  # text tokens
    both = {"append": (1, usual, TEXT_TOKENS), "decode": (1, 1, 8)}
    most = VISUAL_TOKENS + TEXT_TOKENS
    each = {f"prefill {keep}": (keep, keep + usual, keep + TEXT_TOKENS) for keep in budgets}
    return {
        "one": {"prefill": (min(budgets), budgets[0] + usual, most), **both},
        "each": {**each, "prefill all": (VISUAL_TOKENS, VISUAL_TOKENS + usual, most), **both},
    }


def measure(form: str, rows: Rows) -> tuple[int, tuple[int, ...], float, int]:
    """Builds one engine in this process: its bytes, the activation bytes of each profile, seconds, and the weights' bytes."""
    from benchmarks.engines import CAPACITY, build_with, llava_7b
    from export.graphs.decoder import post_ecl

    half = post_ecl(1, 2, dtype="float16", kv_write=form, capacity=CAPACITY if form == "tensor_scatter" else None)
    with TemporaryDirectory() as folder:
        built, weights, _ = build_with(llava_7b(), half, rows, Path(folder))
    return built.file.bytes, built.info.activation_bytes, built.info.build_seconds, weights


def _run(args: argparse.Namespace) -> int:
    from runtime.errors import UsageError

    try:
        budgets = [int(part) for part in args.budgets.split(",")]
    except ValueError as error:
        raise UsageError(f"--budgets {args.budgets} is not a list of whole numbers such as 288,166") from error
    print(f"{'prefill profiles':<18}{'profiles':>9}{'engine MB':>11}{'over weights':>14}{'activations MB':>16}{'s':>7}")
    for name, rows in profile_sets(budgets).items():
        with get_context("spawn").Pool(1) as pool:
            size, activations, seconds, weights = pool.apply(measure, (args.form, rows))
        print(
            f"{name:<18}{len(rows):>9}{size / 1e6:>11.1f}{size / weights:>14.3f}{max(activations) / 1e6:>16.1f}{seconds:>7.1f}", flush=True
        )
        print("  " + ", ".join(f"{profile} {count / 1e6:.1f}" for profile, count in zip(rows, activations, strict=True)), flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
