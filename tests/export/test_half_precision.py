"""Graphs in fp16 and bf16: where they stay in fp32, and how far fp16 is from the eager fp32 model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from export.build import build_bundle
from export.eager import EagerPrunedLlava
from export.graphs.score import ScoreSpec, build_score
from export.parity import compare_prompt, compare_selection, negative_controls
from export.plan import BuildOptions, make_plan
from export.tolerances import MAX_SWAP_DISTANCE, RELATIVE
from runtime.chain import EngineChain
from runtime.engines.onnxruntime import session_options
from runtime.errors import BundleError, UsageError
from runtime.manifest import read_manifest
from runtime.pipeline import VisionLanguageModel, load
from tests.conftest import ROOT

IMAGES = sorted((ROOT / "tiny_llava" / "heldout").glob("*.png"))[:3]
# Sums over many values, and what overflows or loses its digits in half precision.
WIDE_OPERATORS = {"Softmax", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Sqrt", "Log", "Exp", "CumSum"}


def export_tiny_llava(folder: Path, precision: str) -> Path:
    plan = dataclasses.replace(make_plan(BuildOptions("tiny-llava", keep=(16,), split_layer=6, score_mode="trace")), precision=precision)
    build_bundle(plan, folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny_llava(tmp_path_factory.mktemp("half") / "fp16", "fp16")


@pytest.fixture(scope="module")
def model(bundle: Path) -> VisionLanguageModel:
    return load(bundle)


@pytest.fixture(scope="module")
def eager(model: VisionLanguageModel) -> EagerPrunedLlava:
    return EagerPrunedLlava(ROOT / "tiny_llava" / "checkpoint", model.manifest.split_layer, None)


def narrow(model: onnx.ModelProto) -> Iterator[str]:
    """Names of nodes that belong into an island of fp32 and read half precision (or an unknown type)."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    types |= {t.name: t.data_type for t in inferred.initializer}
    wide = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64)
    for node in inferred.node:
        if node.op_type in WIDE_OPERATORS and types.get(node.input[0]) not in wide:
            yield node.name
        if node.op_type == "LayerNormalization":  # its own island: `stash_type` is the type of its statistics, fp32 unless given
            stash = {a.name: a.i for a in node.attribute}.get("stash_type", onnx.TensorProto.FLOAT)
            if stash != onnx.TensorProto.FLOAT:
                yield node.name


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_statistics_softmax_rotation_and_score_stay_in_fp32(precision: str, bundle: Path, tmp_path: Path) -> None:
    folder = bundle if precision == "fp16" else export_tiny_llava(tmp_path / "bf16", precision)
    half = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    for name in ("vision", "pre_ecl", "post_ecl", "score.16"):
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        assert list(narrow(graph)) == [], name
        types = {t.data_type for t in graph.graph.initializer if t.name.startswith(("layers.", "vision.", "projector.", "norm", "lm_head"))}
        assert types == ({half} if name != "score.16" else set())
        rotary = {t.data_type for t in graph.graph.initializer if t.name.startswith("rotary.")}
        assert rotary <= {onnx.TensorProto.FLOAT}


def test_an_island_in_half_precision_is_noticed(bundle: Path) -> None:
    graph = onnx.load(bundle / "pre_ecl.onnx", load_external_data=False)
    softmax = next(node for node in graph.graph.node if node.op_type == "Softmax")
    cast = next(node for node in graph.graph.node if node.op_type == "Cast" and softmax.output[0] in node.input)
    before = onnx.helper.make_node("Cast", [softmax.input[0]], ["narrowed"], to=onnx.TensorProto.FLOAT16)
    graph.graph.node.insert(list(graph.graph.node).index(softmax), before)
    softmax.input[0] = "narrowed"
    assert list(narrow(graph)) == [softmax.name]
    assert cast.attribute[0].i == onnx.TensorProto.FLOAT16


@pytest.mark.slow
def test_fp16_chain_is_close_to_the_eager_fp32_model(model: VisionLanguageModel, eager: EagerPrunedLlava) -> None:
    """Hidden states, queries, keys, values, logits within `tolerances`, 64 greedy tokens the same."""
    prompt = model.prompts.build("read row 2.", IMAGES[:1])
    kept = np.sort(np.random.default_rng(1).permutation(64)[:16])
    checks = list(compare_prompt(model.chain, eager, prompt, kept, "fp16"))
    assert [(c.name, c.error) for c in checks if not c.passed] == []
    assert max(c.error for c in checks) > RELATIVE["logits", "fp32"], "this is no fp16 graph"


def test_controls_fail_in_fp16_too(model: VisionLanguageModel, eager: EagerPrunedLlava) -> None:
    prompt = model.prompts.build("read row 2.", IMAGES[:1])
    controls = list(negative_controls(model.chain, eager, prompt, np.arange(1, 64, 2)))
    assert len(controls) == 3
    assert all(c.error > 3 * c.tolerance for c in controls), controls  # measured: 2.7e-02 and more, against 5e-03


def test_fp16_queries_choose_the_same_tokens(model: VisionLanguageModel, eager: EagerPrunedLlava) -> None:
    for image in IMAGES:
        quality, _ = compare_selection(model.chain, eager, model.prompts.build("read row 2.", [image]), 16)
        assert quality.swap_distance <= MAX_SWAP_DISTANCE
        assert 0 < quality.score_error <= 2e-4  # measured: 4.8e-05 over 40 images


def test_score_reads_half_precision_and_gives_rows_as_they_came(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    states, hidden = (rng.standard_normal((24, width)).astype(np.float16) for width in (64, 48))
    results = []
    for dtype in ("float16", "float32"):
        path = tmp_path / f"{dtype}.onnx"
        spec = ScoreSpec(heads=8, head_size=8, hidden_size=48, position_rows=1, keep=5, mode="trace", grid_width=6, dtype=dtype)
        build_score(spec).save(path)
        session = ort.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
        feeds = {"score_states": states.astype(dtype), "hidden_states": hidden.astype(dtype), "position_ids": np.arange(24)[None]}
        results.append(dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True)))
    half, single = results
    assert half["kept_hidden_states"].dtype == np.float16
    assert (half["kept_hidden_states"] == hidden[half["kept_indices"]]).all()
    assert (half["kept_indices"] == single["kept_indices"]).all()
    assert (half["token_entropy"] == single["token_entropy"]).all()
    with pytest.raises(UsageError, match="cannot read states of dtype 'int8'; expected float32, float16 or bfloat16"):
        dataclasses.replace(spec, dtype="int8")


def test_bf16_on_the_cpu_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = export_tiny_llava(tmp_path / "bf16", "bf16")
    with pytest.raises(BundleError, match=r"decoder's type is bfloat16, ONNX Runtime on a CPU runs float32 and float16: export .* as fp32"):
        EngineChain(folder, read_manifest(folder))
