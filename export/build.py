"""`python -m export.build`: from a Hugging Face checkpoint to a bundle of engine graphs, split at a decoder layer.

    python -m export.build --model tiny-llava --target cpu
    python -m export.build --model llava15 --target cpu --checkpoint DIR --keep 166 --split-layer 2
    python -m export.build --model tiny-llava --target cpu,rtx          # one bundle for both
    python -m export.build --list-targets

The bundle is written beside its place and moved there whole: a failed build leaves an earlier bundle as it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.command_line import FAILED, CommandParser, run_command

if TYPE_CHECKING:
    from export.plan import BuildOptions, BuildPlan
    from runtime.manifest import Manifest

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"  # engines, as configs/targets call them
Progress = Callable[[int], None]


def build_bundle(plan: BuildPlan, output: Path, progress: Progress | None = None) -> Manifest:
    """Writes a bundle to `output`, whole or not at all.

    Args:
        progress: called with the number of weight bytes after each tensor.

    Raises:
        UsageError: it does not fit into the target's memory, or building for the target is not implemented.
        BundleExistsError: `output` holds something else, or another build is writing it.
        StorageError: it cannot be written.
        EngineError: a device's TensorRT would refuse a graph.
    """
    from export.operator_table import OperatorTable, check_operators
    from export.report import make_report
    from export.staging import staged
    from export.writer import BundleWriter
    from runtime.names import MANIFEST_FILE, REPORT_FILE

    check_buildable(plan)
    with staged(output) as directory:
        manifest = BundleWriter(plan, directory, progress or (lambda _: None)).write()
        for one in plan.each():
            if one.target.engine == TENSORRT:
                check_operators(directory, manifest.variant(one.target.name), OperatorTable.load())
        (directory / REPORT_FILE).write_text(json.dumps(make_report(plan, manifest), indent=2) + "\n", encoding="utf-8")
        (directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def obstacles(plan: BuildPlan) -> list[str]:
    """Why a plan cannot be built, a line each: its target's memory, and what is not implemented yet. The only place that says so."""
    return list(dict.fromkeys(line for one in plan.each() for line in _obstacles(one)))


def _obstacles(plan: BuildPlan) -> list[str]:
    """The same for a plan's first target."""
    from export.memory_plan import misfit
    from export.spec import GRAPH_DTYPES

    problem = misfit(plan.memory_request, plan.model.name)
    lines = [problem] if problem else []
    if plan.precision not in GRAPH_DTYPES:
        lines.append(
            f"building {plan.precision} is not implemented yet: choose --precision {', '.join(GRAPH_DTYPES)} where the target has it; "
            "--dry-run prints plan and memory for every target and precision"
        )
    return lines


def compile_engines(plan: BuildPlan, output: Path, report: dict[str, Any], *, rehearsal: bool = True) -> int:
    """What is left to do for the targets' engines after a bundle is written: RTX engines are built here, a Jetson's where this is one.

    Elsewhere a Jetson's engines are rehearsed, and the next command is printed.

    Args:
        report: receives the rehearsals' results.
        rehearsal: False leaves rehearsals out.

    Returns:
        The exit status. Where engines could not be built, or rehearsed, the bundle stays as it is, and a message says why.
    """
    from runtime import compile as compile_command

    status = 0
    for one in plan.each():
        target = one.target
        argv = [str(output), "--library", target.library, "--target", target.name]
        if target.engine == TENSORRT_RTX:
            capabilities = ",".join(text.replace(".", "") for text in target.compute_capabilities)
            status = max(status, compile_command.main([*argv, "--capability", capabilities]))
        elif target.engine == TENSORRT and _is_device():
            status = max(status, compile_command.main(argv))
        elif target.engine == TENSORRT:
            status = max(status, _rehearse(one, output, report["targets"][target.name], rehearsal))
            which = f" --target {target.name}" if plan.others else ""
            print(f"engines are built on the device: copy {output} there, then run\n  python3 -m runtime.compile {output.name}{which}")
    return status


def _is_device() -> bool:
    """Whether this is a Jetson: a processor as theirs, with TensorRT. (A workstation's TensorRT builds for its own GPU alone.)"""
    return platform.machine() == "aarch64" and importlib.util.find_spec("tensorrt") is not None


def _rehearse(plan: BuildPlan, output: Path, report: dict[str, Any], wanted: bool) -> int:
    """Rehearses one target's engines; returns the exit status and says what a failure means."""
    from export.rehearsal import rehearse
    from runtime.manifest import read_manifest

    if not wanted:
        report["rehearsal"] = {"rehearsed": False, "reason": "--no-rehearsal"}
        return 0
    found = rehearse(output, read_manifest(output).variant(plan.target.name))
    report["rehearsal"] = found
    if found.get("failed"):
        print(
            f"python -m export.build: error: the rehearsal for {plan.target.name} failed: {found['failed']}; the bundle is kept in "
            f"{output} (the device's own TensorRT may still take it; --no-rehearsal leaves the rehearsal out)",
            file=sys.stderr,
        )
        return FAILED
    return 0


def check_buildable(plan: BuildPlan) -> None:
    """Raises UsageError with the first of a plan's obstacles."""
    from runtime.errors import UsageError

    for line in obstacles(plan):
        raise UsageError(line)


