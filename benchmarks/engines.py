"""`python -m benchmarks.engines`: engines of one decoder layer in each half, at a real model's widths, built without a GPU.

    python -m benchmarks.engines                                    # LLaVA-1.5-7B's widths, fp16, all forms of the cache's write
    python -m benchmarks.engines --forms in_place --decode-rows 1   # what a decode profile fixed at one token costs

Needs TensorRT for RTX (pip install tensorrt-rtx-cu13). Weights are random. Prints engine bytes against weights, activation bytes,
fused attention kernels and layers that only copy a tensor, for each profile (prefill, append, decode), and what the build took. Each
engine is built in a process of its own; about 3 bytes of memory for each of weights.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.command_line import CommandParser, run_command

if TYPE_CHECKING:
    from export.graphs.decoder import HalfSpec
    from export.spec import DecoderSpec
    from runtime.engines.tensorrt_builder import BuiltEngine

LIBRARY = "tensorrt_rtx"
CAPABILITIES = (80, 86, 89, 120)
VISUAL_TOKENS, KEPT_TOKENS, TEXT_TOKENS, CAPACITY = 576, 166, 256, 2048


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m benchmarks.engines", description="Sizes of one layer's engines, without a GPU.")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--forms", default="in_place,tensor_scatter,append", metavar="F[,F...]", help="of the cache's write")
    parser.add_argument("--decode-rows", type=int, default=8, metavar="S", help="most rows of the decode profile (default: 8)")
    return parser


def llava_7b() -> DecoderSpec:
    """LLaVA-1.5-7B's widths, with one layer in each half."""
    from export.spec import DecoderSpec

    return DecoderSpec(
        layers=2, hidden_size=4096, intermediate_size=11008, query_heads=32, kv_heads=32, head_size=128, vocab_size=32064,
        rms_norm_eps=1e-5, rope_theta=1e4, max_positions=4096,
    )  # fmt: skip


def build(spec: DecoderSpec, half: HalfSpec, decode_rows: int, folder: Path) -> tuple[BuiltEngine, int, tuple[int, ...]]:
    """`build_with` the profiles that a bundle's engines have."""
    visual = VISUAL_TOKENS if half.score_states else KEPT_TOKENS
    rows = {
        "prefill": (visual, visual + 64, VISUAL_TOKENS + TEXT_TOKENS), "append": (1, 64, TEXT_TOKENS), "decode": (1, 1, decode_rows),
    }  # fmt: skip
    return build_with(spec, half, rows, folder)


def build_with(
    spec: DecoderSpec, half: HalfSpec, rows: Mapping[str, tuple[int, int, int]], folder: Path, capabilities: Sequence[int] = CAPABILITIES
) -> tuple[BuiltEngine, int, tuple[int, ...]]:
    """Exports one half with random weights and builds its engine; also returns the weight file's bytes and the copies in each profile.

    Args:
        rows: the smallest, usual and largest number of new rows of each profile.
    """
    import numpy as np

    from export.graphs.decoder import build_decoder_half
    from export.weights import WeightFile
    from runtime.engines.tensorrt_builder import EngineSpec, build_engine
    from runtime.engines.tensorrt_log import BuildLog
    from runtime.engines.tensorrt_profiles import make_profile

    h, i, rng = spec.hidden_size, spec.intermediate_size, np.random.default_rng(0)
    shapes = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i), "lm_head": (spec.vocab_size, h), "norm": (h,)}

    def read(name: str) -> np.ndarray:
        shape = next((shape for part, shape in shapes.items() if part in name), (h, h))
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    with WeightFile(folder / "weights.bin") as weights:
        builder = build_decoder_half(spec, half, read, weights, spec.max_positions)
        size = weights.info().bytes
    builder.save(folder / "half.onnx")
    profiles = tuple(make_profile(half.name, builder.inputs, n, {"sequence": r, "capacity": (CAPACITY,) * 3}) for n, r in rows.items())
    job = EngineSpec(half.name, str(folder / "half.onnx"), str(folder / "half.engine"), LIBRARY, tuple(capabilities), profiles)
    log = BuildLog()
    return build_engine(job, log), size, log.copy_layers


def _row(form: str, name: str, dtype: str, decode_rows: int) -> str:
    """One engine, exported and built in this process."""
    from export.graphs.decoder import post_ecl, pre_ecl
    from export.graphs.kv_write import TENSOR_SCATTER

    capacity = CAPACITY if form == TENSOR_SCATTER else None
    halves = (
        pre_ecl(1, dtype=dtype, kv_write=form, capacity=capacity),
        post_ecl(1, 2, dtype=dtype, kv_write=form, capacity=capacity),
    )
    half = next(half for half in halves if half.name == name)
    with tempfile.TemporaryDirectory() as folder:
        built, weights, copies = build(llava_7b(), half, decode_rows, Path(folder))
    info, size = built.info, built.file.bytes
    activations = ", ".join(f"{count / 1e6:.1f}" for count in info.activation_bytes)
    fused, peak = ", ".join(map(str, info.attention_kernels)), (info.peak_rss_bytes or 0) / 1e9
    return (
        f"{half.name:<9}{form:<15}{weights / 1e6:>11.1f}{size / 1e6:>10.1f}{size / weights:>7.3f}  {activations:<20}{fused:<9}"
        f"{', '.join(map(str, copies)):<9}{info.build_seconds:>5.1f}{peak:>9.2f}"
    )


def _run(args: argparse.Namespace) -> int:
    from multiprocessing import get_context

    print(
        f"{'half':<9}{'form':<15}{'weights MB':>11}{'engine MB':>10}{'ratio':>7}  {'activations MB':<20}{'fused':<9}{'copies':<9}"
        f"{'s':>5}{'peak GB':>9}"
    )
    for form in args.forms.split(","):
        for name in ("pre_ecl", "post_ecl"):
            with get_context("spawn").Pool(1) as pool:
                print(pool.apply(_row, (form, name, args.dtype, args.decode_rows)), flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
