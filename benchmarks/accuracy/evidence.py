"""What pruning costs on the shipped small LLaVA: every score mode, the controls, and neighbours, over the held-out questions.

    python -m benchmarks.accuracy.evidence --output out/evidence                 # about half an hour; stopped, it goes on where it was
    python -m benchmarks.accuracy.evidence --output out/quick --limit 70 --splits 2

Writes evidence.md (tables), evidence.json and evidence.png into the output folder, and prints the tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from runtime.command_line import CommandParser, run_command

EXTRA_KEEPS = (16, 11)  # what the paper's saving leaves of 64 tokens at K = 1 and K = 2
NEIGHBOUR_SPLIT = 2


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m benchmarks.accuracy.evidence", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("out/evidence"), metavar="DIR", help="results, and what is measured so far")
    parser.add_argument("--splits", metavar="K[,K...]", help="split layers (default: 1 to half of the layers)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


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

    splits = [int(part) for part in args.splits.split(",")] if args.splits else None
    evaluation = open_evaluation(CHECKPOINT, splits, EXTRA_KEEPS)
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


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
