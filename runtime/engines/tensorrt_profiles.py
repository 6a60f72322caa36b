"""Which shapes an engine is built for: one set of optimisation profiles for each graph of a bundle, from its manifest alone.

| graph | profile | rows (smallest, usual, largest) |
|---|---|---|
| vision | image | 1 image; the runtime gives one after the other |
| score | image | R, N, N of all images of a message |
| pre_ecl | prefill | N, N + usual text, N of all images + largest text |
| post_ecl | prefill | smallest R, usual R + usual text, N of all images + largest text |
| both halves | append | 1, usual text, largest text: questions, further turns, what of a prompt is longer than prefill |
| both halves | decode | 1, 1, 8 |

The decode profile is not fixed at one token: an engine with such a profile holds fp16 weights twice (measured with TensorRT for RTX
1.7.1, 269 MB against 134). The cache's length C is the same in all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from runtime import names
from runtime.engine_info import Profile, ShapeRange
from runtime.errors import EngineError, UsageError
from runtime.kv_cache import round_capacity
from runtime.manifest import Manifest, TensorInfo

DECODE_ROWS = 8
TEXT_TOKENS = 256  # the longest text in one piece, unless another is asked for
USUAL_TEXT_TOKENS = 64
Sizes = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """What a bundle's engines have to take.

    Args:
        text_tokens: the longest text that runs in one piece.
        images: images of one message that run in one piece.
        capacity: C, tokens in either group's cache; None: the bundle's maximum context, rounded up.

    Raises:
        UsageError: a number below 1.
    """

    text_tokens: int = TEXT_TOKENS
    images: int = 1
    capacity: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("text_tokens", self.text_tokens), ("images", self.images), ("capacity", self.capacity)):
            if value is not None and value < 1:
                raise UsageError(f"{name.replace('_', ' ')} is {value}, expected 1 or more")


def profiles_of(manifest: Manifest, graph: str, options: ProfileOptions) -> tuple[Profile, ...]:
    """The profiles of one graph; empty where all of its sizes are fixed.

    Raises:
        EngineError: the graph has a symbolic size that no profile knows.
        UsageError: a capacity was asked for that the graph's fixed one is not.
    """
    profiles = [make_profile(graph, manifest.graphs[graph].inputs, name, sizes) for name, sizes in _sizes(manifest, graph, options)]
    return tuple(profile for profile in profiles if profile.shapes)


def _sizes(manifest: Manifest, graph: str, options: ProfileOptions) -> Iterator[tuple[str, Sizes]]:
    """Each profile's name, and its range for each symbolic dimension."""
    n, limit = manifest.geometry.visual_tokens, manifest.max_context
    all_images = n * options.images
    if graph == names.VISION:
        yield "image", {"images": (1, 1, 1)}
    elif graph in (names.PRE_ECL, names.POST_ECL):
        least, usual = (n, n) if graph == names.PRE_ECL else (min(manifest.budgets), manifest.budgets[0])
        capacity = round_capacity(limit) if options.capacity is None else options.capacity
        if manifest.kv_write == names.TENSOR_SCATTER and capacity != round_capacity(limit):
            raise UsageError(
                f"a capacity of {capacity} tokens does not go with graphs whose caches are fixed at {round_capacity(limit)}: "
                "leave it out, or export the bundle with another --max-context"
            )
        text = min(options.text_tokens, limit)
        for name, rows in (
            ("prefill", _within(limit, least, usual + min(USUAL_TEXT_TOKENS, text), all_images + text)),
            ("append", _within(limit, 1, min(USUAL_TEXT_TOKENS, text), text)),
            ("decode", _within(limit, 1, 1, DECODE_ROWS)),
        ):
            yield name, {"sequence": rows, "capacity": (capacity,) * 3}
    else:
        keep = int(graph.rpartition(".")[2])
        yield "image", {"N": _within(limit, min(keep, n), n, all_images)}


def _within(limit: int, least: int, usual: int, most: int) -> tuple[int, int, int]:
    """The three numbers, none above `limit` or the one after it."""
    most = min(most, limit)
    usual = min(usual, most)
    return min(least, usual), usual, most


def make_profile(graph: str, inputs: Iterable[TensorInfo], name: str, sizes: Sizes) -> Profile:
    """Puts sizes into the symbolic dimensions of a graph's inputs; inputs of fixed size are left out.

    Raises:
        EngineError: a dimension has no size.
    """
    shapes = {}
    for tensor in inputs:
        unknown = [size for size in tensor.shape if isinstance(size, str) and size not in sizes]
        if unknown:
            raise EngineError(f"{graph}'s input {tensor.name} has a size {unknown[0]!r:.40} that no profile knows: export the bundle again")
        if any(isinstance(size, str) for size in tensor.shape):
            ranges = [sizes[size] if isinstance(size, str) else (size,) * 3 for size in tensor.shape]
            shapes[tensor.name] = ShapeRange(*(tuple(r[i] for r in ranges) for i in range(3)))
    return Profile(name, shapes)
