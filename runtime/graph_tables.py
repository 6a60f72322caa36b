"""What a bundle's tables of inputs and outputs must agree with before anything runs. Knows nothing about engines."""

from __future__ import annotations

from runtime import names
from runtime.errors import BundleError
from runtime.kv_cache import round_capacity
from runtime.manifest import Manifest


def check_tables(manifest: Manifest) -> None:
    """Compares the graphs' tables of inputs and outputs with the geometry, which caches are made by.

    Raises:
        BundleError: they differ, or a graph is missing.
    """
    g, k = manifest.geometry, manifest.split_layer
    missing = [name for name in (names.VISION, names.PRE_ECL, names.POST_ECL) if name not in manifest.graphs]
    if missing:
        raise BundleError(f"the manifest has no graph {missing[0]}: export the bundle again")
    tensors = sum(len(graph.inputs) for graph in manifest.graphs.values())
    if g.layers > tensors:  # before a table is made of them
        raise BundleError(f"the graphs have no caches for {g.layers} layers: export the bundle again")
    for name, layers in ((names.PRE_ECL, range(k)), (names.POST_ECL, range(k, g.layers))):
        wanted = {tensor: (1, g.kv_heads, g.head_size) for i in layers for tensor in (names.past_key(i), names.past_value(i))}
        listed = {t.name: (*t.shape[:2], *t.shape[3:]) for t in manifest.graphs[name].inputs if t.name.startswith(names.PAST)}
        if listed != wanted:
            raise BundleError(
                f"{name}'s caches are not those of layers {layers[0]} to {layers[-1]} with {g.kv_heads} key-value heads of {g.head_size}: "
                "export the bundle again"
            )
        lengths = {tensor.shape[2] for tensor in manifest.graphs[name].inputs if tensor.name.startswith(names.PAST)}
        static = round_capacity(manifest.max_context) if manifest.kv_write == names.TENSOR_SCATTER else None
        if any(length != static if isinstance(length, int) else static is not None for length in lengths):
            raise BundleError(
                f"{name}'s caches have the length {', '.join(map(str, lengths))}, and kv_write {manifest.kv_write} with a context of "
                f"{manifest.max_context} means {static or 'any'}: export the bundle again"
            )
    for keep in manifest.budgets:
        shapes = {t.name: t.shape for t in manifest.graphs[names.score_graph(keep)].outputs}
        if shapes.get(names.KEPT_INDICES) != (keep,):
            raise BundleError(f"the graph {names.score_graph(keep)} does not keep {keep} tokens: export the bundle again")


def first_capacity(manifest: Manifest, tokens: int) -> int:
    """Rows that a cache for `tokens` begins with: all of them where the graphs take one length alone."""
    return manifest.max_context if manifest.kv_write == names.TENSOR_SCATTER else tokens


def dtype_of_halves(manifest: Manifest) -> str:
    """The manifest's name of the type of activations and caches, by what enters the decoder; engines check what they are given."""
    inputs = manifest.graphs[names.PRE_ECL].inputs
    dtype = next((tensor.dtype for tensor in inputs if tensor.name == names.INPUTS_EMBEDS), "float32")
    return dtype if dtype in ("float16", "bfloat16") else "float32"
