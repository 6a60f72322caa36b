"""FLOPs of a prompt, from the figures that were counted in the graphs when the bundle was built.

The manifest's figures are those of one image and COUNTED_TEXT_TOKENS text tokens. Of S tokens, a half of the decoder takes
a S + b S^2: b is attention's two products, 4 (query heads) (head size) for each layer, so one count gives every length.
"""

from __future__ import annotations

from runtime import names
from runtime.errors import BundleError
from runtime.manifest import Manifest

COUNTED_TEXT_TOKENS = 32  # prompt tokens besides the image that a manifest's figures are counted with
HEAD = "head"


def decoder_flops(manifest: Manifest, keep: int | None, text_tokens: int) -> float:
    """Matrix-product FLOPs of the decoder's prefill: one image and `text_tokens` text tokens, score and head included.

    Args:
        keep: visual tokens kept after the split, a budget of the bundle; None keeps all.

    Raises:
        BundleError: the manifest does not hold the figures.
    """
    stages = (names.PRE_ECL, HEAD, *((names.POST_ECL,) if keep is None else (names.score_graph(keep), f"{names.POST_ECL}.{keep}")))
    missing = [stage for stage in stages if manifest.flops.get(stage, 0) <= 0]
    if missing:
        raise BundleError(f"the manifest holds no FLOPs of {', '.join(missing)}: export the bundle again")
    flops, n, layers = manifest.flops, manifest.geometry.visual_tokens, manifest.geometry.layers
    split, kept = manifest.split_layer, n if keep is None else keep
    before = _at_length(manifest, flops[names.PRE_ECL], split, n + COUNTED_TEXT_TOKENS, n + text_tokens)
    counted = flops[names.POST_ECL if keep is None else f"{names.POST_ECL}.{keep}"]
    after = _at_length(manifest, counted, layers - split, kept + COUNTED_TEXT_TOKENS, kept + text_tokens)
    return before + (0 if keep is None else flops[names.score_graph(keep)]) + after + flops[HEAD]


def _at_length(manifest: Manifest, counted: float, layers: int, counted_tokens: int, tokens: int) -> float:
    quadratic = 4 * manifest.geometry.query_heads * manifest.geometry.head_size * layers
    linear = counted / counted_tokens - quadratic * counted_tokens
    return linear * tokens + quadratic * tokens**2
