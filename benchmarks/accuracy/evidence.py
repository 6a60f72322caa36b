"""What pruning costs on the shipped small LLaVA: every score mode, the controls, and neighbours, over the held-out questions.

    python -m benchmarks.accuracy.evidence --output out/evidence                 # about half an hour; stopped, it goes on where it was
    python -m benchmarks.accuracy.evidence --output out/quick --limit 70 --splits 2

Writes evidence.md (tables), evidence.json and evidence.png into the output folder, and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from runtime.command_line import CommandParser, run_command

EXTRA_KEEPS = (16, 11)  # besides the percentages and the paper's averages
NEIGHBOUR_SPLIT = 2  # where FastV prunes
GOAL_KEEP = 12  # what the paper's saving leaves of 64 tokens there


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m benchmarks.accuracy.evidence", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("out/evidence"), metavar="DIR", help="results, and what is measured so far")
    parser.add_argument(
        "--splits",
        type=_whole_numbers,
        metavar="K[,K...]",
        help=f"split layers, and {NEIGHBOUR_SPLIT} (default: 1 to half of all)",
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N questions")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 2,4") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    from benchmarks.accuracy import chart, per_image, report, why
    from benchmarks.accuracy.evaluation import open_evaluation
    from calibration.questions import read_questions
    from export.checkpoint import Checkpoint
    from export.configs import load_model_config
    from export.families import adapter_for
    from runtime.files import write_file
    from runtime.machine import Machine
    from tiny_llava.heldout import CHECKPOINT, FOLDER

    evaluation = open_evaluation(CHECKPOINT, args.splits, EXTRA_KEEPS)
    questions = read_questions(FOLDER / "questions.json")[: args.limit]
    outcomes = evaluation.run(questions, args.output / "images")
    checkpoint = Checkpoint.open(str(CHECKPOINT))
    decoder = adapter_for(checkpoint.config, load_model_config("tiny-llava").family).describe(checkpoint.config).decoder
    evidence = report.Evidence(outcomes, decoder, evaluation.visual_tokens, NEIGHBOUR_SPLIT, EXTRA_KEEPS)
    machine = Machine.here(None).describe()
    text = "\n".join([
        "# Accuracy of the small LLaVA under pruning\n",
        f"Printed by `python -m benchmarks.accuracy.evidence`; {machine}.\n",
        report.markdown(evidence),
        whole_model(NEIGHBOUR_SPLIT, GOAL_KEEP),
        per_image.markdown(evidence, [s for s in (2, 4) if s in evaluation.splits]),
        why.markdown(evaluation, questions, NEIGHBOUR_SPLIT, EXTRA_KEEPS[1]),
    ])  # fmt: skip
    data = {"machine": machine, "questions": len(questions), "settings": report.as_data(evidence)}
    write_file(args.output / "evidence.md", text.encode())
    write_file(args.output / "evidence.json", (json.dumps(data, indent=1) + "\n").encode())
    chart.draw(evidence, args.output / "evidence.png")
    print(text)
    print(f"chart: {args.output / 'evidence.png'}")
    if args.json:
        print(json.dumps(data))
    return 0


def whole_model(split: int, keep: int) -> str:
    """FLOPs of all stages, vision tower and head included, counted from exported graphs."""
    from benchmarks.accuracy.report import table
    from export.build import build_bundle
    from export.plan import BuildOptions, make_plan
    from export.report import TEXT_TOKENS, format_flops
    from runtime import names

    with tempfile.TemporaryDirectory() as folder:
        options = BuildOptions("tiny-llava", keep=(keep,), split_layer=split, score_mode="dpp")
        flops = build_bundle(make_plan(options), Path(folder) / "bundle").flops
    stages = (names.VISION, names.PRE_ECL, names.SCORE, names.POST_ECL, "head")
    dense = {stage: flops.get(stage, 0.0) for stage in stages}
    pruned = {stage: flops.get(f"{stage}.{keep}", flops.get(stage, 0.0)) for stage in stages}
    rows = [[f"`{s}`", format_flops(dense[s]) if dense[s] else "-", format_flops(pruned[s])] for s in stages]
    decoder = [names.PRE_ECL, names.SCORE, names.POST_ECL]
    for what, chosen in (("decoder with score", decoder), ("everything", list(stages))):
        sums = [sum(values[s] for s in chosen) for values in (dense, pruned)]
        rows.append([what, format_flops(sums[0]), f"{format_flops(sums[1])} ({1 - sums[1] / sums[0]:.1%} fewer)"])
    head = f"## The whole model, counted from the graphs (`dpp`, K = {split}, {TEXT_TOKENS} text tokens)"
    return f"{head}\n\n{table(['', 'unpruned', f'keep {keep}'], rows)}\n"


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
