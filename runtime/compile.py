"""`python -m runtime.compile BUNDLE`: builds the engines of a bundle's graphs and records them in its manifest.

    python -m runtime.compile BUNDLE                                             # on the device, with its TensorRT
    python -m runtime.compile BUNDLE --library tensorrt_rtx --capability 86,89   # for RTX 30 and 40 cards; no GPU needed

Needs numpy and the engine library. The engines lie beside the graphs; a compile that fails or is stopped leaves the bundle as it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.command_line import CommandParser, run_command

if TYPE_CHECKING:
    from runtime.engines.tensorrt_builder import BuiltEngine
    from runtime.manifest import Manifest

MAX_WEIGHTS_RATIO = 1.05
RTX_CAPABILITIES = (80, 86, 89, 120)  # in one engine: RTX 30, 40 and 50 cards, A100; a further one costs a few kilobytes


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m runtime.compile", description="Build the engines of a bundle for TensorRT.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--library", choices=("tensorrt", "tensorrt_rtx"), help="default: the one that is installed, tensorrt first")
    parser.add_argument("--target", metavar="T", help="of a bundle for several targets (default: the first that the library is for)")
    parser.add_argument(
        "--capability", type=_capabilities, metavar="C[,C...]",
        help=f"compute capabilities for tensorrt_rtx, 86 for 8.6 (default: {','.join(map(str, RTX_CAPABILITIES))})",
    )  # fmt: skip
    parser.add_argument("--text-tokens", type=int, default=256, metavar="T", help="the longest text that runs in one piece (default: 256)")
    parser.add_argument("--images", type=int, default=1, metavar="I", help="images of a message that run in one piece (default: 1)")
    parser.add_argument("--capacity", type=int, metavar="C", help="tokens in either cache (default: the bundle's maximum context)")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is the result as one JSON object")
    return parser


def _capabilities(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part.strip().lower().removeprefix("sm").replace(".", "")) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of compute capabilities such as 86 or 86,89,120") from error
    return tuple(dict.fromkeys(found))


def _run(args: argparse.Namespace) -> int:
    from runtime.engine_files import CompileOptions, chosen_target, compile_bundle
    from runtime.engine_memory import describe_measured
    from runtime.engines.tensorrt_library import installed_library, load_library
    from runtime.engines.tensorrt_profiles import ProfileOptions
    from runtime.manifest import read_manifest

    profiles = ProfileOptions(args.text_tokens, args.images, args.capacity)
    manifest = read_manifest(args.bundle)  # what is wrong with it is told first
    if args.target is not None:
        manifest.variant(args.target)
    library = args.library or installed_library()
    load_library(library)
    capabilities = args.capability if args.capability is not None else RTX_CAPABILITIES if library == "tensorrt_rtx" else ()
    options = CompileOptions(library, capabilities, profiles, args.target)
    manifest = chosen_target(manifest, options)
    engines = compile_bundle(args.bundle, options, _tell)
    print(describe(engines))
    memory = read_manifest(args.bundle).variant(manifest.target).memory
    if memory is not None and memory.measured:
        print("\n".join(describe_measured(memory)))
    ratio = weights_ratio(manifest, engines)
    if ratio is not None:
        twice = "" if ratio <= MAX_WEIGHTS_RATIO else f", more than {MAX_WEIGHTS_RATIO}: some of them are stored again for another profile"
        print(f"the engines hold {ratio:.3f} times the bundle's weights{twice}")
    if args.json:
        print(json.dumps({**summary(engines), "weights_ratio": ratio}))
    return 0


def _tell(graph: str, built: BuiltEngine | None) -> None:
    if built is None:
        print(f"  {graph}: building", file=sys.stderr, flush=True)


def describe(engines: Sequence[BuiltEngine]) -> str:
    """The engines as a table."""
    from runtime.units import format_bytes

    first = engines[0].info
    chips = ", ".join(f"SM{c}" for c in first.capabilities) or "this device"
    lines = [f"{first.library} {first.library_version} for {chips}"]
    lines.append(f"  {'graph':<12}{'engine':>10}{'weights':>10}{'activations':>13}{'built in':>10}{'peak memory':>13}  fused attention")
    for engine in engines:
        info, memory = engine.info, engine.info.peak_rss_bytes
        weights = "-" if info.weights_bytes is None else format_bytes(info.weights_bytes)
        activations = format_bytes(max(info.activation_bytes)) if info.activation_bytes else "-"
        kernels = ", ".join(map(str, info.attention_kernels)) or "-"
        lines.append(
            f"  {info.graph:<12}{format_bytes(engine.file.bytes):>10}{weights:>10}{activations:>13}{info.build_seconds:>8.1f} s"
            f"{'-' if memory is None else format_bytes(memory):>13}  {kernels}"
        )
    return "\n".join(lines)


def weights_ratio(manifest: Manifest, engines: Sequence[BuiltEngine]) -> float | None:
    """Bytes of weights in the engines over those of the bundle's weight files; None where the library does not log them.

    Needs no allowance for kernels and tables, whose bytes are an engine's too. 1.0 is every weight once.
    """
    held = [engine.info.weights_bytes for engine in engines]
    files = sum(manifest.files[name].bytes for name in manifest.weight_files)
    return None if None in held or not files else sum(count or 0 for count in held) / files


def summary(engines: Sequence[BuiltEngine]) -> dict[str, Any]:
    """The engines as plain data."""
    import dataclasses

    return {"engines": [{**dataclasses.asdict(e.info), "bytes": e.file.bytes, "sha256": e.file.sha256} for e in engines]}


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
