"""`python -m runtime.inspect`: what a bundle holds and needs, in words, and where its figures come from.

    python -m runtime.inspect bundles/tiny-llava-cpu
    python -m runtime.inspect BUNDLE --json --no-hashes

Loads no engine: manifest, files and verify.json alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.command_line import CommandParser, run_command

if TYPE_CHECKING:
    from runtime.inspection import Inspection
    from runtime.manifest import Manifest


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m runtime.inspect", description="Say what a bundle holds and what it needs.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--no-hashes", action="store_true", help="compare the files' sizes only")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is the same as one JSON object")
    return parser


def _run(args: argparse.Namespace) -> int:
    from runtime.errors import BundleError
    from runtime.inspection import inspect_bundle

    found = inspect_bundle(args.bundle, hashes=not args.no_hashes)
    print(describe(found))
    if args.json:
        print(json.dumps(found.to_dict()))
    wrong = [check.problem for check in found.files if check.problem]
    if wrong:
        raise BundleError("; ".join(wrong))
    return 0


def describe(found: Inspection) -> str:
    """The whole text."""
    parts = [
        *_facts(found),
        "",
        *_needs(found),
        "",
        *_here(found),
        "",
        *_flops(found),
        "",
        *_graphs(found),
        "",
        *_files(found),
        "",
        *_verification(found),
    ]
    return "\n".join(parts)


def _facts(found: Inspection) -> list[str]:
    from runtime.inspection import SCORE_WORDS
    from runtime.manifest import TARGETS_SCHEMA

    m, g = found.manifest, found.manifest.geometry
    budgets = ", ".join(f"keep {b.keep} of {g.visual_tokens} ({b.average_keep:.1f} on average over the layers)" for b in found.budgets)
    rows = [
        ("bundle", f"{found.bundle}, schema {m.schema_version}, made {m.created} by version {m.tool_version}"),
        (
            "model",
            f"{m.model} (family {m.family}) for target{'s' if m.variants else ''} {', '.join(m.targets)}, weights in {_precisions(m)}",
        ),
        *(("target", _target_words(m.variant(target))) for target in m.targets if m.schema_version >= TARGETS_SCHEMA),
        ("source", f"checkpoint {m.source.checkpoint}, revision {m.source.revision}"),
        (
            "decoder",
            f"{g.layers} layers of {g.hidden_size}; {g.query_heads} query and {g.kv_heads} key-value heads of {g.head_size}; "
            f"vocabulary of {g.vocab_size}",
        ),
        ("image", f"{g.visual_tokens} visual tokens each, in place of {m.image_token} (id {m.image_token_id})"),
        ("split", f"layers 0..{m.split_layer - 1} see every token, layers {m.split_layer}..{g.layers - 1} text and the kept ones"),
        ("score", f"{m.score_mode}: {SCORE_WORDS[m.score_mode]}"),
        ("budgets", f"{budgets}; the first is the default, and all can be kept"),
        *([] if m.auto_keep is None else [("per image", _auto_words(m.auto_keep))]),
        ("context", f"{m.max_context} tokens, prompt and answer together"),
    ]
    return [f"{name:<10}{text}" for name, text in rows]


def _precisions(m: Manifest) -> str:
    return ", ".join(dict.fromkeys(m.variant(target).precision for target in m.targets))


def _target_words(m: Manifest) -> str:
    """One target: what runs it, its precision, how it writes the cache, and its engines."""
    libraries = {f"{e.library} {e.library_version} for {', '.join(f'SM{c}' for c in e.capabilities) or 'one device'}" for e in m.engines}
    compiled = f"; engines of {', '.join(sorted(libraries))}" if libraries else ""
    return f"{m.target}: {m.engine or 'onnxruntime'}, {m.precision}, the cache is written by {m.kv_write}{compiled}"


def _auto_words(threshold: float) -> str:
    return (
        f"keep auto chooses a budget for the images of each message: the smallest that holds {100 * threshold:g} % of the scores' mass "
        "(scores less the lowest), the largest where none does"
    )


def _needs(found: Inspection) -> list[str]:
    from runtime.units import format_bytes

    m = found.manifest
    here = "not installed here" if found.engine_version is None else f"here: {found.engine_version}"
    lines = [f"Needs ONNX Runtime ({here}) with numpy, tokenizers, Pillow and Jinja; neither torch nor the checkpoint"]
    for target, needs in {m.target: found.memory, **found.memory_of_others}.items():
        which = f" on {target}" if m.variants else ""
        lines += [
            f"Memory{which}, one conversation with one image at the full context of {m.max_context} tokens",
            f"  {'':<38}" + "".join(f"{name:>14}" for name in (_setting(need.keep) for need in needs)),
        ]
        rows = (
            ("weights", [n.weights_bytes for n in needs]),
            ("KV cache before the split", [n.kv_pre_bytes for n in needs]),
            ("KV cache after the split", [n.kv_post_bytes for n in needs]),
            ("token table (mapped, read row by row)", [n.embedding_bytes for n in needs]),
            ("sum", [n.total_bytes for n in needs]),
        )
        lines += [f"  {name:<38}" + "".join(f"{format_bytes(value):>14}" for value in values) for name, values in rows]
        memory = m.variant(target).memory
        if memory is not None:
            words = f"planned when it was built for {target}, with activations and the process, keep {memory.keep}"
            lines.append(f"  {format_bytes(memory.total_bytes)} {words}")
    return [
        *lines,
        "  from the files' sizes and the geometry; activations and copies that the engine packs come on top: runtime.profile measures",
    ]


def _here(found: Inspection) -> list[str]:
    """Which engine libraries can run it on this machine."""
    cpu = (
        "no: not installed, pip install onnxruntime" if found.engine_version is None else f"{found.engine_version} is installed, on the CPU"
    )
    rows = [
        ("onnxruntime", cpu),
        *((backend.library, ("yes: " if backend.ready else "no: ") + backend.words) for backend in found.backends),
    ]
    return ["Runs on this machine with", *(f"  {name:<14}{words}" for name, words in rows)]


def _flops(found: Inspection) -> list[str]:
    from runtime.flops import COUNTED_TEXT_TOKENS
    from runtime.units import format_flops

    if not found.flops:
        return ["FLOPs: the bundle records none"]
    lines = [
        f"FLOPs of one prefill, one image and {COUNTED_TEXT_TOKENS} text tokens",
        f"  {'':<30}" + "".join(f"{_setting(column.keep):>14}" for column in found.flops),
    ]
    for i, stage in enumerate(found.flops[0].stages):
        lines.append(f"  {stage.words:<30}" + "".join(f"{format_flops(column.stages[i].flops):>14}" for column in found.flops))
    shares = "".join(f"{column.decoder_share:>14.1%}" for column in found.flops)
    return [
        *lines, f"  {'decoder, share of keep all':<30}{shares}",
        "  counted in the exported graphs when the bundle was built: matrix products, a multiply-add is 2; the score's arithmetic too",
    ]  # fmt: skip


def _setting(keep: int | None) -> str:
    return "keep all" if keep is None else f"keep {keep}"


def _graphs(found: Inspection) -> list[str]:
    from runtime.inspection import tensor_rows

    lines, told = ["Graphs"], set[str]()
    for target in found.manifest.targets:
        for name, graph in found.manifest.variant(target).graphs.items():
            if graph.file in told:
                continue
            told.add(graph.file)
            lines.append(f"  {name}  ({graph.file})")
            for direction, tensors in (("in", graph.inputs), ("out", graph.outputs)):
                for tensor in tensor_rows(tensors):
                    lines.append(f"    {direction:<5}{tensor.name:<34}{tensor.dtype:<9}[{', '.join(map(str, tensor.shape))}]")
    return lines


def _files(found: Inspection) -> list[str]:
    from runtime.units import format_bytes

    total = sum(check.bytes for check in found.files)
    how = "size and SHA-256 as recorded" if found.hashes else "size as recorded, SHA-256 not compared"
    lines = [f"Files: {len(found.files)}, {format_bytes(total)}"]
    return [*lines, *(f"  {check.name:<28}{format_bytes(check.bytes):>10}  {check.problem or how}" for check in found.files)]


def _verification(found: Inspection) -> list[str]:
    return ["Comparison with the source, from verify.json", f"  {found.verification.words}"]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
