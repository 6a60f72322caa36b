"""A summary as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu.latency import STAGES
from runtime.units import format_bytes

ROWS = (*STAGES, "first_token", "per_token", "decode", "total")
TITLES = {
    "first_token": "time to first token",
    "decode": "a decode step of it",
    "per_token": "time per further token",
    "total": "whole answer",
}


def describe(gathered: dict[str, Any], picture: str) -> str:
    """The whole document."""
    parts = [*_head(gathered), *_backends(gathered), f"![latency by stage, and speed against FLOPs]({picture})", ""]
    for backend, found in gathered["latency"].items():
        parts += [*_latency(backend, found), ""]
    for backend, found in gathered["transformers"].items():
        parts += [*_transformers(backend, found), ""]
    parts += [*_parity(gathered["parity"]), "", *_memory(gathered), "", *_engines(gathered["engines"]), *_rest(gathered)]
    return "\n".join(parts).rstrip() + "\n"


def _head(gathered: dict[str, Any]) -> Iterator[str]:
    bundle, gpu, machine = gathered["bundle"], gathered["gpu"], gathered["machine"]
    if "note" in gathered:
        yield f"**{gathered['note']}**"
        yield ""
    yield f"# {gathered['device']}, {gathered['date'][:10]}"
    yield ""
    if gpu is not None:
        yield (
            f"{gpu['name']}, compute capability {gpu['capability'] / 10:.1f}, {format_bytes(gpu['memory_bytes'])}; driver {gpu['driver']}, "
            f"CUDA up to {gpu['cuda']}; {machine['cpu']}, {machine['cores']} cores; {machine['system']}."
        )
    if bundle is not None:
        yield (
            f"Model: {bundle['model']}'s shape, {bundle['layers']} layers of {bundle['hidden_size']}, {bundle['source']}, "
            f"{bundle['precision']}, split before layer {bundle['split_layer']}, {bundle['visual_tokens']} visual tokens, "
            f"score {bundle['score_mode']}; {format_bytes(bundle['bytes'])}, exported in {bundle['export_seconds']:.0f} s."
        )
    wanted = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")
    versions = [f"{name} {v}" for name, v in gathered["versions"].items() if name.lower().replace("_", "-").startswith(wanted)]
    yield f"Python {gathered['versions']['python']}, {', '.join(versions)}. Printed by:"
    yield ""
    yield "```"
    yield from gathered["commands"]
    yield "```"
    yield ""


def _backends(gathered: dict[str, Any]) -> Iterator[str]:
    yield from _table(("backend", "runs here"), [
        (name, "yes" + _chips(found) if found["runs"] else f"no: {found['reason']}") for name, found in gathered["backends"].items()
    ])  # fmt: skip
    yield ""


def _chips(found: dict[str, Any]) -> str:
    chips = found.get("engine_capabilities")
    return f", with engines for {', '.join(f'SM{c}' for c in chips)}" if chips else ""


def _latency(backend: str, found: dict[str, Any]) -> Iterator[str]:
    yield f"## {backend}: one image of {found['visual_tokens']} visual tokens and {found['text_tokens']} text tokens"
    yield ""
    yield (
        f"Milliseconds, median (p90); {found['rounds']} rounds with a new image each, all settings in turn, {found['new_tokens']} tokens "
        "generated."
    )
    yield ""
    keeps = list(found["times_ms"])
    rows = [(TITLES.get(row, row), *(_cell(found["times_ms"][keep][row]) for keep in keeps)) for row in ROWS]
    yield from _table(("", *(f"keep {keep}" for keep in keeps)), rows)
    yield ""
    yield "Keeping all over keeping some, median of pairs [95 % interval]; realised: of the FLOPs ratio of the decoder's prefill."
    yield ""
    yield from _table(
        ("keep", "decoder prefill", "FLOPs", "realised", "first token", "further token", "whole answer", "score, of dense prefill"),
        [
            (keep, _ratio(r["decoder"]), f"{r['flops_ratio']:.3f}", _ratio(r["realised"]), _ratio(r["first_token"]), _ratio(r["per_token"]),
             _ratio(r["total"]), f"{r['score_share']['median']:.2%} ({r['score_ms']:.3f} ms)")
            for keep, r in found["against_all"].items()
        ],
    )  # fmt: skip


def _transformers(backend: str, found: dict[str, Any]) -> Iterator[str]:
    yield f"## transformers against {backend}, in the same run"
    yield ""
    versions = found["versions"]
    yield (
        f"{found['dtype']}, torch {versions['torch']}, transformers {versions['transformers']}; {found['rounds']} rounds. "
        f"From pixels to the first token, and per further token; compiled: {versions['compiler']}."
    )
    if found["compile_refused"]:
        yield f"torch.compile was left out: {found['compile_refused']}"
    yield ""
    yield from _table(
        ("milliseconds, median (p90)", "to the first token", "further token"),
        [(name, _cell(t["prefill"]), _cell(t["per_token"])) for name, t in found["times_ms"].items()],
    )
    yield ""
    yield from _table(
        ("times as fast", "to the first token", "further token"),
        [(name, _ratio(r["prefill"]), _ratio(r["per_token"])) for name, r in found["ratios"].items()],
    )


def _parity(parity: dict[str, Any]) -> Iterator[str]:
    if not parity:
        return
    yield "## Against the CPU chain (tiny-llava)"
    yield ""
    rows = [
        (backend, precision, f"{f['same_kept_tokens']} of {f['images']} images", f"{f['largest_logits_error']:.1e} ({f['tolerance']:.0e})",
         f"{f['same_answers']} of {f['comparable_answers']}", "agrees" if f["agrees"] else "**differs**")
        for backend, found in parity.items() for precision, f in found.items() if isinstance(f, dict)
    ]  # fmt: skip
    yield from _table(("backend", "", "same kept tokens", "logits' largest error (tolerance)", "same greedy answers", ""), rows)


def _memory(gathered: dict[str, Any]) -> Iterator[str]:
    yield "## Memory"
    yield ""
    rows = [
        (
            row["what"],
            "-" if row["loaded_bytes"] is None else format_bytes(row["loaded_bytes"]),
            format_bytes(row["most_bytes"]),
            row["source"],
        )
        for row in gathered["memory"]
    ]
    yield from _table(("", "loaded", "after all runs", "as told by"), rows)


def _engines(engines: dict[str, Any]) -> Iterator[str]:
    for library, found in engines.items():
        ratio = "" if found["weights_ratio"] is None else f", {found['weights_ratio']:.3f} times the bundle's weights"
        yield f"Engines of {library}: {len(found['engines'])} in {found['seconds']:.0f} s{ratio}."
        yield ""


def _rest(gathered: dict[str, Any]) -> Iterator[str]:
    for name, reason in gathered["left_out"].items():
        yield f"- {name} left out: {reason}"
    for name in gathered["not_run"]:
        yield f"- {name}: not run"


def _cell(times: dict[str, Any]) -> str:
    return "-" if times["p99_ms"] == 0 else f"{times['median_ms']:.2f} ({times['p90_ms']:.2f})"


def _ratio(ratio: dict[str, Any]) -> str:
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"
