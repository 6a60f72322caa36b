"""FLOPs counted from graph files equal the closed formulas; the formula gives the published model's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.build import build_bundle
from export.flops import count_flops, decoder_flops
from export.graphs.score import ScoreSpec, build_score
from export.plan import BuildOptions, BuildPlan, make_plan
from export.report import TEXT_TOKENS, describe_report, format_bytes, format_flops, make_report
from runtime.manifest import Manifest, read_manifest
from tests.models import tiny_llava_checkpoint

LLAVA_7B = {"hidden": 4096, "kv_width": 4096, "intermediate": 11008}


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize(("text", "pruned", "dense"), [(0, 2.506e12, 7.634e12), (60, 3.297e12, 8.450e12)])
def test_formula_gives_the_figures_of_llava_15_7b_at_166_tokens(text: int, pruned: float, dense: float) -> None:
    full, kept = decoder_flops(576 + text, **LLAVA_7B), decoder_flops(166 + text, **LLAVA_7B)
    assert 32 * full == pytest.approx(dense, rel=2e-4)
    assert 2 * full + 30 * kept == pytest.approx(pruned, rel=2e-4)


def test_grouped_heads_take_less_in_keys_and_values_only() -> None:
    n, saved = 100, 4096 - 1024
    grouped = decoder_flops(n, **(LLAVA_7B | {"kv_width": 1024}))
    assert decoder_flops(n, **LLAVA_7B) - grouped == 2 * 2 * n * 4096 * saved


# ---------------------------------------------------------------- counting


def save_graph(
    path: Path, nodes: list[Any], inputs: dict[str, list[int | str]], outputs: dict[str, list[int | str]], **weights: np.ndarray
) -> Path:
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def test_a_matrix_product_counts_two_per_multiply_add(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Add", ["y", "b"], ["z"])]
    path = save_graph(tmp_path / "g.onnx", nodes, {"x": [1, "n", 5]}, {"z": [1, "n", 7]}, w=np.ones((5, 7)), b=np.ones(7))
    counted = count_flops(path, {"n": 3})
    assert (counted.matmul, counted.elementwise) == (2 * 3 * 5 * 7, 3 * 7)


def test_a_product_with_its_left_side_turned_counts_the_same(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["z"], transA=1)]
    path = save_graph(tmp_path / "g.onnx", nodes, {"x": [5, "n"]}, {"z": ["n", 7]}, w=np.ones((5, 7)), b=np.ones(7))
    assert count_flops(path, {"n": 3}).matmul == 2 * 3 * 5 * 7


def test_the_graph_of_mode_dpp_counts_its_kernel_its_means_and_a_growing_factor(tmp_path: Path) -> None:
    n, d, keep = 64, 48, 11
    spec = ScoreSpec(heads=8, head_size=6, hidden_size=d, position_rows=1, keep=keep, mode="dpp", grid_width=8)
    build_score(spec).save(tmp_path / "score.onnx")
    counted = count_flops(tmp_path / "score.onnx", {"N": n})
    assert counted.matmul == 2 * n * n * d + 2 * (2 * n * d) + sum(2 * n * r for r in range(1, keep))
    step = 2 + 3 * n  # Max, Sqrt; Div, ReduceSumSquare, Sub
    before = n * d * 7 + n * n  # Abs twice, Div, Sub twice, Mul; the sizes of tokens below
    places = 9 * n * n  # at the most: what cannot be sized is left out
    assert before - n * d < counted.elementwise - keep * step < before + 12 * n + places


def test_a_convolution_counts_its_kernel(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2])]
    path = save_graph(tmp_path / "g.onnx", nodes, {"x": ["n", 3, 8, 8]}, {"y": ["n", 6, 4, 4]}, w=np.ones((6, 3, 2, 2)))
    assert count_flops(path, {"n": 5}).matmul == 2 * (5 * 6 * 4 * 4) * (3 * 2 * 2)


def test_a_size_that_was_not_given_is_named(tmp_path: Path) -> None:
    path = save_graph(tmp_path / "g.onnx", [helper.make_node("Abs", ["x"], ["y"])], {"x": ["n"]}, {"y": ["n"]})
    with pytest.raises(ValueError, match=r"g.onnx has a dimension n that no size was given for"):
        count_flops(path, {"m": 3})


def test_a_product_of_unknown_shape_is_named_instead_of_counting_nothing(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    path = save_graph(tmp_path / "g.onnx", nodes, {"x": [1, 1]}, {"y": [1, "k"]})
    with pytest.raises(ValueError, match=r"the shape of MatMul .* is not known"):
        count_flops(path, {})


# ---------------------------------------------------------------- whole bundles

SHAPES: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("multi-head", 2, 6, {"image_size": 56}),
    ("grouped-query", 1, 4, {"hidden": 64, "heads": 8, "kv_heads": 2, "intermediate": 160, "image_size": 42}),
    ("one key-value head, tied", 3, 1, {"heads": 4, "kv_heads": 1, "tied": True, "image_size": 28, "vocab": 413}),
)


def built(folder: Path, split: int, keep: int, shape: dict[str, Any], debug: bool = False) -> tuple[BuildPlan, Manifest]:
    checkpoint = tiny_llava_checkpoint(folder / "checkpoint", **shape)
    plan = make_plan(BuildOptions("llava15", checkpoint=str(checkpoint), keep=(keep,), split_layer=split, debug=debug))
    return plan, build_bundle(plan, folder / "bundle")


def expected(plan: BuildPlan, layers: int, tokens: int) -> float:
    d = plan.spec.decoder
    return layers * decoder_flops(tokens, hidden=d.hidden_size, kv_width=d.kv_width, intermediate=d.intermediate_size)


@pytest.mark.parametrize(("name", "split", "keep", "shape"), SHAPES, ids=[s[0] for s in SHAPES])
def test_counts_of_a_bundle_equal_the_formula(name: str, split: int, keep: int, shape: dict[str, Any], tmp_path: Path) -> None:
    plan, manifest = built(tmp_path, split, keep, shape)
    d, v, n, text = plan.spec.decoder, plan.spec.vision, plan.visual_tokens, TEXT_TOKENS
    flops = manifest.flops
    assert flops["pre_ecl"] == expected(plan, split, n + text)
    assert flops["post_ecl"] == expected(plan, d.layers - split, n + text)
    assert flops[f"post_ecl.{keep}"] == expected(plan, d.layers - split, keep + text)
    assert flops["head"] == 2 * d.hidden_size * d.vocab_size
    rows, width = v.grid**2 + 1, v.hidden_size
    layer = 2 * rows * (4 * width**2 + 2 * width * v.intermediate_size) + 4 * rows**2 * width
    projector = 2 * n * (width * v.output_size + v.output_size**2)
    assert flops["vision"] == 2 * v.grid**2 * width * 3 * v.patch_size**2 + v.layers * layer + projector
    assert 0 < flops[f"score.{keep}"] < 0.05 * flops["pre_ecl"]


def test_debug_outputs_do_not_change_the_figures(tmp_path: Path) -> None:
    _, plain = built(tmp_path / "plain", *SHAPES[0][1:3], SHAPES[0][3])
    _, debug = built(tmp_path / "debug", *SHAPES[0][1:3], SHAPES[0][3], debug=True)
    assert debug.flops == plain.flops


# ---------------------------------------------------------------- the report


def test_report_adds_up(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    plan = make_plan(BuildOptions("llava15", checkpoint=str(tiny_checkpoint), keep=(4, 2), split_layer=2, max_context=512))
    manifest = read_manifest(tiny_bundle)
    report, flops = make_report(plan, manifest), manifest.flops
    assert report["decoder_flops_dense"] == flops["pre_ecl"] + flops["post_ecl"] + flops["head"]
    for budget, keep in zip(report["budgets"], (4, 2), strict=True):
        pruned = flops["pre_ecl"] + flops[f"score.{keep}"] + flops[f"post_ecl.{keep}"] + flops["head"]
        assert budget["decoder_flops"] == pruned
        assert budget["decoder_flops_share"] == pytest.approx(pruned / report["decoder_flops_dense"], abs=1e-4)
        assert budget["average_keep"] == (2 * 16 + 2 * keep) / 4
        assert budget["kv_bytes_of_one_image"] == {"pre_ecl": 2 * 2 * 4 * 16 * 4 * 16, "post_ecl": 2 * 2 * 4 * 16 * 4 * keep}
    assert report["bytes"] == {name: (tiny_bundle / name).stat().st_size for name in manifest.files}
    assert report["bytes_total"] == sum(report["bytes"].values())
    table = describe_report(report, tiny_bundle)
    for words in ("vision tower and projector", "language-model head", "keep 4", "keep 2", "KV cache of one image", str(tiny_bundle)):
        assert words in table


def test_sizes_and_flops_are_written_in_readable_units() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 1.2e6, 14e9, 3.5e12)] == ["0 B", "999 B", "1.0 kB", "1.2 MB", "14.0 GB", "3500.0 GB"]
    assert [format_flops(n) for n in (None, 5, 1.5e3, 2.5e9, 8.45e12)] == ["-", "5 FLOP", "1.5 kFLOP", "2.5 GFLOP", "8.45 TFLOP"]
