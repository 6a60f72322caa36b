"""`python -m runtime.profile`: how long each stage of a bundle takes on this machine, pruned against unpruned.

    python -m runtime.profile --bundle bundles/tiny-llava-cpu
    python -m runtime.profile --bundle DIR --runs 100 --images photos --prompt "what is in this picture?" --json

Prints a table; writes profile.json and profile.png.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.backends import add_backend_options
from runtime.command_line import CommandParser, keep_argument, run_command

if TYPE_CHECKING:
    from runtime.profile_report import Profile

JSON_FILE, CHART_FILE = "profile.json", "profile.png"
LEAST_RUNS = 3  # fewer pairs give no interval


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m runtime.profile", description="Measure a bundle's latency, pruned against unpruned.")
    parser.add_argument("--bundle", type=Path, required=True, help="directory made by python -m export.build")
    parser.add_argument("--runs", type=int, default=50, help="pairs of runs that are counted (default: 50)")
    parser.add_argument("--warmup", type=int, default=5, help="pairs before them (default: 5)")
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="tokens generated in each run (default: 16)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="images to ask about (default: synthetic ones, each different)")
    parser.add_argument("--prompt", metavar="TEXT", help="the question (default: one of about 32 text tokens, as FLOPs are counted with)")
    parser.add_argument(
        "--keep", type=keep_argument, metavar="R", help="the budget compared with keeping all (default: the bundle's first)"
    )
    parser.add_argument("--threads", type=int, help="engine threads (default: one per core)")
    add_backend_options(parser)
    parser.add_argument("--output", type=Path, default=Path("profile"), metavar="DIR", help="where both files go (default: profile)")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is the profile as one JSON object")
    return parser


def _run(args: argparse.Namespace) -> int:
    from runtime.errors import UsageError

    for name, value, least in (("runs", args.runs, LEAST_RUNS), ("warmup", args.warmup, 0), ("max-new-tokens", args.max_new_tokens, 2)):
        if value < least:
            raise UsageError(f"--{name} is {value}: give {least} or more")
    profile = _measure(args)
    from runtime.profile_report import describe  # only now: importing is part of what was measured

    print(describe(profile))
    _write(args.output, profile)
    print(f"written: {args.output / JSON_FILE}, {args.output / CHART_FILE}")
    if args.json:
        print(json.dumps(profile.to_dict()))
    return 0


def _measure(args: argparse.Namespace) -> Profile:
    began = time.perf_counter()
    from runtime.engines.onnxruntime import ThreadPool
    from runtime.pipeline import load

    import_ms = (time.perf_counter() - began) * 1e3
    from runtime.flops import COUNTED_TEXT_TOKENS, decoder_flops
    from runtime.machine import Machine, peak_memory
    from runtime.profile_report import ColdStart, Memory, Subject, make_profile
    from runtime.profile_runs import ImageSupply, Profiler, first_token_ms, usual_question

    images = ImageSupply.from_folder(args.images) if args.images else ImageSupply()
    began = time.perf_counter()
    model = load(args.bundle, threads=args.threads, backend=args.backend, device_index=args.device)
    load_ms = (time.perf_counter() - began) * 1e3
    loaded, manifest, machine = peak_memory(), model.manifest, Machine.here(ThreadPool.size)
    keep = _budget(args.keep, manifest.budgets, manifest.geometry.visual_tokens)
    decoder_flops(manifest, keep, COUNTED_TEXT_TOKENS)  # before anything is measured: refuses a manifest without figures
    _prepare(args.output)
    cold = ColdStart(import_ms, load_ms, first_token_ms(model, keep, args.prompt))
    question = usual_question(model) if args.prompt is None else args.prompt
    total = args.runs + args.warmup
    rounds = Profiler(model, keep, question, args.max_new_tokens, images).measure(args.runs, args.warmup, _progress(total))
    backend = f"{model.backend}, {model.chain.executor.label}"
    subject = Subject.of(args.bundle, manifest, keep, question, images, rounds, args.warmup, backend)
    return make_profile(subject, manifest, rounds, cold, Memory.of(loaded, peak_memory()), machine)


def _budget(wanted: int | str | None, budgets: Sequence[int], visual_tokens: int) -> int:
    from runtime.errors import UsageError

    pruning = [budget for budget in budgets if budget < visual_tokens]
    if wanted is None and pruning:
        return pruning[0]
    held = ", ".join(map(str, pruning)) or "none"
    if wanted == "auto":
        raise UsageError(f"--keep auto has no one latency, it keeps another number for each image: profile its budgets one by one ({held})")
    if not isinstance(wanted, int) or wanted not in pruning:
        got = "" if wanted is None else f", not {wanted}"
        raise UsageError(f"budgets of this bundle below its {visual_tokens} visual tokens: {held}{got}; export it with another --keep")
    return wanted


def _progress(total: int) -> Callable[[int], None]:
    """A line on stderr that overwrites itself; silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        return lambda _: None

    def show(number: int) -> None:
        end = "\n" if number == total else ""
        print(f"\rpair {number} of {total}", end=end, file=sys.stderr, flush=True)

    return show


def _prepare(output: Path) -> None:
    """Makes the directory, before time is spent on measuring."""
    from runtime.errors import StorageError
    from runtime.files import check_writable

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the directory {output}: {error.strerror}; choose another --output") from error
    for name in (JSON_FILE, CHART_FILE):
        check_writable(output / name)


def _write(output: Path, profile: Profile) -> None:
    from runtime.chart import draw_profile
    from runtime.files import write_file

    png = io.BytesIO()
    draw_profile(profile).save(png, "PNG")
    write_file(output / CHART_FILE, png.getvalue())
    write_file(output / JSON_FILE, (json.dumps(profile.to_dict(), indent=2) + "\n").encode())


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
