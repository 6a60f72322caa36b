"""The chain at keep = N against transformers (sdpa, fp32) with the same weights: prefill and decode, in turn, on the same machine.

    python -m benchmarks.transformers                             # a random LLaVA of 576 visual tokens, 8 layers of 1024
    python -m benchmarks.transformers --output DIR && python -m runtime.profile --bundle DIR/bundle
    python -m benchmarks.transformers --checkpoint tiny_llava/checkpoint --model tiny-llava
    python -m benchmarks.transformers --score [--score-mode dpp]  # the score graph's time against LLaVA-1.5-7B's dense prefill

Prefill is timed from embeddings to logits (vision tower left out on both sides), decode per token. Ratios are medians of pairs with a
95 % bootstrap interval. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.command_line import run_command

TEXT_TOKENS, NEW_TOKENS, WARMUP = 32, 16, 2
KEEP = 166  # of the random checkpoint's 576 visual tokens, as LLaVA-1.5-7B's average of 192 means; the unpruned chain is what is timed
SEVEN_B_LAYERS, SEVEN_B_VISUAL = 32, 576


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transformers", description="The chain against transformers, side by side.")
    parser.add_argument("--checkpoint", help="Hugging Face checkpoint (default: a random one)")
    parser.add_argument("--model", default="llava15", help="its model in configs/models")
    parser.add_argument("--output", type=Path, metavar="DIR", help="keep the checkpoint and the bundle here, to profile it")
    parser.add_argument("--runs", type=int, default=10, help="pairs of runs")
    parser.add_argument("--score", action="store_true", help="measure the score graph against 32 times one layer of LLaVA-1.5-7B instead")
    parser.add_argument("--score-mode", default="trace", help="with --score: a mode that python -m export.build takes")
    return parser


def _run(args: argparse.Namespace) -> int:
    from runtime.engines.onnxruntime import ThreadPool
    from runtime.machine import Machine

    ThreadPool.use(None)
    with tempfile.TemporaryDirectory() as folder:
        results = (
            _score_share(Path(folder), args.runs, args.score_mode)
            if args.score
            else _against_transformers(args, args.output or Path(folder))
        )
    machine = dataclasses.asdict(Machine.here(ThreadPool.size))
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(json.dumps({"machine": machine, **results}, default=str))
    return 0


# ---------------------------------------------------------------- against transformers


def _against_transformers(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch

    from export.build import build_bundle
    from export.eager import load_llava
    from export.plan import BuildOptions, make_plan
    from runtime.engines.onnxruntime import ThreadPool
    from runtime.pipeline import load

    torch.set_num_threads(ThreadPool.size or 1)
    checkpoint = Path(args.checkpoint) if args.checkpoint else _random_checkpoint(folder)
    keep = None if args.checkpoint else (KEEP,)
    build_bundle(make_plan(BuildOptions(args.model, checkpoint=str(checkpoint), keep=keep)), folder / "bundle")
    chain, llava = load(folder / "bundle").chain, load_llava(checkpoint, "sdpa").eval()
    visual, rng = chain.manifest.geometry.visual_tokens, np.random.default_rng(0)
    prefill: list[tuple[float, float]] = []
    decode: list[tuple[float, float]] = []
    for run in range(args.runs + WARMUP):
        ids = rng.integers(5, chain.manifest.geometry.vocab_size, visual + TEXT_TOKENS)  # text alone: no vision tower on either side
        if run % 2:
            ours, theirs = _chain_times(chain, ids), _eager_times(llava, ids)
        else:
            theirs, ours = _eager_times(llava, ids), _chain_times(chain, ids)
        print(f"\rpair {run + 1} of {args.runs + WARMUP}", end="", file=sys.stderr)
        if run >= WARMUP:
            prefill.append((theirs[0], ours[0]))
            decode.append((theirs[1], ours[1]))
    print(file=sys.stderr)
    print(f"transformers (sdpa, fp32) / chain at keep = N; {visual + TEXT_TOKENS} prompt tokens, {NEW_TOKENS} decoded, {args.runs} pairs")
    return {"prefill": _ratio("prefill", prefill), "decode": _ratio("decode, per token", decode)}


def _chain_times(chain: Any, ids: np.ndarray) -> tuple[float, float]:
    began = time.perf_counter()
    conversation, _ = chain.prefill(ids, np.zeros(len(ids), bool), None, keep=None)
    middle = time.perf_counter()
    for token in range(NEW_TOKENS):
        chain.decode(conversation, 5 + token)
    return middle - began, (time.perf_counter() - middle) / NEW_TOKENS


def _eager_times(llava: Any, ids: np.ndarray) -> tuple[float, float]:
    import torch

    with torch.inference_mode():
        began = time.perf_counter()
        out = llava(input_ids=torch.from_numpy(ids)[None], use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        for token in range(NEW_TOKENS):
            out = llava(input_ids=torch.tensor([[5 + token]]), past_key_values=out.past_key_values, use_cache=True)
        return middle - began, (time.perf_counter() - middle) / NEW_TOKENS


def _random_checkpoint(folder: Path) -> Path:
    from tests.models import tiny_llava_checkpoint

    return tiny_llava_checkpoint(
        folder / "checkpoint",
        layers=8,
        hidden=1024,
        intermediate=2816,
        heads=16,
        vocab=2048,
        image_size=336,
        vision_hidden=256,
        vision_layers=4,
    )


# ---------------------------------------------------------------- the score's share


def _score_share(folder: Path, runs: int, mode: str) -> dict[str, Any]:
    """The score graph at LLaVA-1.5-7B's shape against 32 times one of its layers, over 576 visual and 32 text tokens."""
    from export.graphs.decoder import build_decoder_half, pre_ecl
    from export.graphs.score import ScoreSpec, build_score
    from export.spec import DecoderSpec
    from export.weights import WeightFile
    from runtime import names
    from runtime.engines.onnxruntime import OnnxRuntimeEngine
    from runtime.kv_cache import KVGroup
    from runtime.manifest import GraphInfo

    spec = DecoderSpec(SEVEN_B_LAYERS, 4096, 11008, 32, 32, 128, 32064, rms_norm_eps=1e-5, rope_theta=1e4, max_positions=4096)
    tokens, rng = SEVEN_B_VISUAL + TEXT_TOKENS, np.random.default_rng(0)
    tile = rng.normal(0, 0.02, 1 << 20).astype(np.float32)
    widths = {"q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096), "o_proj": (4096, 4096), "gate_proj": (11008, 4096),
              "up_proj": (11008, 4096), "down_proj": (4096, 11008)}  # fmt: skip

    def read(name: str) -> np.ndarray:
        shape = next((s for part, s in widths.items() if part in name), (4096,))
        return np.resize(tile, shape) if len(shape) > 1 else np.ones(shape, np.float32)

    with WeightFile(folder / "weights.bin") as weights:
        layer = build_decoder_half(spec, pre_ecl(1), read, weights, 1024)
    score = build_score(ScoreSpec(32, 128, 4096, 1, KEEP, mode, 24, SEVEN_B_VISUAL))
    engines = {}
    for name, builder in (("layer", layer), ("score", score)):
        builder.save(folder / f"{name}.onnx")
        engines[name] = OnnxRuntimeEngine(folder / f"{name}.onnx", GraphInfo(f"{name}.onnx", builder.inputs, builder.outputs))
    hidden = rng.normal(size=(1, tokens, 4096)).astype(np.float32)
    cache = KVGroup(range(1), 32, 128, tokens, 4096)
    feeds: dict[str, np.ndarray] = {
        names.INPUTS_EMBEDS: hidden,
        names.POSITION_IDS: np.arange(tokens).reshape(1, 1, -1),
        names.PAST_LENGTH: np.array([0]),
    }
    states = rng.normal(size=(SEVEN_B_VISUAL, 4096)).astype(np.float32)
    rows: dict[str, np.ndarray] = {names.SCORE_STATES: states, names.HIDDEN_STATES: hidden[0, :SEVEN_B_VISUAL],
            names.POSITION_IDS: np.arange(SEVEN_B_VISUAL)[None]}  # fmt: skip
    if mode == "random":
        rows[names.IMAGE_SEED] = np.array([0])
    pairs = []
    for run in range(runs + WARMUP):
        one_layer = _seconds(lambda: engines["layer"].run(feeds, [names.HIDDEN_STATES], cache))
        pairs.append((_seconds(lambda: engines["score"].run(rows, [names.KEPT_INDICES])), SEVEN_B_LAYERS * one_layer))
        print(f"\rpair {run + 1} of {runs + WARMUP}", end="", file=sys.stderr)
    print(file=sys.stderr)
    print(
        f"score graph ({mode}) / {SEVEN_B_LAYERS} x one layer of LLaVA-1.5-7B, {SEVEN_B_VISUAL} + {TEXT_TOKENS} tokens, fp32, {runs} pairs"
    )
    return {"score_share": _ratio("score / dense prefill", pairs[WARMUP:])}


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _ratio(name: str, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    from runtime.profile_statistics import paired_ratio

    first, second = (np.array(column) for column in zip(*pairs, strict=True))
    ratio = paired_ratio(first, second)
    times = f"{np.median(first) * 1e3:.2f} ms / {np.median(second) * 1e3:.2f} ms"
    print(f"  {name:<22} {ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]   {times}")
    return dataclasses.asdict(ratio)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
