"""What a bundle will need of its target's memory, computed from shapes before anything is built; and what would fit where it does not.

| item | how it is known |
|---|---|
| weights of each graph, token table, caches | exact: shapes times the precision's bytes (`export.precision`) |
| engines beside their weights | estimated: `ENGINE_SHARE` of them, or `COMPILED_CODE` for each engine |
| activations | estimated: the largest tensors of one layer that live at once (`half_activations` and below); compiled engines share them |
| tensors between engines | estimated: each graph's inputs and outputs once |
| CUDA context and engine library, the Python process | assumed: `ENGINE_PROCESS`, `PYTHON_PROCESS` |

Knows nothing about checkpoints' contents. `python -m export.memory` prints the plan, `python -m benchmarks.engine_memory` compares the
activations with TensorRT's log.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from export.families import find_adapter
from export.precision import Scheme, scheme_of
from export.spec import ClipVisionSpec, DecoderSpec, ModelSpec, head_widths
from export.targets import TargetConfig, gib
from runtime import names
from runtime.engines.tensorrt_profiles import TEXT_TOKENS
from runtime.memory_plan import ACTIVATIONS, ASSUMED, BESIDE, DEVICE, ESTIMATED, EXACT, HOST, SHARED, WEIGHTS, MemoryItem, MemoryPlan
from runtime.names import ROUND_TO

PRE_CACHE, POST_CACHE, TABLE = "KV cache before the split", "KV cache after the split", "token table, memory-mapped"
BETWEEN, CONTEXT, PROCESS = "tensors between engines", "CUDA context, engine library", "Python process"
# ONNX Runtime holds 0.4 to 0.8 % beside the weights (python -m benchmarks.build_memory). A TensorRT engine holds kernels and tables that
# do not grow with its weights: 2 to 10 MB in engines of 5 to 674 MB, for four compute capabilities (python -m benchmarks.engines).
ENGINE_SHARE, COMPILED_SHARE, COMPILED_CODE = 0.02, 0.002, 6_500_000
# Assumptions. A CUDA context with kernels loaded when first used: 287 MB (github.com/pytorch/pytorch/pull/86509); initialising CUDA on a
# Jetson: 229 MiB (github.com/NVIDIA/TensorRT/issues/2217), where cuDNN took 241 MiB more, which only ONNX Runtime still loads.
ENGINE_PROCESS = {"onnxruntime-cuda": 768 << 20, "tensorrt": 512 << 20, "tensorrt-rtx": 512 << 20}
PYTHON_PROCESS = 128 << 20  # 61 MB once the runtime is imported (python -m benchmarks.build_memory, x86-64), and room for an image
# Peaks of making a bundle. Export: 83 MB and 2.1 to 2.2 times the largest tensor in float32 (python -m benchmarks.build_memory).
EXPORT_PROCESS, EXPORT_FACTOR = 100_000_000, 2.5
# Compiling: a process, and peak memory for each byte of one engine's weights, 16- and 32-bit weights and quantised ones. From TensorRT for
# RTX 1.7.1 on a machine without a GPU: 5.7 GB at 2.07 GB of fp16, 9.4 at 3.50; 4.4 at 0.88 GB of int4 (once; int8: taken alike). Assumed
# for TensorRT on a device, where the weights are there twice at least (TensorRT Developer Guide, "The Build Phase").
COMPILE_PROCESS, COMPILE_FACTORS = 350_000_000, {"tensorrt": (2.6, 4.6), "tensorrt-rtx": (2.6, 4.6)}
# While TensorRT tries kernels for the language-model head it asked for 1,075,072,515 bytes at once for a head of 622,329,856 in fp16.
HEAD_SCRATCH = 1.73
MAX_HEAD_PIECES = 64
# What kernels ask for whatever the rows, as TensorRT for RTX logs it: half of it in post_ecl, which runs on one stream.
ENGINE_SCRATCH = 8 << 20


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """What is asked about: a model's shapes, a target, and the choices that memory depends on. `keep` is the largest budget.

    `least_head_pieces`: what another target that shares the weights splits the head into. `budgets`: how many there are, an engine each.
    """

    spec: ModelSpec
    target: TargetConfig
    precision: str
    split_layer: int
    keep: int
    max_context: int
    least_head_pieces: int = 1
    budgets: int = 1

    @property
    def head_pieces(self) -> int:
        """Into how many pieces the language-model head is split, so that compiling it asks for no more at once than the target gives."""
        limit, least = self.target.max_allocation_bytes, self.least_head_pieces
        if limit is None or self.target.engine not in COMPILE_FACTORS:
            return least
        enough = (n for n in range(least, MAX_HEAD_PIECES) if HEAD_SCRATCH * self.head_piece_bytes(n) <= limit)
        return next(enough, MAX_HEAD_PIECES)

    def head_piece_bytes(self, pieces: int) -> int:
        """Bytes of the largest of so many pieces of the head."""
        decoder = self.spec.decoder
        return self.scheme.plain((max(head_widths(decoder.vocab_size, pieces)), decoder.hidden_size))

    @property
    def scheme(self) -> Scheme:
        return scheme_of(self.precision)

    @property
    def kept_context(self) -> int:
        """Rows of the cache after the split: the context less what one image loses, or all of it where engines take one length alone."""
        if self.target.kv_write != names.IN_PLACE:
            return self.max_context
        return max(1, self.max_context - (self.spec.vision.visual_tokens - self.keep))


def plan_memory(request: MemoryRequest) -> MemoryPlan:
    """The plan of one conversation with one image at the full context."""
    spec, target, scheme, k = request.spec, request.target, request.scheme, request.split_layer
    decoder = spec.decoder
    weights = graph_weights(request)
    active, compiled = _activations(request), target.engine in COMPILE_FACTORS
    items = [MemoryItem(WEIGHTS.format(name), size, DEVICE, EXACT) for name, size in weights.items()]
    beside = (COMPILED_SHARE if compiled else ENGINE_SHARE) * sum(weights.values())
    beside += COMPILED_CODE * (3 + request.budgets) if compiled else 0
    items.append(MemoryItem(BESIDE, round(beside), DEVICE, ESTIMATED))
    for name, layers, rows in ((PRE_CACHE, k, request.max_context), (POST_CACHE, decoder.layers - k, request.kept_context)):
        capacity = -(-rows // ROUND_TO) * ROUND_TO
        items.append(MemoryItem(name, capacity * decoder.kv_bytes_per_token(layers, scheme.plain_bytes), DEVICE, EXACT))
    place = SHARED if compiled else DEVICE  # engines run one after the other, in one buffer that the runtime allocates
    items += [MemoryItem(ACTIVATIONS.format(name), size, place, ESTIMATED) for name, size in active.items()]
    items.append(MemoryItem(BETWEEN, _between(request), DEVICE, ESTIMATED))
    if target.engine in ENGINE_PROCESS:
        items.append(MemoryItem(CONTEXT, ENGINE_PROCESS[target.engine], DEVICE, ASSUMED))
    items += [
        MemoryItem(TABLE, 4 * decoder.vocab_size * decoder.hidden_size, HOST, EXACT),
        MemoryItem(PROCESS, PYTHON_PROCESS, HOST, ASSUMED),
    ]
    largest_fp32 = max(4 * size for size in _sizes(spec).values())
    return MemoryPlan(
        precision=request.precision, keep=request.keep, max_context=request.max_context, unified=target.unified, items=tuple(items),
        memory_bytes=target.memory_bytes, reserve_bytes=target.reserve_bytes,
        export_peak_bytes=EXPORT_PROCESS + round(EXPORT_FACTOR * largest_fp32),
        compile_peak_bytes=_compile_peak(request, max(weights.values())),
        largest_allocation_bytes=_largest_allocation(request), max_allocation_bytes=target.max_allocation_bytes,
        head_pieces=request.head_pieces,
    )  # fmt: skip


def _compile_peak(request: MemoryRequest, weights: int) -> int:
    """Peak bytes while the engine with the most weights is compiled; 0 where nothing is."""
    if request.target.engine not in COMPILE_FACTORS:
        return 0
    plain, quantised = COMPILE_FACTORS[request.target.engine]
    return COMPILE_PROCESS + round(weights * (plain if request.scheme.matrix_bits >= 16 else quantised))


# ---------------------------------------------------------------- weights


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return find_adapter(spec.family).shapes(spec)


def _sizes(spec: ModelSpec) -> dict[str, int]:
    """Values of every tensor."""
    return {name: math.prod(shape) for name, shape in _shapes(spec).items()}


def graph_weights(request: MemoryRequest) -> dict[str, int]:
    """Bytes of the weights of `vision`, `pre_ecl` and `post_ecl`; each half has its own rotary tables, in float32."""
    decoder = request.spec.decoder
    rotary = 2 * request.max_context * (decoder.head_size // 2) * 4
    total = {names.VISION: 0, names.PRE_ECL: rotary, names.POST_ECL: rotary}
    for name, shape in _shapes(request.spec).items():
        graph = _graph_of(name, request.split_layer)
        if graph is not None:
            quantised = name.startswith("layers.") and len(shape) == 2
            total[graph] += request.scheme.matrix(shape) if quantised else request.scheme.plain(shape)
    if decoder.tied_embeddings:
        total[names.POST_ECL] += request.scheme.plain((decoder.vocab_size, decoder.hidden_size))
    return total


def _graph_of(name: str, split_layer: int) -> str | None:
    """The graph that holds a canonical tensor; None for the token table, which is a file of its own."""
    part = name.split(".")
    if part[0] in ("vision", "projector"):
        return names.VISION
    if part[0] == "layers":
        return names.PRE_ECL if int(part[1]) < split_layer else names.POST_ECL
    return None if part[0] == "embed_tokens" else names.POST_ECL


def stored_bytes(spec: ModelSpec, precision: str) -> int:
    """Bytes of all weights as a bundle stores them, the token table included (rotary tables left out)."""
    scheme, total = scheme_of(precision), 0
    for name, shape in _shapes(spec).items():
        total += scheme.matrix(shape) if name.startswith("layers.") and len(shape) == 2 else scheme.plain(shape)
    return total + (scheme.plain((spec.decoder.vocab_size, spec.decoder.hidden_size)) if spec.decoder.tied_embeddings else 0)


def _largest_allocation(request: MemoryRequest) -> int:
    """The larger of the largest tensor and, where an engine is compiled, the scratch for the largest piece of the language-model head."""
    scheme, decoder = request.scheme, request.spec.decoder
    head = request.head_piece_bytes(request.head_pieces)
    cache = request.max_context * decoder.kv_width * scheme.plain_bytes
    scratch = round(HEAD_SCRATCH * head) if request.target.engine in COMPILE_FACTORS else 0
    return max(scratch, head, cache)


# ---------------------------------------------------------------- activations


def half_activations(
    decoder: DecoderSpec, rows: int, capacity: int, value: int, *, fused: bool, append: bool = False, scratch: int = ENGINE_SCRATCH
) -> int:
    """An estimate of the bytes that a decoder half's prefill holds at its peak.

    S rows, C cache slots, n = C (with `append`: C + S) keys, b bytes a value; d, q, kv, m, H the widths of hidden state, queries, keys,
    MLP, and the head count. A scratch, and the larger of

    - attention: 2 n kv b (one layer's keys and values as the kernel takes them) + 4 S q b + the mask 4 S n (fp32), where it is not fused
      instead of the mask 2 H S n b (scores and their softmax);
    - MLP: 3 S d b (hidden state, norm, sum) + 3 S m b (gate and up, and their product) + the mask; with `append` also 2 S d b.

    The terms are the tensors that TensorRT for RTX lists for these phases (halves of 2 layers in fp16); within 10 % or 8 MB of what it logs
    for LLaVA-1.5-7B's widths and for 1024 (python -m benchmarks.engine_memory).

    Args:
        fused: attention runs without its scores in memory. TensorRT for RTX does not fuse it where query heads share key-value heads.
        append: the form of the cache's write.
    """
    d, q, kv = decoder.hidden_size, decoder.query_width, decoder.kv_width
    keys = capacity + (rows if append else 0)
    fused = fused and value == 2 and decoder.query_heads == decoder.kv_heads
    mask = 4 * rows * keys
    attention = 2 * keys * kv * value + 4 * rows * q * value + (mask if fused else 2 * decoder.query_heads * rows * keys * value)
    mlp = (3 + 2 * append) * rows * d * value + 3 * rows * decoder.intermediate_size * value + mask
    return scratch + max(attention, mlp)


def vision_activations(vision: ClipVisionSpec, value: int, *, fused: bool) -> int:
    """The same for a CLIP tower of r rows, one image: the larger of 6 r w b (+ 8 H r^2 if not fused) and 3 r w b + r m b.

    (The activation function works in place.)
    """
    rows, width = vision.grid**2 + 1, vision.hidden_size
    attention = 6 * rows * width * value + (0 if fused and value == 2 else 8 * vision.heads * rows * rows)
    return ENGINE_SCRATCH + max(attention, 3 * rows * width * value + rows * vision.intermediate_size * value)


def score_activations(decoder: DecoderSpec, visual_tokens: int) -> int:
    """The same for the score, in fp32: N H d_h (the centred queries) + 2 N H^2 (Gram matrices while they are reduced)."""
    heads = decoder.query_heads
    return ENGINE_SCRATCH + 4 * visual_tokens * (heads * decoder.head_size + 2 * heads * heads)


def _activations(request: MemoryRequest) -> dict[str, int]:
    """Each engine's. Both halves: a prompt that fills the context at once; compiled engines, the largest piece that they take."""
    spec, decoder, value, fused = request.spec, request.spec.decoder, request.scheme.plain_bytes, request.target.fuses_attention
    context, kept, append = request.max_context, request.kept_context, request.target.kv_write == names.APPEND
    rows, kept_rows, scratch = context, kept, ENGINE_SCRATCH
    if request.target.engine in COMPILE_FACTORS:
        rows = kept_rows = min(context, spec.vision.visual_tokens + TEXT_TOKENS)
        context = kept = -(-context // ROUND_TO) * ROUND_TO
        scratch //= 2
    return {
        names.VISION: vision_activations(spec.vision, value, fused=fused),
        names.PRE_ECL: half_activations(decoder, rows, context, value, fused=fused, append=append),
        names.SCORE: score_activations(decoder, spec.vision.visual_tokens),
        names.POST_ECL: half_activations(decoder, kept_rows, kept, value, fused=fused, append=append, scratch=scratch)
        + 4 * decoder.vocab_size,
    }


def _between(request: MemoryRequest) -> int:
    """Pixels; image embeddings; embeddings, hidden states and queries of the prompt; kept hidden states; logits."""
    decoder, vision, value = request.spec.decoder, request.spec.vision, request.scheme.plain_bytes
    rows = vision.visual_tokens + 2 * request.max_context + request.kept_context
    queries = request.max_context * decoder.query_width
    return 12 * vision.image_size**2 + value * (rows * decoder.hidden_size + queries) + 4 * decoder.vocab_size


# ---------------------------------------------------------------- what would fit


def largest_keep(request: MemoryRequest) -> int | None:
    """The largest budget that fits at this context and precision; None where none does."""
    return _largest(1, request.spec.vision.visual_tokens, lambda keep: _fits(dataclasses.replace(request, keep=keep)))


def largest_context(request: MemoryRequest) -> int | None:
    """The largest context that fits with this budget and precision, up to the model's positions; None where none does."""
    least = request.spec.vision.visual_tokens + 16
    return _largest(least, request.spec.decoder.max_positions, lambda rows: _fits(dataclasses.replace(request, max_context=rows)))


def fitting_precisions(request: MemoryRequest) -> tuple[str, ...]:
    """The target's precisions that fit with this budget and context."""
    return tuple(p for p in request.target.precisions if _fits(dataclasses.replace(request, precision=p)))


def misfit(request: MemoryRequest, model: str) -> str | None:
    """One line that says what does not fit and what would; None where it fits, or where the device's memory is not known."""
    plan, target = plan_memory(request), request.target
    if plan.fits in (None, True) or plan.available_bytes is None:
        return None
    return (
        f"{model} in {request.precision} with --keep {request.keep} and --max-context {request.max_context} needs "
        f"{plan.total_bytes / 1e9:.2f} GB, and {target.name} has {plan.available_bytes / 1e9:.2f} GB for it ({gib(plan.memory_bytes or 0)} "
        f"less {gib(plan.reserve_bytes)} for the system): {_advice(request)}"
    )


def _advice(request: MemoryRequest) -> str:
    """Which single change makes it fit; failing that, which of several together."""
    keep, context, precisions = largest_keep(request), largest_context(request), fitting_precisions(request)
    changes = [] if keep is None else [f"--keep up to {keep}"]
    changes += [] if context is None else [f"--max-context up to {context}"]
    changes += [] if not precisions else [f"--precision {' or '.join(precisions)}"]
    if not changes:
        together = _together(request)
        return f"what fits: {together}" if together else "nothing of this model fits: choose a device with more memory"
    none = " and ".join(option for option, value in (("no --keep", keep), ("no --max-context", context)) if value is None)
    return f"what fits: {', or '.join(changes)}" + (f" (in {request.precision} {none} does)" if none else "")


def _together(request: MemoryRequest) -> str | None:
    """Several changes that make it fit where no single one does: another precision before a smaller budget, each with its context."""
    for keep in (request.keep, 1):
        for precision in (request.precision, *request.target.precisions):
            context = largest_context(dataclasses.replace(request, keep=keep, precision=precision))
            if context is not None:
                return f"--precision {precision} with --keep {keep} and --max-context up to {context}"
    return None


def _fits(request: MemoryRequest) -> bool:
    return plan_memory(request).fits is not False


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest whole number from low to high that fits, where every smaller one fits too; None where low does not."""
    if low > high or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
