"""`make calibrate-demo`: where to prune, how much, and what it costs, on the shipped model; then a build with that plan, measured.

    python -m tiny_llava.calibrate_demo --output demo/calibration

The plan is made from the calibration questions alone; accuracy before and after is of the held-out ones.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.command_line import CommandParser, run_command
from runtime.errors import StorageError, UsageError
from tiny_llava.heldout import CALIBRATION_FOLDER, FOLDER

MODEL = "tiny-llava"
SPLITS, KEEPS, MODES = "2,3,4,5", "7,11,14,16", "trace,dpp"
MIN_AGREEMENT = "98"  # percent of next tokens that stay the unpruned model's


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m tiny_llava.calibrate_demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo/calibration"), metavar="DIR", help="plan, pictures, bundle")
    parser.add_argument("--limit", type=int, metavar="N", help="only N images and N held-out questions")
    return parser


def _run(args: argparse.Namespace) -> int:
    from calibration import budget, ecl
    from export import build

    if args.output.exists() and not args.output.is_dir():
        raise StorageError(f"--output {args.output} is a file: name a directory")
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit is {args.limit}: give 1 or more images")
    args.output.mkdir(parents=True, exist_ok=True)
    plan, bundle = args.output / "plan.json", args.output / "bundle"
    for end in (".json", ".png", ".images.jsonl", ".budget.png", ".budget.jsonl"):  # measured anew each time
        plan.with_suffix(end).unlink(missing_ok=True)
    limit = ["--limit", str(args.limit)] if args.limit else []
    questions = str(CALIBRATION_FOLDER / "questions.json")
    steps: tuple[tuple[str, Callable[[list[str]], int], list[str]], ...] = (
        ("Where: the entropy of the visual tokens, layer by layer", ecl.main,
         ["--model", MODEL, "--images", str(CALIBRATION_FOLDER), "--output", str(plan), *limit]),
        ("How much: answers under pruning, beside their cost", budget.main,
         ["--model", MODEL, "--questions", questions, "--plan", str(plan), "--splits", SPLITS, "--keep", KEEPS, "--modes", MODES,
          "--min-agreement", MIN_AGREEMENT, *limit]),
        ("Build with that plan", build.main, ["--model", MODEL, "--plan", str(plan), "--output", str(bundle)]),
    )  # fmt: skip
    began = time.perf_counter()
    for title, command, argv in steps:
        print(f"\n{title}\n$ python -m {command.__module__} {' '.join(argv)}\n", flush=True)
        code = command(argv)
        if code:
            return code
    _before_and_after(bundle, args.output / "kept.png", args.limit)
    print(f"\nWhere everything is ({time.perf_counter() - began:.0f} s in all)")
    for what, path in (
        ("plan", plan), ("curve", plan.with_suffix(".png")), ("agreement against cost", plan.with_suffix(".budget.png")),
        ("kept patches of one image", args.output / "kept.png"), ("bundle", bundle),
    ):  # fmt: skip
        print(f"  {what:<28}{path}")
    return 0


def _before_and_after(bundle: Path, picture: Path, limit: int | None) -> None:
    """Held-out accuracy of the plan's bundle, unpruned and pruned, through the exported chain."""
    from runtime.picture import draw_selection
    from runtime.pipeline import load
    from tiny_llava.evaluate import evaluate, table
    from tiny_llava.heldout import load_heldout

    model, questions = load(bundle), load_heldout(limit)
    keep = model.manifest.budgets[0]
    name = f"{model.manifest.score_mode}, split {model.manifest.split_layer}, keep {keep}"
    print(f"\nBefore and after, on {len(questions)} held-out questions from {FOLDER.name}/: exact answers in percent, 95 % intervals\n")
    print(table({"unpruned": evaluate(model, questions, "all"), name: evaluate(model, questions, keep)}))
    draw_selection(model, questions[0].image, model.generate(questions[0].question, [questions[0].image]), questions[0].question).save(
        picture
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    sys.exit(main())
