"""`python -m benchmarks.gpu`: everything that has to be checked and measured on a machine with an NVIDIA GPU.

    python -m benchmarks.gpu                                     # all pieces, one after the other; what is done already is passed over
    python -m benchmarks.gpu --part latency                      # one part, or one piece of it: --part latency-cuda
    python -m benchmarks.gpu --rehearse --output DIR             # every step with a tiny model on the CPU, marked as that everywhere
    python -m benchmarks.gpu wheels DIR --part-size 60MB         # cuts a folder of wheels into parts, see benchmarks/gpu/README.md

Results are JSON, one file for each piece; the last part writes docs/results/DATE-gpu-DEVICE.json, .md and .png.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.command_line import CommandParser, run_command

DIFFERS = 1  # everything ran, and a backend differs from the CPU chain
OUTPUT = Path("out/gpu")


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m benchmarks.gpu", description="Check and measure on a machine with an NVIDIA GPU.")
    parser.add_argument(
        "--part", action="append", default=[], metavar="PART",
        help="environment, parity, bundles, latency, transformers or summary, or one of their pieces (default: all); may be repeated",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"where each piece's JSON goes (default: {OUTPUT})")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where bundles and engines go, 45 GB on a local disk (default: OUTPUT/work)"
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="where the summary goes (default: docs/results; OUTPUT in a rehearsal)")
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    parser.add_argument("--rehearse", action="store_true", help="a tiny random model on the CPU; needs --output")
    parser.add_argument("--device-index", type=int, default=0, metavar="I", help="which GPU (default: 0)")
    parser.add_argument("--runs", type=int, help="rounds that are counted, at most (default: 50; 3 in a rehearsal)")
    parser.add_argument("--seconds", type=float, default=300.0, help="when a piece stops counting rounds (default: 300)")
    parser.add_argument("--warmup", type=int, help="rounds before them (default: 5; 1 in a rehearsal)")
    parser.add_argument("--new-tokens", type=int, help="tokens generated in each answer (default: 32; 4 in a rehearsal)")
    parser.add_argument("--parity-images", type=int, help="scenes that backends are compared on (default: 16; 2 in a rehearsal)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    return parser


def _run(args: argparse.Namespace, command: str) -> int:
    from benchmarks.gpu.pieces import run_pieces
    from benchmarks.gpu.settings import RESULTS, Settings
    from runtime.errors import UsageError

    if args.rehearse and args.output is None:
        raise UsageError("--rehearse writes no results: name a folder for its files with --output")
    output = args.output or OUTPUT
    usual = {"runs": (50, 3), "warmup": (5, 1), "new_tokens": (32, 4), "parity_images": (16, 2)}
    numbers = {name: values[args.rehearse] if getattr(args, name) is None else getattr(args, name) for name, values in usual.items()}
    settings = Settings(
        output=output, work=args.work or output / "work", results=args.results or (output if args.rehearse else RESULTS),
        rehearse=args.rehearse, device_index=args.device_index, seconds=args.seconds, seed=args.seed, **numbers,
    )  # fmt: skip
    return 0 if run_pieces(settings, args.part, args.again, command) else DIFFERS


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["wheels"]:
        from benchmarks.gpu import wheels

        return wheels.main(arguments[1:])
    command = f"python -m benchmarks.gpu {shlex.join(arguments)}".rstrip()
    return run_command(build_parser(), lambda args: _run(args, command), arguments)


if __name__ == "__main__":
    raise SystemExit(main())
