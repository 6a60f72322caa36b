"""What a build tells the user: plan, sizes, FLOPs per stage dense and pruned, KV bytes; as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from export.flops import count_flops
from export.memory_plan import stored_bytes
from export.memory_table import describe_memory, memory_report
from export.plan import BuildPlan
from export.precision import scheme_of
from runtime import names
from runtime.flops import COUNTED_TEXT_TOKENS as TEXT_TOKENS
from runtime.manifest import GraphInfo, Manifest
from runtime.names import score_graph
from runtime.units import format_bytes, format_flops

__all__ = ["TEXT_TOKENS", "describe_plan", "describe_report", "format_bytes", "format_flops", "make_report", "stage_flops"]
_STAGE_WORDS = {
    "vision": "vision tower and projector", "pre_ecl": "decoder before the split", "score": "score",
    "post_ecl": "decoder after the split", "head": "language-model head",
}  # fmt: skip


def stage_flops(plan: BuildPlan, directory: Path, graphs: Mapping[str, GraphInfo]) -> dict[str, float]:
    """Matrix-product FLOPs of one prefill, counted from the graph files: one image, TEXT_TOKENS text tokens.

    Keys: vision, pre_ecl, head, post_ecl (dense: all visual tokens), and per budget `score.R`, `post_ecl.R`.
    """
    n, d = plan.visual_tokens, plan.spec.decoder

    def half(name: str, tokens: int) -> int:
        cached = 0 if plan.kv_write == names.APPEND else tokens  # attention then runs over the cache and the new rows
        return count_flops(directory / graphs[name].file, {"sequence": tokens, "capacity": cached}).matmul

    head = 2 * d.hidden_size * d.vocab_size * ((TEXT_TOKENS + n + 1) if plan.debug else 1)
    flops: dict[str, float] = {
        names.VISION: count_flops(directory / graphs[names.VISION].file, {"images": 1}).matmul,
        names.PRE_ECL: half(names.PRE_ECL, n + TEXT_TOKENS),
        names.POST_ECL: half(names.POST_ECL, n + TEXT_TOKENS) - head,
        "head": 2 * d.hidden_size * d.vocab_size,
    }
    for keep in plan.budgets:
        score = count_flops(directory / graphs[score_graph(keep)].file, {"N": n})
        flops[score_graph(keep)] = score.matmul + score.elementwise
        kept = half(names.POST_ECL, keep + TEXT_TOKENS)
        flops[f"{names.POST_ECL}.{keep}"] = kept - (2 * d.hidden_size * d.vocab_size * (TEXT_TOKENS + keep + 1) if plan.debug else head)
    return flops


def make_report(plan: BuildPlan, manifest: Manifest) -> dict[str, Any]:
    """The report as plain data (written to report.json)."""
    d, k, value = plan.spec.decoder, plan.split_layer, scheme_of(plan.precision).plain_bytes
    flops, n = manifest.flops, plan.visual_tokens
    dense = sum(flops[s] for s in (names.PRE_ECL, names.POST_ECL, "head"))
    budgets = []
    for keep in plan.budgets:
        pruned = flops[names.PRE_ECL] + flops[score_graph(keep)] + flops[f"{names.POST_ECL}.{keep}"] + flops["head"]
        kv = {"pre_ecl": n * d.kv_bytes_per_token(k, value), "post_ecl": keep * d.kv_bytes_per_token(d.layers - k, value)}
        budgets.append({
            "keep": keep, "average_keep": round(plan.average_keep(keep), 2), "decoder_flops": pruned,
            "decoder_flops_share": round(pruned / dense, 4), "kv_bytes_of_one_image": kv,
        })  # fmt: skip
    calibration = {} if plan.calibration is None else {"plan": {"file": plan.calibration.name, "sha256": plan.calibration.sha256}}
    return {
        **calibration,
        "model": plan.model.name, "target": plan.target.name, "precision": plan.precision, "layers": d.layers, "split_layer": k,
        "score_mode": plan.score_mode, "visual_tokens": n, "text_tokens": TEXT_TOKENS, "max_context": plan.max_context,
        "auto_keep": plan.auto_keep,
        "bytes": {name: info.bytes for name, info in manifest.files.items()},
        "bytes_total": sum(info.bytes for info in manifest.files.values()),
        "flops": flops, "decoder_flops_dense": dense, "flops_source": "counted from the exported graphs; a multiply-add counts as 2",
        "memory": None if manifest.memory is None else memory_report(manifest.memory), "targets": _targets_report(manifest),
        "kv_bytes_per_token": {"pre_ecl": d.kv_bytes_per_token(k, value), "post_ecl": d.kv_bytes_per_token(d.layers - k, value)},
        "kv_bytes_of_one_image_dense": n * d.kv_bytes_per_token(d.layers, value), "budgets": budgets,
    }  # fmt: skip


def _targets_report(manifest: Manifest) -> dict[str, Any]:
    """What each target of a bundle has of its own."""
    rows = {}
    for m in map(manifest.variant, manifest.targets):
        rows[m.target] = {
            "engine": m.engine or "onnxruntime", "precision": m.precision, "kv_write": m.kv_write,
            "head_pieces": 1 if m.memory is None else m.memory.head_pieces,
            "weights_bytes": sum(m.files[name].bytes for name in m.weight_files),
            "graphs": {name: graph.file for name, graph in m.graphs.items()},
            "memory": None if m.memory is None else memory_report(m.memory),
        }  # fmt: skip
    return rows


def describe_plan(plan: BuildPlan, output: Path) -> str:
    """The plan in a few lines, printed before anything is written."""
    d, v, k = plan.spec.decoder, plan.spec.vision, plan.split_layer
    budgets = ", ".join(f"keep {r} of {plan.visual_tokens} (average {plan.average_keep(r):.1f} over layers)" for r in plan.budgets)
    if plan.auto_keep is not None:
        budgets += f"; keep auto: the smallest that holds {100 * plan.auto_keep:g} % of an image's score mass"
    rows = [
        ("model", f"{plan.model.name}: {d.layers} layers of {d.hidden_size}, {d.query_heads} query and {d.kv_heads} key-value heads"),
        ("checkpoint", f"{plan.checkpoint.directory}"),
        ("image", f"{v.image_size} x {v.image_size} pixels, {plan.visual_tokens} visual tokens"),
        ("split", f"layers 0..{k - 1} see every token, layers {k}..{d.layers - 1} the kept ones; score: {plan.score_mode}"),
        ("budgets", budgets),
        ("chosen by", f"split: {plan.origins.split_layer}; budgets: {plan.origins.budgets}; score: {plan.origins.score_mode}"),
        *_precision_rows(plan),
        ("context", f"{plan.max_context} tokens"),
        ("output", f"{output}  (target{'s' if plan.others else ''} {', '.join(one.target.name for one in plan.each())})"),
    ]  # fmt: skip
    lines = [f"  {name:<11} {text}" for name, text in rows]
    return "\n".join([*lines, *(line for one in plan.each() for line in describe_memory(one.memory, one.target))])


def _precision_rows(plan: BuildPlan) -> Iterator[tuple[str, str]]:
    """Weights and KV bytes, once for each precision."""
    d, k = plan.spec.decoder, plan.split_layer
    for precision in dict.fromkeys(one.precision for one in plan.each()):
        scheme = scheme_of(precision)
        kv = " + ".join(format_bytes(d.kv_bytes_per_token(n, scheme.plain_bytes)) for n in (k, d.layers - k))
        which = f" in {precision}" if plan.others else ""
        yield "weights", f"{format_bytes(stored_bytes(plan.spec, precision))} in {precision}: {scheme.words}"
        yield "KV cache", f"{kv} per token (before, after the split){which}"


def describe_report(report: Mapping[str, Any], output: Path) -> str:
    """The result as a table: FLOPs per stage dense and pruned, sizes, KV bytes."""
    flops = report["flops"]
    lines = [f"FLOPs of one prefill, one image and {report['text_tokens']} text tokens ({report['flops_source']})"]
    header = f"  {'stage':<28}{'dense':>12}" + "".join(f"{'keep ' + str(b['keep']):>12}" for b in report["budgets"])
    lines.append(header)
    for stage, words in _STAGE_WORDS.items():
        dense = flops.get(stage)
        cells = [format_flops(flops.get(f"{stage}.{b['keep']}", dense)) for b in report["budgets"]]
        lines.append(f"  {words:<28}{format_flops(dense):>12}" + "".join(f"{c:>12}" for c in cells))
    total = [f"{b['decoder_flops_share']:.1%}" for b in report["budgets"]]
    lines.append(f"  {'decoder, share of dense':<28}{'100.0%':>12}" + "".join(f"{t:>12}" for t in total))
    kv = [format_bytes(sum(b["kv_bytes_of_one_image"].values())) for b in report["budgets"]]
    lines.append(
        f"  {'KV cache of one image':<28}{format_bytes(report['kv_bytes_of_one_image_dense']):>12}" + "".join(f"{c:>12}" for c in kv)
    )
    lines.append(f"bundle: {output}  ({format_bytes(report['bytes_total'])} in {len(report['bytes'])} files)")
    return "\n".join(lines)
