"""`python -m export.support`: what can be built for which target in which precision, graph by graph, as a Markdown table.

Asks the code that decides: the same plan and the same obstacles as `export.build`, for the shipped model, which fits everywhere. That the
cells are true is shown by tests: `tests/test_tensorrt_engines.py`, `tests/test_real_widths.py` and `tests/export/test_engine_targets.py`
build and rehearse such engines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from runtime.command_line import CommandParser, run_command

if TYPE_CHECKING:
    from export.targets import TargetConfig

MODEL = "tiny-llava"
CELLS = {
    "onnxruntime": "runs as exported",
    "onnxruntime-cuda": "runs as exported",
    "tensorrt-rtx": "built here",
    "tensorrt": "parsed here, built on device",
}
NOT_OFFERED = "refused: the target has no {precision}"
NOT_IMPLEMENTED = "refused: {precision} is not implemented yet"


def build_parser() -> argparse.ArgumentParser:
    return CommandParser(prog="python -m export.support", description="What can be built, for which target, in which precision.")


def cell(target: TargetConfig, precision: str) -> str:
    """What `export.build` does for a target and a precision."""
    from export.build import obstacles
    from export.plan import BuildOptions, make_plan

    if precision not in target.precisions:
        return NOT_OFFERED.format(precision=precision)
    refused = obstacles(make_plan(BuildOptions(MODEL, target=target.name, precision=precision)))
    return NOT_IMPLEMENTED.format(precision=precision) if refused else CELLS[target.engine]


def table() -> Iterator[str]:
    """The lines of the table: a row for each target and precision, a column for each graph."""
    from export.configs import list_targets, load_target_config
    from export.precision import SCHEMES

    yield "| target | precision | `vision` | `pre_ecl` | `score` | `post_ecl` |"
    yield "|---|---|---|---|---|---|"
    for name in list_targets():
        target = load_target_config(name)
        if name != target.name:
            yield f"| {name} | | as {target.name} | | | |"
            continue
        for precision in SCHEMES:
            found = cell(target, precision)
            score = found if found.startswith("refused") else f"{found}, fp32 within"
            yield f"| {name} | {precision} | {found} | {found} | {score} | {found} |"


def _run(args: argparse.Namespace) -> int:
    sys.stdout.write("\n".join(table()) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
