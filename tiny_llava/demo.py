"""`make demo`: builds the shipped model, asks three questions about the shipped image, shows what pruning kept and saved.

python -m tiny_llava.demo --output demo
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.command_line import run_command
from tiny_llava.heldout import DEMO_FILE, DEMO_IMAGE

RUNS = 15
STAGES = ("preprocess", "vision", "embed", "pre_ecl", "score", "post_ecl")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tiny_llava.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="where bundle and pictures go (default: demo)")
    return parser


def _run(args: argparse.Namespace) -> int:
    from export import build
    from runtime.picture import draw_selection
    from runtime.pipeline import load

    bundle = args.output / "bundle"
    print("Building tiny-llava for cpu, split inside its decoder\n")
    code = build.main(["--model", "tiny-llava", "--target", "cpu", "--output", str(bundle)])
    if code:
        return code
    model = load(bundle)
    manifest = model.manifest
    print(f"\nThree questions about {DEMO_IMAGE}")
    wrong = 0
    for number, item in enumerate(json.loads(DEMO_FILE.read_text(encoding="utf-8")), 1):
        result = model.generate(item["question"], [DEMO_IMAGE])
        wrong += result.text != item["answer"]
        mark = "right" if result.text == item["answer"] else f"WRONG, should be {item['answer']!r}"
        print(f"  {item['question']:<28} {result.text:<12} {mark}; {result.kept_tokens} of {result.visual_tokens} visual tokens kept")
        draw_selection(model, DEMO_IMAGE, result, item["question"]).save(args.output / "kept.png") if number == 1 else None
    print(f"\nLatency in ms, median (p90) of {RUNS} interleaved runs, one prompt with one image")
    print(_latency_table(model, manifest.budgets[0]))
    print("\nWhere everything is")
    for what, path in (("bundle", bundle), ("its report", bundle / "report.json"), ("kept patches and entropy", args.output / "kept.png")):
        print(f"  {what:<26} {path}")
    question = f'--bundle {bundle} --image {DEMO_IMAGE} --prompt "how many digits?"'
    print(f"  {'ask it yourself':<26} {sys.executable} -m runtime.generate {question}")
    return 0 if not wrong else 1


def _latency_table(model: object, keep: int) -> str:
    """Stages pruned and unpruned, measured in turn, so that a busy machine slows both alike."""
    from runtime.pipeline import VisionLanguageModel

    assert isinstance(model, VisionLanguageModel)
    times: dict[str, list[dict[str, float]]] = {"all": [], str(keep): []}
    for run in range(RUNS + 2):
        for setting, rows in times.items():
            result = model.generate("what is at row 1 column 2?", [DEMO_IMAGE], keep="all" if setting == "all" else keep)
            if run >= 2:  # the first two warm up
                rows.append({**result.stages_ms, "first token": result.ttft_ms, "each further token": result.tpot_ms})
    lines = [f"  {'':<20}{'unpruned':>16}{f'keep {keep}':>16}{'ratio':>8}"]
    for stage in (*STAGES, "first token", "each further token"):
        cells, medians = [], []
        for rows in times.values():
            values = sorted(row[stage] for row in rows if stage in row)
            medians.append(statistics.median(values) if values else 0.0)
            cells.append(f"{medians[-1]:.2f} ({values[int(0.9 * (len(values) - 1))]:.2f})" if values else "-")
        ratio = f"{medians[1] / medians[0]:.2f}" if all(medians) else "-"
        lines.append(f"  {stage:<20}{cells[0]:>16}{cells[1]:>16}{ratio:>8}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
