"""`python -m runtime.generate`: one answer from the command line, streamed as it is made.

    python -m runtime.generate --bundle bundles/tiny-llava-cpu --image scene.png --prompt "what is at row 2 column 3?"

Text goes to stdout, statistics to stderr; with --json the last line of stdout is one object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.backends import add_backend_options
from runtime.command_line import CommandParser, keep_argument, run_command

if TYPE_CHECKING:
    from runtime.generation import Generation
    from runtime.pipeline import VisionLanguageModel


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m runtime.generate", description="Answer a question about images with a bundle.")
    parser.add_argument("--bundle", type=Path, required=True, help="directory made by python -m export.build")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; repeat for several, in order")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    parser.add_argument(
        "--keep",
        type=keep_argument,
        metavar="R|all|auto",
        help="visual tokens kept after the split; auto: chosen for each image (default: the bundle's first budget)",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N")
    parser.add_argument("--do-sample", action="store_true", default=None, help="sample instead of taking the most probable token")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text; repeatable")
    parser.add_argument("--threads", type=int, help="engine threads (default: one per core)")
    add_backend_options(parser)
    parser.add_argument("--picture", type=Path, metavar="PNG", help="write the images with their kept patches and entropy")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


def summary(result: Generation) -> str:
    """Figures of one answer in two lines."""
    stages = ", ".join(f"{name} {ms:.1f}" for name, ms in result.stages_ms.items())
    chosen = f" (budget chosen: {', '.join(map(str, result.auto_budgets))})" if result.auto_budgets else ""
    return (
        f"{result.prompt_tokens} prompt tokens, {result.kept_tokens} of {result.visual_tokens} visual tokens kept{chosen}; "
        f"first token after {result.ttft_ms:.1f} ms, then {result.tpot_ms:.1f} ms per token\nms by stage: {stages}"
    )


def _run(args: argparse.Namespace) -> int:
    from runtime.pipeline import load

    if args.picture:
        _check_picture(args.picture, args.image)
    vlm = load(args.bundle, threads=args.threads, backend=args.backend, device_index=args.device)
    user = {"role": "user", "content": [*({"type": "image"} for _ in args.image), {"type": "text", "text": args.prompt}]}
    messages = [{"role": "system", "content": [{"type": "text", "text": args.system}]}, user] if args.system else [user]
    stream = vlm.stream(
        messages, args.image, keep=args.keep, max_new_tokens=args.max_new_tokens, do_sample=args.do_sample, temperature=args.temperature,
        top_k=args.top_k, top_p=args.top_p, repetition_penalty=args.repetition_penalty, seed=args.seed, stop_strings=args.stop,
    )  # fmt: skip
    for i, piece in enumerate(stream):
        print(piece.lstrip() if i == 0 else piece, end="", flush=True)
    print()
    result = stream.result
    print(f"{summary(result)}\nbackend: {vlm.backend}, {vlm.chain.executor.label}", file=sys.stderr)
    if args.picture:
        _write_picture(vlm, args, result)
    if args.json:
        print(json.dumps({**result.to_dict(), "backend": vlm.backend}))
    return 0


def _check_picture(path: Path, images: Sequence[str]) -> None:
    from runtime.errors import UsageError

    if not images:
        raise UsageError("--picture needs an --image to draw")
    if path.suffix.lower() != ".png":
        raise UsageError(f"--picture {path}: a PNG is written, give a name that ends in .png")
    if not path.parent.is_dir():
        raise UsageError(f"--picture {path}: there is no directory {path.parent}, make it first")


def _write_picture(vlm: VisionLanguageModel, args: argparse.Namespace, result: Generation) -> None:
    from runtime.picture import draw_selection, save_picture

    save_picture(draw_selection(vlm, args.image, result, args.prompt), args.picture)
    print(f"picture: {args.picture}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
