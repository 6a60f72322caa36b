"""`python -m calibration.ecl`: finds the entropy collapse layer of your model on your images, and writes plan.json.

    python -m calibration.ecl --model tiny-llava --images tiny_llava/heldout
    python -m calibration.ecl --model llava15 --checkpoint DIR --images DIR --device cuda --dtype bfloat16 --limit 100
    python -m export.build --model llava15 --checkpoint DIR --plan plan.json

Beside plan.json lie plan.png, the curve, and plan.images.jsonl, what was measured of each image: an interrupted run goes on from it.
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
    from calibration.layer_search import LayerSearch


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m calibration.ecl", description="Find the entropy collapse layer of a model, on your images.")
    parser.add_argument("--model", required=True, help="a model of configs/models, e.g. tiny-llava or llava15")
    parser.add_argument("--checkpoint", metavar="DIR|HF-ID", help="Hugging Face checkpoint directory, or an id in the local cache")
    parser.add_argument("--images", required=True, type=Path, metavar="DIR", help="images, in this directory and those below it")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a question on each line; every image gets one of them")
    parser.add_argument("--limit", type=int, metavar="N", help="measure N images, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sample and of the bootstrap (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("plan.json"), metavar="FILE", help="the plan (default: plan.json)")
    parser.add_argument("--split-layer", type=int, metavar="K", help="put this K into the plan, whatever the rule would choose")
    rule = parser.add_argument_group("rule")
    rule.add_argument(
        "--rule", default="largest-drop", choices=("largest-drop", "relative-drop", "first-drop"), help="default: largest-drop"
    )
    rule.add_argument("--threshold", type=float, metavar="D", help="first-drop: the drop of S that is enough")
    entropy = parser.add_argument_group("entropy")
    entropy.add_argument("--tensor", default="hidden", choices=("hidden", "query", "key", "value"), help="default: hidden")
    entropy.add_argument(
        "--matrix", default="tokens", choices=("tokens", "heads"), help="over tokens (default), or over each token's heads, averaged"
    )
    entropy.add_argument("--no-centre", action="store_true", help="do not subtract the rows' mean")
    entropy.add_argument("--no-row-norm", action="store_true", help="do not divide each row by its norm")
    entropy.add_argument("--raw", action="store_true", help="eigenvalues over the number of rows, not over their sum")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the model runs (default: cpu)")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the model; entropies are always float64"
    )
    parser.add_argument("--json", action="store_true", help="the last line of stdout is the plan as one JSON object")
    return parser


def _search(args: argparse.Namespace) -> LayerSearch:
    from calibration.activations import Probe
    from calibration.collapse import CollapseRule
    from calibration.layer_search import LayerSearch
    from calibration.matrix_entropy import EntropyDefinition

    return LayerSearch(
        model=args.model, checkpoint=args.checkpoint, images=args.images, prompts=args.prompts, limit=args.limit, seed=args.seed,
        split_layer=args.split_layer, rule=CollapseRule(args.rule, args.threshold),
        probe=Probe(args.tensor, args.matrix, EntropyDefinition(not args.no_centre, not args.no_row_norm, not args.raw)),
        device=args.device, dtype=args.dtype,
    )  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    try:
        from calibration.layer_search import find_layer
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed: pip install 'entropy-prune[export,calibration]'") from error
    from calibration.plan_files import PlanFiles

    files = PlanFiles(args.output)
    found = find_layer(_search(args), files)
    print(found.text)
    print(f"plan: {files.plan}, picture: {files.picture}, measurements: {files.journal}")
    if args.json:
        print(json.dumps(json.loads(found.plan.to_json())))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
