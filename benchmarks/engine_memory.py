"""The memory plan's estimated activations beside what TensorRT for RTX logs when it builds the same graphs in fp16. Needs no GPU.

    pip install tensorrt-rtx-cu13==1.7.1.116 && python -m benchmarks.engine_memory

Graphs of LLaVA-1.5-7B's widths with random weights, for compute capability 8.6: halves of two layers, after which what is logged stays.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.configs import load_model_config
from export.families import find_adapter
from export.graphs.builder import GraphBuilder
from export.graphs.clip import build_clip_vision
from export.graphs.decoder import build_decoder_half, post_ecl, pre_ecl
from export.graphs.score import ScoreSpec, build_score
from export.memory_plan import ENGINE_SCRATCH, half_activations, score_activations, vision_activations
from export.spec import ModelSpec
from export.weights import WeightFile
from runtime.command_line import CommandParser, run_command
from runtime.errors import EngineError
from runtime.names import APPEND, PAST, TENSOR_SCATTER

SPLIT, LAYERS, KEEP, DTYPE, VALUE_BYTES = 2, 4, 166, "float16", 2
LOGGED = "Total Activation Memory: "
Sizes = Callable[[str], tuple[int, int]]  # an input's name -> what its open dimensions are at least and at most


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m benchmarks.engine_memory", description="Estimated and logged activation memory.")
    parser.add_argument("--model", default="llava15", help="a model of configs/models that has its geometry there")
    return parser


class Bench:
    """Builds one graph after another and reads the log."""

    def __init__(self, spec: ModelSpec) -> None:
        try:
            self._trt: Any = importlib.import_module("tensorrt_rtx")
        except ImportError as error:
            raise EngineError("TensorRT for RTX is not installed: pip install tensorrt-rtx-cu13==1.7.1.116") from error
        few = dataclasses.replace(spec.decoder, layers=LAYERS)
        self.spec = dataclasses.replace(spec, decoder=few, vision=dataclasses.replace(spec.vision, layers=LAYERS))
        self._shapes = find_adapter(spec.family).shapes(self.spec)
        self._random = np.random.default_rng(0)
        self.rows: list[dict[str, Any]] = []

    def half(self, name: str, rows: int, capacity: int, form: str) -> None:
        fixed = capacity if form == TENSOR_SCATTER else None
        first = pre_ecl(SPLIT, dtype=DTYPE, kv_write=form, capacity=fixed)
        half = first if name == "pre_ecl" else post_ecl(SPLIT, LAYERS, dtype=DTYPE, kv_write=form, capacity=fixed)
        scratch = ENGINE_SCRATCH if name == "pre_ecl" else ENGINE_SCRATCH // 2
        estimate = half_activations(
            self.spec.decoder, rows, capacity, VALUE_BYTES, fused=True, append=form == APPEND, scratch=scratch
        ) + (0 if name == "pre_ecl" else 4 * self.spec.decoder.vocab_size)  # fmt: skip
        self._measure(
            f"{name}, {rows} rows, {capacity} slots, {form}", estimate,
            lambda file: build_decoder_half(self.spec.decoder, half, self._read, file, capacity),
            lambda tensor: (capacity, capacity) if tensor.startswith(PAST) else (1, rows),
        )  # fmt: skip

    def vision(self) -> None:
        vision = self.spec.vision
        self._measure(
            "vision, 1 image", vision_activations(vision, VALUE_BYTES, fused=True),
            lambda file: build_clip_vision(vision, self._read, file, DTYPE), lambda tensor: (1, 1),
        )  # fmt: skip

    def score(self, mode: str) -> None:
        decoder, tokens = self.spec.decoder, self.spec.vision.visual_tokens
        score = ScoreSpec(
            heads=decoder.query_heads, head_size=decoder.head_size, hidden_size=decoder.hidden_size, position_rows=1, keep=KEEP,
            mode=mode, grid_width=self.spec.vision.grid, visual_tokens=None,
        )  # fmt: skip
        self._measure(
            f"score {mode}, {tokens} tokens",
            score_activations(decoder, tokens),
            lambda file: build_score(score),
            lambda tensor: (tokens, tokens),
        )

    def _read(self, name: str) -> np.ndarray:
        return self._random.standard_normal(self._shapes[name], dtype=np.float32) * np.float32(0.02)

    def _measure(self, what: str, estimate: int, build: Callable[[WeightFile], GraphBuilder], sizes: Sizes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.onnx"
            with WeightFile(Path(folder) / "weights.bin") as file:
                build(file).save(path)
            logged = self._logged(path, sizes)
        self.rows.append({"what": what, "estimated_bytes": estimate, "logged_bytes": logged, "ratio": round(estimate / logged, 2)})
        print(f"{what:<48}{estimate / 1e6:>10.1f} MB estimated{logged / 1e6:>10.1f} MB logged  {estimate / logged:.2f}", flush=True)

    def _logged(self, path: Path, sizes: Sizes) -> int:
        """Builds an engine for 8.6 and returns the activation bytes that the builder logs."""
        trt, lines = self._trt, list[str]()

        class Log(trt.ILogger):  # type: ignore[name-defined]
            def log(self, severity: object, message: str) -> None:
                lines.append(message)

        log = Log()
        builder = trt.Builder(log)
        network, config, profile = builder.create_network(0), builder.create_builder_config(), builder.create_optimization_profile()
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(path)):
            raise EngineError(f"{path.name} does not parse: {parser.get_error(0).desc()}")
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM86, 0)
        for tensor in (network.get_input(i) for i in range(network.num_inputs)):
            if -1 in tensor.shape:
                least, most = (tuple(size if n == -1 else n for n in tensor.shape) for size in sizes(tensor.name))
                profile.set_shape(tensor.name, least, most, most)
        config.add_optimization_profile(profile)
        if builder.build_serialized_network(network, config) is None:
            raise EngineError(f"no engine could be built: {lines[-1]}")
        return max(int(line.removeprefix(LOGGED).split()[0]) for line in lines if line.startswith(LOGGED))


def _run(args: argparse.Namespace) -> int:
    spec = load_model_config(args.model).spec
    if spec is None:
        raise EngineError(f"configs/models/{args.model}.toml has no geometry: choose another --model, such as llava15")
    bench = Bench(spec)
    for form in (TENSOR_SCATTER, APPEND):
        for name in ("pre_ecl", "post_ecl"):
            for rows in (230, 832, 2048):
                bench.half(name, rows, 2048, form)
    bench.vision()
    bench.score("trace")
    bench.score("dpp")
    print(json.dumps({"model": args.model, "rows": bench.rows}))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
