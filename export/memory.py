"""`python -m export.memory`: what a model needs of a target's memory, and what would fit; from configs alone, without a checkpoint.

    python -m export.memory --model llava15 --target jetson-orin-nano-8gb --precision int4
    python -m export.memory --model llava15 --target rtx-40 --device-memory 16GB
    python -m export.memory --model llava15 --all        # every Jetson in fp16, int8 and int4

The same figures as in a build's plan, report.json and bundle.json: `export.memory_plan` has the formulas.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from runtime.command_line import CommandParser, run_command

if TYPE_CHECKING:
    from export.configs import ModelConfig
    from export.memory_plan import MemoryRequest
    from export.spec import ModelSpec
    from export.targets import TargetConfig

SURVEY_PREFIX, SURVEY_PRECISIONS = "jetson", ("fp16", "int8", "int4")


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m export.memory", description="Say what a model needs of a target's memory.")
    parser.add_argument("--model", required=True, help="a model of configs/models")
    parser.add_argument("--target", default="cpu", help="a target of configs/targets (default: cpu)")
    parser.add_argument("--all", action="store_true", help="every Jetson target in fp16, int8 and int4, a line each")
    parser.add_argument("--device-memory", metavar="SIZE", help="the target's memory, such as 12GB, where a target is a family of cards")
    parser.add_argument("--precision", help="of the weights (default: the target's)")
    parser.add_argument("--keep", type=int, metavar="R", help="visual tokens kept after the split (default: the model's budget)")
    parser.add_argument("--split-layer", type=int, metavar="K", help="layers before the pruning (default: the model's)")
    parser.add_argument("--max-context", type=int, metavar="C", help="largest prompt + answer in tokens (default: the model's)")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is the same as one JSON object")
    return parser


def _run(args: argparse.Namespace) -> int:
    from export.configs import load_model_config, load_target_config
    from export.memory_plan import misfit, plan_memory
    from export.memory_table import describe_memory, memory_report
    from export.target_options import choose_precision
    from runtime.errors import UsageError

    model = load_model_config(args.model)
    spec = _spec(model)
    if args.all:
        if args.precision or args.device_memory or args.target != "cpu":
            raise UsageError("--all takes every Jetson target in several precisions: leave out --target, --precision and --device-memory")
        return _survey(args, model, spec)
    target = load_target_config(args.target)
    if args.device_memory is not None:
        target = target.with_memory(args.device_memory)
    request = _request(args, model, spec, target, choose_precision(args.precision, target))
    plan, problem = plan_memory(request), misfit(request, model.name)
    print("\n".join([*describe_memory(plan, target, indent=""), *([problem] if problem else [])]))
    if args.json:
        print(json.dumps({"model": model.name, "target": target.name, "misfit": problem, **memory_report(plan)}))
    return 0


def _spec(model: ModelConfig) -> ModelSpec:
    """The model's shapes: from its config, or from the config.json of the checkpoint that comes with it."""
    from export.checkpoint import Checkpoint
    from export.families import adapter_for

    if model.spec is not None:
        return model.spec
    config = Checkpoint.open(model.default_checkpoint()).config
    return adapter_for(config, model.family).describe(config)


def _request(args: argparse.Namespace, model: ModelConfig, spec: ModelSpec, target: TargetConfig, precision: str) -> MemoryRequest:
    """The options settled as a build settles them."""
    from export.budget import check_split
    from export.memory_plan import MemoryRequest
    from export.plan import BuildOptions, choose_budgets, choose_context

    split = check_split(model.split_layer if args.split_layer is None else args.split_layer, layers=spec.decoder.layers)
    options = BuildOptions(model.name, keep=None if args.keep is None else (args.keep,), max_context=args.max_context)
    keep = max(choose_budgets(options, model, spec, split))
    return MemoryRequest(spec, target, precision, split, keep, choose_context(options, model, spec))


def _survey(args: argparse.Namespace, model: ModelConfig, spec: ModelSpec) -> int:
    from export.memory_plan import largest_context, largest_keep, plan_memory
    from export.memory_table import memory_report

    rows, data = [("target", "precision", "needs", "has", "fits", "up to --keep", "up to --max-context", "compiling, peak")], []
    for target, precision in _surveyed():
        request = _request(args, model, spec, target, precision)
        plan, keep, context = plan_memory(request), largest_keep(request), largest_context(request)
        have = plan.available_bytes or 0
        rows.append((
            target.name, precision, _gb(plan.total_bytes), _gb(have), "yes" if plan.fits else "no", _or_none(keep), _or_none(context),
            _gb(plan.compile_peak_bytes) + (" (more than it has)" if plan.compile_peak_bytes > have else ""),
        ))  # fmt: skip
        data.append({"target": target.name, "largest_keep": keep, "largest_context": context, **memory_report(plan)})
    n, limit = spec.vision.visual_tokens, spec.decoder.max_positions
    print(
        f"{model.name}: split at layer {request.split_layer}, --keep {request.keep} of {n}, --max-context {request.max_context} of {limit}"
    )
    print("\n".join(_table(rows)))
    if args.json:
        print(json.dumps({"model": model.name, "rows": data}))
    return 0


def _surveyed() -> Iterator[tuple[TargetConfig, str]]:
    """Every Jetson target once, largest memory first, with each precision of the survey that it runs."""
    from export.configs import list_targets, load_target_config

    targets = {t.name: t for t in map(load_target_config, list_targets()) if t.name.startswith(SURVEY_PREFIX)}
    for target in sorted(targets.values(), key=lambda t: (-(t.memory_bytes or 0), t.name)):
        yield from ((target, precision) for precision in SURVEY_PRECISIONS if precision in target.precisions)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, so that it can be kept in a document as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _or_none(value: int | None) -> str:
    return "none" if value is None else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
