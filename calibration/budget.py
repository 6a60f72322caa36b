"""`python -m calibration.budget`: how many visual tokens may be dropped, and what it costs, from your model, images and questions.

    python -m calibration.budget --model tiny-llava --questions tiny_llava/calibration/questions.json
    python -m calibration.budget --model llava15 --checkpoint DIR --questions FILE --plan plan.json --min-agreement 98
    python -m calibration.budget --model llava15 --checkpoint DIR --questions FILE --profile profile.json --max-ttft-ms 250
    python -m export.build --model llava15 --checkpoint DIR --plan plan.json

Without a rule it only reports. Beside plan.json lie plan.budget.png and plan.budget.jsonl, what was measured of each image: an interrupted
run goes on from it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.command_line import CommandParser, run_command
from runtime.errors import UsageError

if TYPE_CHECKING:
    from calibration.budget_search import BudgetSearch

DEFAULT_PLAN = Path("plan.json")


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m calibration.budget", description="How many visual tokens may be dropped, and what it costs, on your questions."
    )
    parser.add_argument("--model", required=True, help="a model of configs/models, e.g. tiny-llava or llava15")
    parser.add_argument("--checkpoint", metavar="DIR|HF-ID", help="Hugging Face checkpoint directory, or an id in the local cache")
    parser.add_argument(
        "--questions", required=True, type=Path, metavar="FILE", help="JSON: a list of objects with image, question and, if known, answer"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="where the images are (default: beside the questions file)")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="a plan.json to carry on: its split layer and evidence are kept")
    grid = parser.add_argument_group("settings that are tried, all with all")
    grid.add_argument("--splits", type=_whole_numbers, metavar="K[,K...]", help="default: the plan's, else the model's and its neighbours")
    grid.add_argument("--keep", type=_whole_numbers, metavar="R[,R...]", help="default: 50, 33, 22, 11 and 5.5 %% of the visual tokens")
    grid.add_argument(
        "--modes",
        type=_words,
        metavar="M[,M...]",
        help="score modes (default: the usual ones); random and uniform are always compared with",
    )
    rule = parser.add_argument_group("rule, one of").add_mutually_exclusive_group()
    rule.add_argument("--min-agreement", type=float, metavar="P", help="the cheapest with at least P %% of the unpruned model's tokens")
    rule.add_argument("--max-ttft-ms", type=float, metavar="T", help="the best with the first token within T ms; needs --profile")
    rule.add_argument("--avg-keep", type=float, metavar="A", help="the best with at most A visual tokens, averaged over all layers")
    parser.add_argument(
        "--profile", type=Path, action="append", default=[], metavar="FILE", help="profile.json of python -m runtime.profile; repeatable"
    )
    parser.add_argument(
        "--auto-budgets", type=_whole_numbers, default=(), metavar="R,R[,R...]", help="try budgets per image, each one of these"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="measure N images, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sample and of the bootstrap (default: 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the plan (default: that of --plan, else plan.json)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the model runs (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the model (default: float32)")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is the evidence as one JSON object")
    return parser


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 166 or 166,98,29") from error


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _search(args: argparse.Namespace) -> BudgetSearch:
    from calibration.budget_search import BudgetSearch
    from calibration.pareto import Rule

    limits = (args.min_agreement, args.max_ttft_ms, args.avg_keep)
    return BudgetSearch(
        model=args.model, questions=args.questions, checkpoint=args.checkpoint, images=args.images, plan=args.plan, splits=args.splits,
        keeps=args.keep, modes=args.modes, profiles=tuple(args.profile), rule=None if limits == (None, None, None) else Rule(*limits),
        auto_budgets=args.auto_budgets, limit=args.limit, seed=args.seed, device=args.device, dtype=args.dtype,
    )  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    try:
        from calibration.budget_search import find_budget
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed: pip install 'entropy-prune[export,calibration]'") from error
    from calibration.plan_files import BudgetFiles

    files = BudgetFiles(args.output or args.plan or DEFAULT_PLAN, args.plan)
    found = find_budget(_search(args), files)
    print(found.text)
    if found.error is not None:
        raise found.error
    written = f"plan: {files.plan}, picture: {files.picture}" if found.plan is not None else "nothing was written"
    print(f"{written}; measurements, from which another run goes on: {files.journal}")
    if args.json:
        print(json.dumps({"plan": None if found.plan is None else str(files.plan), "budget": found.evidence}))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
