"""Held-out accuracy of the shipped model through the exported chain, by question type.

    python -m tiny_llava.evaluate                 # builds what it needs: unpruned, pruned, a blank image, random tokens at K = 1
    python -m tiny_llava.evaluate --bundle DIR --keep all

Exact answers only. Intervals are Wilson's at 95 %.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from runtime.command_line import run_command
from runtime.machine import installed
from runtime.pipeline import VisionLanguageModel, load
from tiny_llava.heldout import HeldoutQuestion, load_heldout
from tiny_llava.scenes import QUESTION_TYPES, SIZE

Counts = dict[str, tuple[int, int]]
BLANK = np.full((SIZE, SIZE, 3), 90, np.uint8)
RANDOM_SPLIT, RANDOM_SHARE = 1, 0.11


def evaluate(model: VisionLanguageModel, questions: Sequence[HeldoutQuestion], keep: int | str | None, *, blank: bool = False) -> Counts:
    """Right answers and questions of each type; `blank` replaces every image by plain grey."""
    counts = dict.fromkeys(QUESTION_TYPES, (0, 0))
    for item in tqdm(questions, desc=f"keep {keep or 'default'}{', blank' if blank else ''}", disable=None, file=sys.stderr):
        result = model.generate(item.question, [BLANK if blank else item.image], keep=keep, max_new_tokens=12)
        right, total = counts[item.kind]
        counts[item.kind] = right + (result.text == item.answer), total + 1
    return counts


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927)."""
    if total == 0:
        return 0.0, 1.0
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return middle - half, middle + half


def overall(counts: Counts) -> tuple[int, int]:
    return sum(r for r, _ in counts.values()), sum(t for _, t in counts.values())


def table(results: dict[str, Counts]) -> str:
    """Accuracy in percent: a row for each type, a column for each setting."""
    lines = [f"{'type':<10}{'questions':>10}" + "".join(f"{name:>24}" for name in results)]
    for kind in (*QUESTION_TYPES, "all"):
        cells, total = [], 0
        for counts in results.values():
            right, total = overall(counts) if kind == "all" else counts[kind]
            low, high = wilson(right, total)
            cells.append(f"{100 * right / max(total, 1):.1f} ({100 * low:.1f}-{100 * high:.1f})")
        lines.append(f"{kind:<10}{total:>10}" + "".join(f"{c:>24}" for c in cells))
    return "\n".join(lines)


def shipped_results(questions: Sequence[HeldoutQuestion], folder: Path) -> dict[str, Counts]:
    """The settings that the model's record reports: the default, a random choice at the same place, and one right after layer 0."""
    from export.build import build_bundle
    from export.plan import BuildOptions, make_plan

    def built(name: str, options: BuildOptions) -> VisionLanguageModel:
        build_bundle(make_plan(options), folder / name)
        return load(folder / name)

    model = built("default", BuildOptions("tiny-llava"))
    keep, split = model.manifest.budgets[0], model.manifest.split_layer
    few = round(RANDOM_SHARE * model.manifest.geometry.visual_tokens)
    random = built("random", BuildOptions("tiny-llava", keep=(keep,), split_layer=split, score_mode="random"))
    early = built("early", BuildOptions("tiny-llava", keep=(few,), split_layer=RANDOM_SPLIT, score_mode="random"))
    return {
        "unpruned": evaluate(model, questions, "all"),
        f"{model.manifest.score_mode} K={split} keep {keep}": evaluate(model, questions, keep),
        f"random K={split} keep {keep}": evaluate(random, questions, None),
        f"random K={RANDOM_SPLIT} keep {few}": evaluate(early, questions, None),
        "blank image": evaluate(model, questions, "all", blank=True),
    }


def grid(questions: Sequence[HeldoutQuestion], folder: Path, splits: Sequence[int], modes: Sequence[str], keep: int) -> dict[str, Counts]:
    """One setting for each split layer and score mode, with the same number of tokens kept."""
    from export.build import build_bundle
    from export.plan import BuildOptions, make_plan

    results = {}
    for split in splits:
        for mode in modes:
            bundle = folder / f"{mode}-{split}"
            build_bundle(make_plan(BuildOptions("tiny-llava", keep=(keep,), split_layer=split, score_mode=mode)), bundle)
            results[f"{mode} K={split}"] = evaluate(load(bundle), questions, None)
    return results


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tiny_llava.evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bundle", type=Path, help="evaluate this bundle alone (default: build and compare the record's settings)")
    parser.add_argument("--keep", help="with --bundle or --splits: visual tokens kept, all or auto (default: the bundle's first budget)")
    parser.add_argument("--splits", metavar="K[,K...]", help="compare split layers and score modes instead, keeping --keep tokens")
    parser.add_argument("--modes", default="trace,row,raw,energy-high,random", metavar="M[,M...]", help="with --splits")
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


def _run(args: argparse.Namespace) -> int:
    questions = load_heldout(args.limit)
    if args.bundle:
        keep = int(args.keep) if args.keep and args.keep.isdigit() else args.keep
        results = {f"keep {keep or 'default'}": evaluate(load(args.bundle), questions, keep)}
    elif args.splits:
        with tempfile.TemporaryDirectory() as folder:
            splits = [int(k) for k in args.splits.split(",")]
            results = grid(questions, Path(folder), splits, args.modes.split(","), int(args.keep or 16))
        for name, counts in results.items():
            right, total = overall(counts)
            low, high = wilson(right, total)
            print(f"{name:<20}{100 * right / total:6.1f} ({100 * low:.1f}-{100 * high:.1f})")
    else:
        with tempfile.TemporaryDirectory() as folder:
            results = shipped_results(questions, Path(folder))
    if not args.splits:
        print(table(results))
    where: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "python": platform.python_version(), "onnxruntime": installed("onnxruntime"),
        "machine": platform.machine(), "system": platform.system(),
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    if args.json:
        print(json.dumps({**where, "results": results}))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
