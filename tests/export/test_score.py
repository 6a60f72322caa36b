"""The score graph against float64 eigenvalues, and what it keeps."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from benchmarks.spectra import SPECTRA, synthetic_states
from export.exact_score import select_tokens, token_scores
from export.graphs.quadrature import ENTROPY, derive
from export.graphs.score import ScoreSpec, build_score, random_scores, uniform_scores
from runtime.engines.onnxruntime import session_options
from runtime.errors import UsageError
from runtime.names import SCORE_MODES
from tests.conftest import ROOT

Scores = npt.NDArray[np.floating]

SHAPES = ((32, 128), (28, 128), (40, 128), (8, 24), (4, 48), (3, 16), (16, 8), (5, 2))
# Largest error over all shapes and spectra, against float64 eigenvalues: `trace` and `row` absolute; `raw` and the energies divided by
# t (1 + |ln t|), t the energy. The bound is about twice what was measured.
ERRORS = {
    "trace": 1e-5,  # 5.0e-6 (3 heads, near rank 1); 32 heads of 128: 2.1e-6
    "row": 1.2e-5,  # 6.0e-6 (head size 2, near rank 1); 32 heads of 128: 1.4e-6
    "raw": 4e-6,  # 2.0e-6 (3 heads, correlated); 32 heads of 128: 4.7e-7
    "energy-high": 3e-7,  # 1.5e-7 (head size 2, correlated); 32 heads of 128: 4.9e-8
    "energy-low": 3e-7,
}
# What TensorRT-RTX 1.7 was seen to build; NonZero, Unique, Compress, Einsum, Det, Loop and Scan must stay out.
OPERATORS = {
    "Abs", "Add", "Cast", "Concat", "Div", "Exp", "Gather", "Gemm", "Greater", "Identity", "Less", "LessOrEqual", "Log", "MatMul",
    "Max", "Mod", "Mul", "Neg", "Range", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare", "Reshape",
    "ScatterElements", "Shape", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "TopK", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


def spec_of(mode: str, heads: int = 8, head_size: int = 24, keep: int = 10, **changes: int | None) -> ScoreSpec:
    sizes: dict[str, int | None] = {"hidden_size": 6, "position_rows": 1, "grid_width": 8, **changes}
    return ScoreSpec(heads=heads, head_size=head_size, keep=keep, mode=mode, **sizes)  # type: ignore[arg-type]


@functools.cache
def session(spec: ScoreSpec) -> onnxruntime.InferenceSession:
    model = ir.to_proto(build_score(spec).model()).SerializeToString()
    return onnxruntime.InferenceSession(model, session_options(1), providers=["CPUExecutionProvider"])


def run(spec: ScoreSpec, states: Scores, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states whose first column is the token's index, positions 100 + index (plus 1000 for each further row)."""
    tokens = len(states)
    hidden = np.random.default_rng(0).standard_normal((tokens, spec.hidden_size)).astype(np.float32)
    hidden[:, 0] = np.arange(tokens)
    positions = 100 + np.arange(tokens) + 1000 * np.arange(spec.position_rows)[:, None]
    feeds = {"score_states": states, "hidden_states": hidden, "position_ids": positions}
    if spec.mode == "random":
        feeds["image_seed"] = np.array([seed], np.int64)
    hidden_kept, positions_kept, indices, scores = session(spec).run(None, feeds)
    return hidden_kept, positions_kept, indices, scores


def errors(mode: str, heads: int, states: Scores, scores: Scores) -> Scores:
    """Each token's error in the units of ERRORS."""
    error = np.abs(scores - token_scores(states.astype(np.float32).reshape(len(states.astype(np.float32)), heads, -1), mode))
    if mode in ("trace", "row"):
        return error
    energy = token_scores(states.astype(np.float32).reshape(len(states.astype(np.float32)), heads, -1), "energy-high")
    return np.asarray(error / (energy * (1 + np.abs(np.log(energy)))))


# ------------------------------------------------------------ against eigenvalues


@pytest.mark.parametrize("mode", list(ERRORS))
@pytest.mark.parametrize(("heads", "head_size"), SHAPES)
def test_scores_equal_float64_eigenvalues_on_all_spectra(heads: int, head_size: int, mode: str) -> None:
    for kind in SPECTRA:
        states = synthetic_states(kind, 96, heads, head_size)
        scores = run(spec_of(mode, heads, head_size), states)[3]
        assert np.isfinite(scores).all(), kind
        assert errors(mode, heads, states, scores).max() < ERRORS[mode], kind


