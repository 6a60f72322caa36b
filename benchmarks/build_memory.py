"""How much memory an export takes, and a session on what it wrote: the two constants of the memory plan that a CPU can measure.

    python -m benchmarks.build_memory                          # a random LLaVA: 4 layers of 2048, vocabulary of 32064
    python -m benchmarks.build_memory --hidden 1024 --layers 8

Linux only. Each step runs in a process of its own; peaks are the kernel's (VmHWM). The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.command_line import CommandParser, run_command

STATUS = """
import json, math, sys
from pathlib import Path
def memory(entry):
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(parts[1]) * 1024 for parts in lines if parts[0] == entry)
"""
EXPORT = """
import export.graphs.clip, export.graphs.decoder, export.graphs.score
from export.build import build_bundle
from export.plan import BuildOptions, make_plan
plan = make_plan(BuildOptions("llava15", checkpoint=sys.argv[1], keep=(4,)))
before = memory("VmHWM:")
build_bundle(plan, Path(sys.argv[2]))
largest = max(4 * math.prod(plan.weights.shape(name)) for name in plan.weights.names())
print(json.dumps({"export_process_bytes": before, "export_peak_bytes": memory("VmHWM:"), "largest_tensor_bytes": largest}))
"""
LOAD = """
from runtime.pipeline import load
process, private, mapped = memory("VmRSS:"), memory("RssAnon:"), memory("RssFile:")
vlm = load(Path(sys.argv[1]))
print(json.dumps({
    "runtime_process_bytes": process, "loaded_private_bytes": memory("RssAnon:") - private,
    "loaded_mapped_bytes": memory("RssFile:") - mapped, "loading_peak_bytes": memory("VmHWM:") - process,
    "weights_bytes": sum(path.stat().st_size for path in Path(sys.argv[1]).glob("weights.*.bin")),
}))
"""


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m benchmarks.build_memory", description="Memory of an export and of a loaded bundle.")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the random decoder")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32064)
    return parser


def measure(hidden: int, layers: int, vocab: int) -> dict[str, Any]:
    """Makes a random checkpoint (float16), exports it, and loads the bundle.

    Returns:
        bytes, and `export_factor`: the export's rise over its largest tensor in float32; `loaded_factor`: private memory that
        a loaded bundle takes, over its weights.
    """
    from tests.models import tiny_llava_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
        tiny_llava_checkpoint(
            checkpoint, layers=layers, hidden=hidden, intermediate=hidden * 11 // 4, heads=hidden // 128, vocab=vocab, image_size=56,
            dtype="float16",
        )  # fmt: skip
        result = _run(EXPORT, str(checkpoint), str(bundle)) | _run(LOAD, str(bundle))
    rise = result["export_peak_bytes"] - result["export_process_bytes"]
    return result | {
        "export_factor": round(rise / result["largest_tensor_bytes"], 2),
        "loaded_factor": round(result["loaded_private_bytes"] / result["weights_bytes"], 2),
    }


def _run(code: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", STATUS + code, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _main(args: argparse.Namespace) -> int:
    from runtime.units import format_bytes

    result = measure(args.hidden, args.layers, args.vocab)
    for name, value in result.items():
        print(f"{name:<24}{format_bytes(value) if name.endswith('_bytes') else value:>12}")
    print(json.dumps(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _main, argv)


if __name__ == "__main__":
    raise SystemExit(main())
