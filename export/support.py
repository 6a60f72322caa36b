"""`python -m export.support`: which graph becomes what for which target and precision: built here, parsed here, or refused, and why.

    python -m export.support                 # the table, from the code that refuses and the record of what was built
    python -m export.support --build         # builds tiny-llava for every target and precision again, and writes the record
    python -m export.support --output docs/support.md

What is refused comes from the checks of a build (`export.build.obstacles`), what was built from a record that a build wrote: nothing in the
table is said by hand. Building takes about four minutes, needs TensorRT for RTX and no GPU. Nothing is run.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.command_line import CommandParser, run_command

if TYPE_CHECKING:
    from export.plan import BuildPlan

MODEL = "tiny-llava"
RECORD = Path("docs/results/support.json")
GRAPHS = ("vision", "pre_ecl", "score", "post_ecl")
EXPORTED, BUILT, PARSED = "exported here", "built here", "parsed here, built on device"
WORDS = {"onnxruntime": EXPORTED, "onnxruntime-cuda": EXPORTED, "tensorrt-rtx": BUILT, "tensorrt": PARSED}
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One target and precision: `reason` why it is refused (None: it is not), or a word for each of `GRAPHS`."""

    target: str
    precision: str
    reason: str | None
    cells: tuple[str, ...] = ()


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m export.support", description="What can be built for which target and precision.")
    parser.add_argument("--build", action="store_true", help="build all of it and write the record")
    parser.add_argument("--record", type=Path, default=RECORD, metavar="FILE", help=f"what was built (default: {RECORD})")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table as a document instead of printing it")
    return parser


def plans() -> Iterator[BuildPlan]:
    """A plan of the shipped model for every target, in each precision that the target offers."""
    import dataclasses

    from export.configs import list_targets, load_target_config
    from export.plan import BuildOptions, make_plan

    plan = make_plan(BuildOptions(MODEL))
    for name in list_targets():
        target = load_target_config(name)
        if target.name == name:
            for precision in target.precisions:
                yield dataclasses.replace(plan, target=target, precision=precision)


def rows(record: Record) -> Iterator[Row]:
    """The table's rows."""
    from export.build import obstacles

    for plan in plans():
        name, precision = plan.target.name, plan.precision
        reasons = obstacles(plan)
        if reasons:
            yield Row(name, precision, reasons[0].partition(":")[0])
            continue
        done = record.get("built", {}).get(f"{name} {precision}", {})
        yield Row(name, precision, None, tuple(_word(plan.target.engine, done.get(graph)) for graph in GRAPHS))


def _word(engine: str, found: Record | None) -> str:
    if found is None:
        return "not tried yet"
    return WORDS[engine] if found["failed"] is None else f"failed: {found['failed']}"


# ---------------------------------------------------------------- building


def build_all() -> Record:
    """Builds whatever is not refused; graphs that two targets have alike are built once for the same chips."""
    from export.build import obstacles

    built: Record = {}
    known: dict[tuple[Any, ...], Record] = {}
    versions = _versions()
    with tempfile.TemporaryDirectory(prefix="support-") as folder:
        for plan in plans():
            if not obstacles(plan):
                name = f"{plan.target.name} {plan.precision}"
                print(f"  {name}", file=sys.stderr, flush=True)
                built[name] = _build(plan, Path(folder) / name.replace(" ", "-"), known)
    return {"date": datetime.date.today().isoformat(), "model": MODEL, **versions, "built": built}


def _build(plan: BuildPlan, bundle: Path, known: dict[tuple[Any, ...], Record]) -> Record:
    """One target and precision: what became of each graph. (Writing the bundle has checked a Jetson's operators.)"""
    from export.build import build_bundle
    from runtime.engine_files import CompileOptions, build_graph
    from runtime.errors import EngineError

    manifest, target = build_bundle(plan, bundle), plan.target
    chips = tuple(int(text.replace(".", "")) for text in target.compute_capabilities) if target.engine == "tensorrt-rtx" else (86,)
    done: Record = {}
    for name, graph in manifest.graphs.items():
        key = (manifest.files[graph.file].sha256, manifest.files[manifest.weight_files[0]].sha256, chips)
        if not target.engine.startswith("tensorrt"):
            known[key] = {"failed": None}
        elif key not in known:
            try:
                engine = build_graph(bundle, manifest, name, CompileOptions("tensorrt_rtx", chips))
                known[key] = {"failed": None, "engine_bytes": engine.file.bytes, "attention_kernels": engine.info.attention_kernels}
            except EngineError as error:
                known[key] = {"failed": str(error)}
        done[name.partition(".")[0]] = known[key]
    for file in bundle.glob("*.engine"):
        file.unlink()
    return done


def _versions() -> Record:
    from runtime.engines.tensorrt_library import load_library
    from runtime.machine import installed

    return {"tensorrt_rtx": load_library("tensorrt_rtx").__version__, "onnx": installed("onnx")}


# ---------------------------------------------------------------- the document


def document(record: Record) -> str:
    """The table in Markdown, with the reasons below it."""
    library, date = record.get("tensorrt_rtx", "(not recorded)"), record.get("date", "no date")
    lines = [
        "# What is built for which device", "",
        f"Printed by `python -m export.support` from the checks of a build and a record of {date}: {MODEL} for every target and precision,",
        f"with TensorRT for RTX {library} on a machine without a GPU. **Built and parsed, not run.**", "",
        "| word | means |",
        "|---|---|",
        "| built here | an engine for the target's chips was built, on any x86-64 machine |",
        "| parsed here, built on device | its operators and types are TensorRT 10.1's; TensorRT for RTX built it for SM86 as rehearsal |",
        "| exported here | an ONNX graph; nothing is compiled |",
        "| refused | a build ends with this reason before it writes anything |", "",
        f"| target | precision | {' | '.join(GRAPHS)} |", f"|---|---|{'---|' * len(GRAPHS)}",
    ]  # fmt: skip
    for (target, _, _), group in itertools.groupby(rows(record), key=_alike):
        same = list(group)
        reason, cells = same[0].reason, " | ".join(same[0].cells)
        if reason is not None:
            told = reason if len(same) == 1 else reason.replace(same[0].precision, "these")
            cells = f"refused: {told}" + " |" * (len(GRAPHS) - 1)
        lines.append(f"| {target} | {', '.join(row.precision for row in same)} | {cells} |")
    return "\n".join(
        [*lines, "", "A precision that is not listed is not offered for the target (`python -m export.build --list-targets`).", ""]
    )


def _alike(row: Row) -> tuple[str, str | None, tuple[str, ...]]:
    """What rows of one line have in common; a reason that names the precision is the same for all of them."""
    return row.target, row.reason and row.reason.replace(row.precision, "these"), row.cells


def read_record(path: Path) -> Record:
    """A record as `--build` wrote it; empty where there is none.

    Raises:
        UsageError: it is something else.
    """
    from runtime.errors import UsageError

    if not path.exists():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a record of builds ({error}): write it anew with --build") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("built"), dict):
        raise UsageError(f"{path} is not a record of builds: write it anew with --build")
    return raw


def _run(args: argparse.Namespace) -> int:
    from runtime.files import write_file

    if args.build:
        with contextlib.redirect_stdout(sys.stderr):
            record = build_all()
        write_file(args.record, (json.dumps(record, indent=1) + "\n").encode())
    text = document(read_record(args.record))
    if args.output is None:
        print(text, end="")
    else:
        write_file(args.output, text.encode())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
