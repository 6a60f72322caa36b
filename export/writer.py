"""Writes one bundle's files into a directory: texts, token table, weights once for each precision, graphs for each target.

Knows nothing about where the directory ends up, nor about engines.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path

from export import TOOL_VERSION
from export.graphs.builder import GraphBuilder
from export.graphs.clip import build_clip_vision
from export.graphs.decoder import HalfSpec, build_decoder_half, post_ecl, pre_ecl
from export.graphs.score import ScoreSpec, build_score
from export.plan import BuildPlan
from export.report import stage_flops
from export.spec import GRAPH_DTYPES
from export.text_files import bundle_text_files
from export.weights import WeightFile
from runtime import names
from runtime.manifest import FileInfo, Geometry, GraphInfo, Manifest, Source, Variant, schema_for, sha256_of

EMBEDDING_FILE = "embed_tokens.fp32.bin"
WEIGHTS_FILE = "weights.{precision}.bin"
Progress = Callable[[int], None]
Graphs = dict[str, GraphInfo]


@dataclass(slots=True)
class BundleWriter:
    """Writes the files and remembers their hashes. Graphs that two targets have alike are one file."""

    plan: BuildPlan
    directory: Path
    progress: Progress
    files: dict[str, FileInfo] = field(default_factory=dict)
    _written: dict[Hashable, GraphInfo] = field(default_factory=dict)

    def write(self) -> Manifest:
        """Writes everything but the manifest, which it returns."""
        self._text_files()
        self._embedding()
        plans = self.plan.each()
        graphs: dict[str, Graphs] = {}
        for precision in dict.fromkeys(plan.precision for plan in plans):
            with WeightFile(self.directory / WEIGHTS_FILE.format(precision=precision), self.progress) as file:
                for plan in plans:
                    if plan.precision == precision:
                        graphs[plan.target.name] = {**self._weight_graphs(plan, file), **self._score_graphs(plan)}
            self.files[file.path.name] = file.info()
        return self._manifest(graphs)

    def _embedding(self) -> None:
        with WeightFile(self.directory / EMBEDDING_FILE, self.progress) as file:
            file.add("embed_tokens.weight", self.plan.weights.read("embed_tokens.weight"))
        self.files[EMBEDDING_FILE] = file.info()

    def _weight_graphs(self, plan: BuildPlan, file: WeightFile) -> Graphs:
        spec, read, dtype = plan.spec, plan.weights.read, GRAPH_DTYPES[plan.precision]
        graphs = {
            names.VISION: self._graph(plan, names.VISION, dtype, lambda: build_clip_vision(spec.vision, read, file, dtype))
        }  # fmt: skip
        for half in decoder_halves(plan):
            graphs[half.name] = self._graph(
                plan,
                half.name,
                half,
                lambda half=half: build_decoder_half(spec.decoder, half, read, file, plan.max_context),  # type: ignore[misc]
            )
        return graphs

    def _score_graphs(self, plan: BuildPlan) -> Graphs:
        decoder, dtype = plan.spec.decoder, GRAPH_DTYPES[plan.precision]
        graphs = {}
        for keep in plan.budgets:
            spec = ScoreSpec(
                heads=decoder.query_heads, head_size=decoder.head_size, hidden_size=decoder.hidden_size, position_rows=1, keep=keep,
                mode=plan.score_mode, grid_width=plan.spec.vision.grid, visual_tokens=None, dtype=dtype,
            )  # fmt: skip
            name = names.score_graph(keep)
            graphs[name] = self._graph(plan, name, spec, lambda spec=spec: build_score(spec))  # type: ignore[misc]
        return graphs

    def _graph(self, plan: BuildPlan, name: str, key: Hashable, build: Callable[[], GraphBuilder]) -> GraphInfo:
        """Builds and writes a graph, unless another target has the same one."""
        if (name, key) not in self._written:
            builder = build()
            own = "" if plan.target == self.plan.target else f".{plan.target.name}"
            path = self.directory / f"{name}{own}.onnx"
            builder.save(path)
            self._file(path.name)
            self._written[name, key] = GraphInfo(path.name, builder.inputs, builder.outputs)
        return self._written[name, key]

    def _text_files(self) -> None:
        for name, text in bundle_text_files(self.plan).items():
            (self.directory / name).write_text(text, encoding="utf-8")
            self._file(name)

    def _file(self, name: str) -> None:
        path = self.directory / name
        self.files[name] = FileInfo(path.stat().st_size, sha256_of(path))

    def _manifest(self, graphs: dict[str, Graphs]) -> Manifest:
        plan, d = self.plan, self.plan.spec.decoder
        own = graphs[plan.target.name]
        variants = {
            other.target.name: Variant(other.target.library, other.precision, other.kv_write, graphs[other.target.name], other.memory)
            for other in plan.each()[1:]
        }
        told = bool(variants) or plan.kv_write != names.IN_PLACE or plan.target.library != "onnxruntime"
        return Manifest(
            schema_version=schema_for(plan.auto_keep, plan.memory, targets=told), tool_version=TOOL_VERSION,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            family=plan.model.family, model=plan.model.name, target=plan.target.name, precision=plan.precision,
            source=Source(plan.checkpoint.name, plan.checkpoint.revision),
            geometry=Geometry(
                layers=d.layers, hidden_size=d.hidden_size, query_heads=d.query_heads, kv_heads=d.kv_heads, head_size=d.head_size,
                vocab_size=d.vocab_size, position_rows=1, visual_tokens=plan.visual_tokens,
            ),
            split_layer=plan.split_layer, score_mode=plan.score_mode, budgets=plan.budgets, max_context=plan.max_context,
            image_token=plan.checkpoint.image_token(plan.spec.image_token_id), image_token_id=plan.spec.image_token_id,
            embedding=EMBEDDING_FILE, graphs=own, files=self.files, flops=stage_flops(plan, self.directory, own), memory=plan.memory,
            auto_keep=plan.auto_keep, engine=plan.target.library if told else None, kv_write=plan.kv_write, variants=variants,
        )  # fmt: skip


def decoder_halves(plan: BuildPlan) -> tuple[HalfSpec, HalfSpec]:
    """Both halves as a plan's first target has them."""
    dtype, form, capacity = GRAPH_DTYPES[plan.precision], plan.kv_write, plan.capacity
    return (
        pre_ecl(plan.split_layer, dtype=dtype, debug=plan.debug, kv_write=form, capacity=capacity),
        post_ecl(
            plan.split_layer, plan.spec.decoder.layers, dtype=dtype, debug=plan.debug, kv_write=form, capacity=capacity,
            head_pieces=plan.head_pieces,
        ),
    )  # fmt: skip
