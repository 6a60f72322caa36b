"""What a setting costs: matrix-product FLOPs of the decoder's prefill, and bytes of its KV cache, from the model's geometry.

A multiply-add counts as 2; vision tower, score and language-model head are left out, as the paper counts. The exported graphs, counted node
by node, give the same figures (tests/calibration/test_cost.py).
"""

from __future__ import annotations

from export.budget import average_from_keep
from export.spec import DecoderSpec
from runtime.errors import UsageError


def layer_flops(spec: DecoderSpec, tokens: int) -> int:
    """FLOPs of one decoder layer over `tokens` new tokens: projections, both products of full attention, gated MLP."""
    projections = 4 * spec.hidden_size * (spec.query_width + spec.kv_width)
    return tokens * (projections + 6 * spec.hidden_size * spec.intermediate_size) + 4 * tokens**2 * spec.query_width


def prefill_flops(spec: DecoderSpec, *, visual_tokens: int, keep: int, split_layer: int, text_tokens: int) -> int:
    """FLOPs of all layers: `split_layer` of them over every token, the others over `keep` visual tokens and the text."""
    before = split_layer * layer_flops(spec, visual_tokens + text_tokens)
    return before + (spec.layers - split_layer) * layer_flops(spec, keep + text_tokens)


def flops_share(spec: DecoderSpec, *, visual_tokens: int, keep: int, split_layer: int, text_tokens: int) -> float:
    """The pruned prefill's FLOPs over the unpruned one's."""
    dense = prefill_flops(spec, visual_tokens=visual_tokens, keep=visual_tokens, split_layer=split_layer, text_tokens=text_tokens)
    return prefill_flops(spec, visual_tokens=visual_tokens, keep=keep, split_layer=split_layer, text_tokens=text_tokens) / dense


def keep_for_share(spec: DecoderSpec, share: float, *, visual_tokens: int, split_layer: int, text_tokens: int) -> int | None:
    """The largest keep count whose FLOPs are at most `share` of the unpruned prefill's; None where not even 1 token fits."""
    if not 0 < share <= 1:
        raise UsageError(f"a share of the FLOPs is above 0 and at most 1, got {share:g}")
    fitting = [
        keep
        for keep in range(1, visual_tokens + 1)
        if flops_share(spec, visual_tokens=visual_tokens, keep=keep, split_layer=split_layer, text_tokens=text_tokens) <= share
    ]
    return max(fitting, default=None)


def kv_bytes(spec: DecoderSpec, *, visual_tokens: int, keep: int, split_layer: int, bytes_per_value: int = 4) -> int:
    """Bytes that one image's visual tokens take in both cache groups."""
    before = visual_tokens * spec.kv_bytes_per_token(split_layer, bytes_per_value)
    return before + keep * spec.kv_bytes_per_token(spec.layers - split_layer, bytes_per_value)


def average_keep(spec: DecoderSpec, *, visual_tokens: int, keep: int, split_layer: int) -> float:
    """The paper's budget: visual tokens averaged over all layers."""
    return average_from_keep(keep, visual_tokens=visual_tokens, split_layer=split_layer, layers=spec.layers)