class _ListTargets(argparse.Action):
    """`--list-targets`: prints the table and ends, whatever else is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from export.configs import list_targets, load_target_config
        from export.targets import describe_targets
        from runtime.errors import UsageError

        try:
            print(describe_targets([(name, load_target_config(name)) for name in list_targets()]))
        except UsageError as error:
            parser.error(str(error))
        parser.exit(0)


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m export.build", description="Export a multimodal LLM, split at its entropy collapse layer.")
    parser.add_argument("--model", required=True, help="a model of configs/models, e.g. tiny-llava or llava15")
    parser.add_argument("--target", default="cpu", metavar="T[,T...]", help="targets of configs/targets, in one bundle (default: cpu)")
    parser.add_argument("--list-targets", action=_ListTargets, nargs=0, help="print the targets, with chip, memory and precisions, and end")
    parser.add_argument("--device-memory", metavar="SIZE", help="the target's memory, such as 12GB, where a target is a family of cards")
    parser.add_argument("--checkpoint", metavar="DIR|HF-ID", help="Hugging Face checkpoint directory, or an id in the local cache")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--keep", type=_keep_list, metavar="R[,R...]", help="visual tokens kept after the split; several make several budgets"
    )
    budget.add_argument("--avg-keep", type=float, metavar="A", help="the paper's budget: visual tokens averaged over all layers")
    budget.add_argument("--keep-percent", type=float, metavar="P", help="percent of the visual tokens kept after the split")
    parser.add_argument("--auto-keep", type=float, metavar="T", help="offer keep auto: a budget for each image by this share of scores")
    parser.add_argument("--split-layer", type=int, metavar="K", help="layers before the pruning (default: the model's)")
    parser.add_argument(
        "--plan", metavar="FILE", help="a calibration's plan.json: split layer, budgets and score mode, where no option gives them"
    )
    parser.add_argument("--score-mode", help="trace, row, raw, dpp; controls: random, energy-high, energy-low, uniform")
    parser.add_argument("--precision", metavar="P[,P...]", help="of the weights, one for all or for each target (default: the target's)")
    parser.add_argument("--max-context", type=int, metavar="C", help="largest prompt + answer in tokens (default: the model's)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the bundle (default: bundles/MODEL-TARGETS)")
    parser.add_argument("--debug-outputs", action="store_true", help="graphs with every layer's hidden states and all rows' logits")
    parser.add_argument("--no-rehearsal", action="store_true", help="do not build a Jetson's graphs here with TensorRT for RTX, as a check")
    parser.add_argument("--dry-run", action="store_true", help="print plan and sizes, write nothing")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is the report as one JSON object")
    return parser


def _keep_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 166 or 166,98,29") from error


def _options(args: argparse.Namespace) -> BuildOptions:
    from export.plan import BuildOptions

    return BuildOptions(
        model=args.model, target=args.target, checkpoint=args.checkpoint, keep=args.keep, avg_keep=args.avg_keep,
        keep_percent=args.keep_percent, split_layer=args.split_layer, score_mode=args.score_mode, precision=args.precision,
        max_context=args.max_context, debug=args.debug_outputs, plan=args.plan, device_memory=args.device_memory,
        auto_keep=args.auto_keep,
    )  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from export.plan import default_output, make_plan
    from export.report import describe_plan, describe_report, make_report
    from export.staging import check_destination
    from export.text_files import bundle_text_files
    from runtime.engines.tensorrt_library import load_library
    from runtime.files import write_file
    from runtime.names import REPORT_FILE

    options = _options(args)
    output = args.output or default_output(options)
    plan = make_plan(options)
    bundle_text_files(plan)  # what is wrong with them is told before anything is written
    check_destination(output)
    print(describe_plan(plan, output), file=sys.stderr)
    if args.dry_run:
        print("\n".join([*obstacles(plan), "dry run: nothing was written"]))
        return 0
    check_buildable(plan)
    if any(one.target.engine == TENSORRT_RTX for one in plan.each()):
        load_library("tensorrt_rtx")  # a missing one is told before anything is written
    _check_space(plan, output)
    total = plan.bytes_to_write
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None, file=sys.stderr) as bar:
        manifest = build_bundle(plan, output, bar.update)
    report = make_report(plan, manifest)
    print(describe_report(report, output))
    status = compile_engines(plan, output, report, rehearsal=not args.no_rehearsal)
    write_file(output / REPORT_FILE, (json.dumps(report, indent=2) + "\n").encode())
    if args.json:
        print(json.dumps(report))
    return status


def _check_space(plan: BuildPlan, output: Path) -> None:
    from export.memory_plan import stored_bytes
    from runtime.errors import StorageError

    parent = next(p for p in (output.absolute(), *output.absolute().parents) if p.is_dir())
    free, needed = shutil.disk_usage(parent).free, plan.bytes_to_write
    for one in plan.each():
        if one.target.engine == TENSORRT_RTX:  # its engines hold the weights once more
            needed += stored_bytes(one.spec, one.precision)
    if free < needed * 1.02:
        raise StorageError(
            f"{parent} has {free / 1e9:.2f} GB free, the bundle needs {needed / 1e9:.2f} GB: free some space or choose another --output"
        )


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