@pytest.mark.parametrize("mode", ["trace", "row", "raw"])
def test_the_kept_set_is_the_exact_one_but_for_ties_within_twice_the_error(mode: str) -> None:
    overlaps = []
    for kind in SPECTRA:
        states = synthetic_states(kind, 576, 32, 128, seed=1)
        exact = token_scores(states.reshape(len(states), 32, -1), mode)
        for keep in (64, 128, 192):
            *_, kept, scores = run(spec_of(mode, 32, 128, keep), states)
            expected = select_tokens(exact, keep)
            overlaps.append(len(np.intersect1d(kept, expected)) / keep)
            swapped = np.setxor1d(kept, expected)
            measured = np.abs(scores - exact).max()
            assert (np.abs(exact[swapped] - exact[expected].min()) <= 2 * measured).all(), (kind, keep)
    assert np.mean(overlaps) >= 0.99  # measured: 1.0


def test_a_graph_that_forgets_to_centre_the_heads_would_be_noticed() -> None:
    states = synthetic_states("gaussian", 64, 8, 24) + np.tile(np.linspace(-2, 2, 24, dtype=np.float32), 8)
    scores = run(spec_of("trace"), states)[3]
    assert errors("trace", 8, states, scores).max() < ERRORS["trace"]
    q = states.astype(np.float64).reshape(64, 8, 24)
    gram = q @ q.transpose(0, 2, 1)
    eigenvalues = np.linalg.eigvalsh(gram / np.trace(gram, axis1=1, axis2=2)[:, None, None]).clip(1e-10)
    uncentred = -(eigenvalues * np.log(eigenvalues)).sum(1) / np.log(8)
    assert np.abs(scores - uncentred).min() > 100 * ERRORS["trace"]


def test_scaling_the_queries_changes_raw_scores_but_not_trace_and_row_scores() -> None:
    states = synthetic_states("correlated", 64, 8, 24)
    scaled = (states / np.sqrt(24)).astype(np.float32)
    for mode in ("trace", "row"):
        assert np.abs(run(spec_of(mode), states)[3] - run(spec_of(mode), scaled)[3]).max() < ERRORS[mode]
    before, after = run(spec_of("raw"), states), run(spec_of("raw"), scaled)
    assert np.abs(before[3] - after[3]).min() > 100 * ERRORS["raw"]
    assert before[2].tolist() != after[2].tolist()


@pytest.mark.parametrize("mode", ["trace", "row", "raw"])
def test_rotating_all_heads_of_a_token_alike_leaves_its_score(mode: str) -> None:
    states = synthetic_states("correlated", 64, 8, 24)
    angle = np.arange(64)[:, None] * 10_000.0 ** (-np.arange(12) / 12)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = np.split(states.reshape(64, 8, 24).astype(np.float64), 2, axis=-1)
    rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    before, after = (run(spec_of(mode), s.reshape(64, -1).astype(np.float32))[3] for s in (states, rotated))
    assert np.abs(before - after).max() < 2 * ERRORS[mode] * max(1.0, float(np.abs(before).max()))
    rotated[:, 0] = first[:, 0].repeat(2, -1)  # one head turned otherwise
    assert np.abs(before - run(spec_of(mode), rotated.reshape(64, -1).astype(np.float32))[3]).max() > 100 * ERRORS[mode]


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6, 1e12])
def test_trace_and_row_scores_do_not_depend_on_the_size_of_the_queries(size: float) -> None:
    states = (synthetic_states("power", 32, 8, 24) * size).astype(np.float32)
    for mode in ("trace", "row"):
        assert errors(mode, 8, states, run(spec_of(mode), states)[3]).max() < ERRORS[mode]


# ------------------------------------------------------------ unusual tokens


@pytest.mark.parametrize("mode", ["trace", "row", "raw"])
def test_degenerate_tokens_score_exactly_what_they_should(mode: str) -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((8, 8, 24))
    q[0] = 0
    q[1] = q[1, :1]  # all heads alike: nothing is left after centring
    q[2] = np.array([1, -1] * 4)[:, None] * q[2, :1]  # rank 1
    q[3, 2:] = 0
    q[4, :, 1:] = 0
    states = q.reshape(8, -1).astype(np.float32)
    scores = run(spec_of(mode, keep=3), states)[3]
    assert scores[0] == 0.0
    assert abs(scores[1]) < ERRORS[mode]
    assert errors(mode, 8, states[2:], scores[2:]).max() < ERRORS[mode]


@pytest.mark.parametrize("mode", list(ERRORS))
def test_tokens_that_are_not_finite_rank_lowest_stay_visible_and_leave_the_others_alone(mode: str) -> None:
    states = synthetic_states("gaussian", 16, 8, 24)
    clean = run(spec_of(mode, keep=13), states)[3]
    broken = states.copy()
    broken[2, 5], broken[7, 100], broken[11] = np.nan, np.inf, 1e30 * states[11]  # the last one's squares overflow
    *_, kept, scores = run(spec_of(mode, keep=13), broken)
    others = np.setdiff1d(np.arange(16), (2, 7, 11))
    assert kept.tolist() == others.tolist()
    assert not np.isfinite(scores[[2, 7, 11]]).any()
    assert (scores[others] == clean[others]).all()
    assert run(spec_of(mode, keep=14), broken)[2].tolist() == sorted([*others.tolist(), 2]), "of equals, the lower index"


