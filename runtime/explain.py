"""`python -m runtime.explain`: what pruning kept of an image, as a picture and as a page that needs no network.

    python -m runtime.explain --bundle bundles/tiny-llava-cpu --image scene.png --prompt "read row 2." --html kept.html

Figures go to stdout in one line; with --json the last line of stdout is one object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.backends import add_backend_options
from runtime.command_line import CommandParser, keep_argument, run_command

if TYPE_CHECKING:
    from runtime.patch_map import Explanation


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m runtime.explain", description="Draw which visual tokens of images are kept, and every token's score."
    )
    parser.add_argument("--bundle", type=Path, required=True, help="directory made by python -m export.build")
    parser.add_argument("--image", action="append", required=True, metavar="FILE", help="an image, or a video's frame; repeat in order")
    parser.add_argument("--prompt", metavar="TEXT", help="a question to ask; what is kept does not depend on it")
    parser.add_argument(
        "--keep",
        type=keep_argument,
        metavar="R|all|auto",
        help="visual tokens kept, over all images; auto: chosen by their scores (default: the bundle's first budget)",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the picture")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page: hover over patches, try other budgets by score")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="the longest answer")
    parser.add_argument("--threads", type=int, help="engine threads (default: one per core)")
    add_backend_options(parser)
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


def _run(args: argparse.Namespace) -> int:
    from runtime.errors import UsageError
    from runtime.files import check_writable, write_file

    outputs = {option: path for option, path in (("png", args.png), ("html", args.html)) if path is not None}
    if not outputs:
        raise UsageError("nothing to write: give --png FILE, --html FILE or both")
    for option, path in outputs.items():
        if path.suffix.lower() not in (f".{option}", ".htm" if option == "html" else ""):
            raise UsageError(f"--{option} {path}: give a name that ends in .{option}, which is what is written")
        check_writable(path)
    if args.prompt is None and args.max_new_tokens is not None:
        raise UsageError("--max-new-tokens has no effect without a --prompt: leave it out, or ask something")
    explanation = _explain(args)
    print(explanation.figures)
    if args.png is not None:
        from runtime.picture import draw, save_picture

        save_picture(draw(explanation), args.png)
        print(f"picture: {args.png}")
    if args.html is not None:
        from runtime.picture_html import page

        write_file(args.html, page(explanation).encode())
        print(f"page: {args.html}")
    if args.json:
        print(json.dumps(_report(explanation)))
    return 0


def _explain(args: argparse.Namespace) -> Explanation:
    """Runs the prompt, or the images alone where there is none."""
    from runtime.patch_map import explanation_of
    from runtime.pipeline import load

    vlm = load(args.bundle, threads=args.threads, backend=args.backend, device_index=args.device)
    images = [{"type": "image"} for _ in args.image]
    if args.prompt is None:
        state = vlm.prefill([{"role": "user", "content": images}], args.image, keep=args.keep)
        return explanation_of(vlm, args.image, state)
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": args.prompt}]}]
    result = vlm.generate(messages, args.image, keep=args.keep, max_new_tokens=args.max_new_tokens)
    return explanation_of(vlm, args.image, result, args.prompt)


def _report(explanation: Explanation) -> dict[str, object]:
    """Plain data for JSON: kept tokens are counted within their image."""
    return {
        "visual_tokens": len(explanation.tokens),
        "kept_tokens": explanation.kept,
        "auto_budgets": list(explanation.auto_budgets),
        "split_layer": explanation.split_layer,
        "score_mode": explanation.score_mode,
        "score_range": explanation.score_range,
        "prompt": explanation.prompt,
        "answer": explanation.answer,
        "ttft_ms": None if explanation.ttft_ms is None else round(explanation.ttft_ms, 3),
        "images": [
            {"name": map_.name, "kept_tokens": map_.kept, "kept_indices": [i for i, patch in enumerate(map_.tokens) if patch.kept]}
            for map_ in explanation.maps
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
