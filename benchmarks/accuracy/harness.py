"""Public benchmarks through lmms-eval: runs it once for each budget of a bundle, then sets the results side by side.

    python -m benchmarks.accuracy.harness --bundle DIR --keep all,166,98,29 --tasks pope,mme --output results

lmms-eval is a command of its own here, called as a user would (`python -m lmms_eval`), so that whatever it offers can be passed on after
`--` and every run can be repeated by hand. See docs/benchmarks.md for its installation and for what the tasks need.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.command_line import CommandParser, run_command
from runtime.errors import EngineError, UsageError, shown

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "benchmarks.accuracy.lmms_plugin"
HARNESS = "lmms-eval==0.7.3"  # the release this was written for and tried with
# What the plugin puts into the results' "throughput", and how the table calls it.
STATISTICS = {
    "avg_visual_tokens": "visual tokens", "avg_kept_tokens": "kept tokens", "avg_ttft_ms_p50": "first token, ms, median",
    "avg_ttft_ms_p90": "first token, ms, p90",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scores:
    """What one run of lmms-eval found: `metrics` by (task, metric), and `statistics` by the table's names."""

    metrics: dict[tuple[str, str], float]
    statistics: dict[str, float]

    @classmethod
    def from_results(cls, results: Mapping[str, Any]) -> Scores:
        """From a parsed `*_results.json` of lmms-eval: its numbers, without standard errors."""
        metrics = {}
        for task, row in results["results"].items():
            for name, value in row.items():
                metric, _, chosen = name.partition(",")
                if chosen and "_stderr" not in metric and isinstance(value, (int, float)):
                    metrics[task, metric if chosen == "none" else name] = float(value)
        speed = results.get("throughput", {})
        return cls(metrics, {title: float(speed[key]) for key, title in STATISTICS.items() if key in speed})


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m benchmarks.accuracy.harness", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", required=True, metavar="DIR", help="made by python -m export.build")
    parser.add_argument("--tasks", required=True, metavar="T[,T...]", help="tasks of lmms-eval (python -m lmms_eval --tasks list)")
    parser.add_argument(
        "--keep", metavar="R[,R...]", help="budgets of the bundle, all for no pruning, auto (default: all, then each budget)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where lmms-eval writes, one folder for each budget")
    parser.add_argument("--style", default="bundle", help="bundle, or llava: its system prompt, images padded (default: bundle)")
    parser.add_argument("--cache-mb", type=int, default=0, metavar="MB", help="reuse an image's caches for its further questions")
    parser.add_argument("--threads", type=int, help="engine threads (default: one per core)")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="options of lmms-eval, such as -- --limit 100 --log_samples")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    from benchmarks.accuracy.bundle_model import Settings
    from runtime.manifest import read_manifest

    manifest = read_manifest(Path(args.bundle))
    keeps = chosen_keeps(args.keep, manifest.budgets, manifest.geometry.visual_tokens, manifest.auto_keep is not None)
    Settings(args.bundle, style=args.style, cache_mb=args.cache_mb)
    if any(sign in args.bundle for sign in ",'\"[]{}"):
        raise UsageError(f"--bundle is {shown(args.bundle)}; lmms-eval takes no path with a comma, quote or bracket: rename or link it")
    if importlib.util.find_spec("lmms_eval") is None:
        raise EngineError(f"lmms-eval is not installed in this environment: pip install {HARNESS} (see docs/benchmarks.md)")
    found = {keep: _evaluate(args, keep) for keep in keeps}
    print(table(found))
    if args.json:
        print(json.dumps({keep: _plain(scores) for keep, scores in found.items()}))
    return 0


def chosen_keeps(given: str | None, budgets: Sequence[int], visual_tokens: int, auto: bool = False) -> list[str]:
    """The budgets to run, in the order given; `auto`: whether the bundle chooses one for each image where it is asked to.

    Raises:
        UsageError: the bundle does not have one, or one is given twice.
    """
    names = ["all", *(str(budget) for budget in budgets)]
    if given is None:
        return names
    names += ["auto"] if auto else []
    keeps = [keep.strip() for keep in given.split(",")]
    absent = [keep for keep in keeps if keep not in (*names, str(visual_tokens))]
    if absent:
        option = "several budgets and --auto-keep" if absent == ["auto"] else "that --keep"
        raise UsageError(f"--keep: this bundle holds {', '.join(names)}, not {', '.join(absent)}: export it with {option}")
    if len(set(keeps)) < len(keeps):
        raise UsageError(f"--keep is {shown(given)}; give each budget once")
    return keeps


def command(args: argparse.Namespace, keep: str, folder: Path) -> list[str]:
    """The call of lmms-eval for one budget; options of the user come last, so that they win."""
    arguments = {"bundle": args.bundle, "keep": keep, "style": args.style, "cache_mb": args.cache_mb, "threads": args.threads}
    model_args = ",".join(f"{name}={value}" for name, value in arguments.items() if value is not None)
    tasks = ROOT / PLUGIN.replace(".", "/") / "tasks"
    return [
        sys.executable, "-m", "lmms_eval", "--model", "entropy_prune", "--model_args", model_args, "--tasks", args.tasks,
        "--batch_size", "1", "--include_path", str(tasks), "--output_path", str(folder), *args.options,
    ]  # fmt: skip


def _evaluate(args: argparse.Namespace, keep: str) -> Scores:
    """Runs lmms-eval, its output passing through on stderr, and reads the results it wrote."""
    folder = args.output / f"keep-{keep}"
    before = set(folder.glob("**/*_results.json"))
    call = command(args, keep, folder)
    print(f"LMMS_EVAL_PLUGINS={PLUGIN} {shlex.join(call)}", file=sys.stderr, flush=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "LMMS_EVAL_PLUGINS": PLUGIN, "PYTHONPATH": os.pathsep.join(paths)}
    code = subprocess.run(call, env=environment, stdout=sys.stderr, check=False).returncode
    written = sorted(set(folder.glob("**/*_results.json")) - before)
    if not written:  # lmms-eval ends with code 0 even where it fails
        raise EngineError(f"lmms-eval ended without results for keep {keep} (exit code {code}): its last lines above say why")
    return Scores.from_results(json.loads(written[-1].read_text(encoding="utf-8")))


def table(found: Mapping[str, Scores]) -> str:
    """A row for each metric, a column for each budget, with its share of `all` where that was run too."""
    keeps, whole = list(found), found.get("all")
    rows = [["task", "metric", *(f"keep {keep}" for keep in keeps)]]
    for task, metric in dict.fromkeys(key for scores in found.values() for key in scores.metrics):
        cells = []
        for keep in keeps:
            value, reference = found[keep].metrics.get((task, metric)), whole.metrics.get((task, metric)) if whole else None
            share = f" ({100 * value / reference:.1f} %)" if value is not None and reference and keep != "all" else ""
            cells.append("-" if value is None else f"{value:.4g}{share}")
        rows.append([task, metric, *cells])
    for title in dict.fromkeys(title for scores in found.values() for title in scores.statistics):
        values = [found[keep].statistics.get(title) for keep in keeps]
        rows.append(["", title, *("-" if value is None else f"{value:.1f}" for value in values)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _plain(scores: Scores) -> dict[str, Any]:
    return {"metrics": {f"{task}/{metric}": value for (task, metric), value in scores.metrics.items()}, "statistics": scores.statistics}


if __name__ == "__main__":
    sys.exit(main())