@pytest.mark.parametrize("mode", list(ERRORS))
def test_of_equal_scores_the_lower_indices_are_kept(mode: str) -> None:
    assert run(spec_of(mode, keep=5), np.zeros((64, 192), np.float32))[2].tolist() == [0, 1, 2, 3, 4]


# ------------------------------------------------------------ what is kept


@pytest.mark.parametrize("mode", SCORE_MODES)
@pytest.mark.parametrize("tokens", [1, 10, 65, 130])
def test_kept_rows_are_the_highest_scores_in_order_with_their_own_positions(mode: str, tokens: int) -> None:
    keep = min(10, tokens)
    spec = spec_of(mode, keep=keep, position_rows=3)
    states = synthetic_states("gaussian", tokens, 8, 24)
    hidden, positions, kept, scores = run(spec, states, seed=5)
    assert kept.dtype == np.int64
    assert kept.tolist() == select_tokens(scores, keep).tolist()
    assert (np.diff(kept) > 0).all()
    assert hidden.shape == (keep, 6)
    assert hidden[:, 0].tolist() == kept.tolist()
    assert positions.tolist() == (100 + kept + 1000 * np.arange(3)[:, None]).tolist()


def test_the_energy_modes_are_each_others_negative() -> None:
    states = synthetic_states("power", 20, 8, 24)
    high, low = run(spec_of("energy-high"), states), run(spec_of("energy-low"), states)
    assert (high[3] == -low[3]).all()
    assert sorted([*high[2], *low[2]]) == list(range(20))


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 2, 2**31 - 1, 2**62 + 12345, -7])
def test_random_scores_equal_the_twin_and_plain_integers(seed: int) -> None:
    scores = run(spec_of("random"), np.zeros((64, 192), np.float32), seed)[3]
    assert (scores == random_scores(seed, 64)).all()
    prime, key = 2**31 - 1, (48271 * pow(seed, 5, 2**31 - 1) + 11) % (2**31 - 1)
    once = [(48271 * pow(key + i, 5, prime) + 11) % prime for i in range(64)]
    assert scores.tolist() == [(48271 * pow(x, 5, prime) + 11) % prime // 128 / 2**24 for x in once]


def test_random_scores_are_even_over_tokens_and_change_with_the_seed() -> None:
    kept = np.zeros(64)
    for seed in range(400):
        kept[select_tokens(random_scores(seed, 64), 16)] += 1
    assert abs(kept / 400 - 0.25).max() < 0.1  # 4.6 standard deviations; measured: 0.06
    assert len({tuple(select_tokens(random_scores(seed, 64), 16)) for seed in range(400)}) == 400


@pytest.mark.parametrize(("tokens", "width"), [(64, 8), (576, 24), (2880, 24), (50, 7), (3, 8)])
def test_uniform_scores_equal_the_twin_and_are_all_different(tokens: int, width: int) -> None:
    scores = run(spec_of("uniform", keep=2, grid_width=width), np.zeros((tokens, 192), np.float32))[3]
    assert (scores == uniform_scores(tokens, width)).all()
    assert len(set(scores.tolist())) == tokens


@pytest.mark.parametrize("keep", [9, 16, 24, 29, 48, 64, 98, 166, 288])
def test_a_uniform_selection_covers_the_grid_evenly(keep: int) -> None:
    cells = np.stack(np.divmod(np.arange(576), 24), 1)

    def reach(indices: np.ndarray) -> float:
        """The largest distance from any cell to the nearest kept one, in units of an ideal grid's spacing."""
        return float(np.linalg.norm(cells[:, None] - cells[indices], axis=-1).min(1).max() / np.sqrt(576 / keep))

    even = reach(select_tokens(uniform_scores(576, 24), keep))
    assert even < 1.35  # measured: 0.71 to 1.29; a square grid has 0.71
    assert even < 0.95 * np.mean([reach(select_tokens(random_scores(seed, 576), keep)) for seed in range(20)])  # measured: 0.51 to 0.92


def test_one_uniform_token_is_the_middle_one() -> None:
    assert select_tokens(uniform_scores(576, 24), 1).tolist() == [12 * 24 + 12]


def test_a_known_number_of_tokens_gives_the_same_result_as_a_symbolic_one() -> None:
    states = synthetic_states("power", 64, 8, 24)
    for mode in SCORE_MODES:
        for symbolic, fixed in zip(run(spec_of(mode), states), run(spec_of(mode, visual_tokens=64), states), strict=True):
            assert (symbolic == fixed).all()


# ------------------------------------------------------------ the graph itself


@pytest.mark.parametrize("mode", SCORE_MODES)
def test_the_graph_has_the_documented_inputs_and_outputs(mode: str) -> None:
    b = build_score(spec_of(mode, heads=8, head_size=24, keep=10, position_rows=3))
    inputs = [("score_states", "float32", ("N", 192)), ("hidden_states", "float32", ("N", 6)), ("position_ids", "int64", (3, "N"))]
    seed = [("image_seed", "int64", (1,))] if mode == "random" else []
    assert [(i.name, i.dtype, i.shape) for i in b.inputs] == inputs + seed
    assert [(o.name, o.dtype, o.shape) for o in b.outputs] == [
        ("kept_hidden_states", "float32", (10, 6)),
        ("kept_position_ids", "int64", (3, 10)),
        ("kept_indices", "int64", (10,)),
        ("token_entropy", "float32", ("N",)),
    ]


@pytest.mark.parametrize("mode", SCORE_MODES)
def test_the_graph_is_valid_opset_20_with_operators_that_tensorrt_builds(mode: str) -> None:
    model = ir.to_proto(build_score(spec_of(mode)).model())
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert {n.op_type for n in model.graph.node} <= OPERATORS


def test_tensorrts_own_table_lists_every_operator_used() -> None:
    named = os.environ.get("ENTROPY_PRUNE_TENSORRT_OPERATORS")
    path = Path(named) if named else ROOT.parent / "shared" / "facts" / "tensorrt-10.1-onnx-operators.json"
    if not path.is_file():
        pytest.skip(f"no table {path}: set ENTROPY_PRUNE_TENSORRT_OPERATORS to TensorRT 10.1's list of operators as JSON")
    table = json.loads(path.read_text(encoding="utf-8"))["operators"]
    assert [op for op in sorted(OPERATORS) if not table.get(op, {}).get("supported")] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "entropy"}, "unknown score mode 'entropy'; expected one of trace, row"),
        ({"mode": "trace", "heads": 2}, "needs at least 3 heads, got 2: .*always 0"),
        ({"mode": "row", "heads": 1}, "needs at least 3 heads, got 1"),
        ({"mode": "raw", "heads": 2}, "needs at least 3 heads, got 2"),
        ({"mode": "trace", "head_size": 1}, "head size of at least 2, got 1"),
        ({"mode": "trace", "keep": 0}, "keep is 0, expected 1 or more"),
        ({"mode": "uniform", "grid_width": 0}, "grid_width is 0"),
        ({"mode": "trace", "keep": 65, "visual_tokens": 64}, "cannot keep 65 of 64 visual tokens"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_reason(changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        spec_of(**changes)


def test_modes_without_entropy_accept_two_heads() -> None:
    states = synthetic_states("gaussian", 16, 2, 24)
    for mode in ("dpp", "energy-high", "energy-low", "random", "uniform"):
        assert len(run(spec_of(mode, heads=2), states)[2]) == 10


# ------------------------------------------------------------ the quadrature


def test_the_stored_quadrature_is_the_one_that_can_be_derived_again() -> None:
    derived = derive()
    assert derived.nodes == ENTROPY.nodes
    assert derived.relative_weights == pytest.approx(ENTROPY.relative_weights, rel=1e-3)
    assert derived.traces == pytest.approx(ENTROPY.traces, rel=1e-3)
    assert derived.error == pytest.approx(ENTROPY.error, rel=1e-2)


def test_the_quadratures_error_is_bounded_as_stated() -> None:
    x = np.concatenate([np.geomspace(1e-12, 1, 20_011), np.linspace(1e-3, 1, 20_011)])
    error = np.abs(ENTROPY.entropy(x[:, None]) + x * np.log(x))
    assert (error / (x + 1 / 32)).max() <= 1.01 * ENTROPY.error
    rng = np.random.default_rng(0)
    for size in (3, 8, 32, 40, 128):
        spectra = rng.gamma(10 ** rng.uniform(-2, 1, (500, 1)), size=(500, size)).clip(1e-30)
        spectra /= spectra.sum(1, keepdims=True)
        worst = np.abs(ENTROPY.entropy(spectra) + (spectra * np.log(spectra)).sum(1)).max()
        assert worst <= ENTROPY.error * (1 + size / 32)


@pytest.mark.parametrize(
    ("heads", "mode", "message"),
    [(8, "loudest", "unknown score mode"), (2, "trace", "at least 3"), (2, "row", "at least 3")],
)
def test_the_reference_refuses_what_it_cannot_score(heads: int, mode: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        token_scores(np.zeros((4, heads, 48), np.float32), mode)
