"""The score graph in mode `dpp` against its float64 definition, and the definition against plain determinants."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest

from export.exact_dpp import VARIANCE_FLOOR, dpp_order, greedy_shortfall, log_determinant
from export.exact_score import check_score_mode, token_scores
from export.graphs import dpp
from export.graphs.score import ScoreSpec, build_score
from export.parity import determinantal_quality
from export.tolerances import MAX_DETERMINANT_GAP, MAX_SHORTFALL
from runtime.engines.onnxruntime import session_options
from runtime.errors import UsageError

Rows = npt.NDArray[np.float32]

GRID = 8  # patches in a row, of 64 tokens
ERROR = 1e-5  # of a variance; measured 3.2e-6 (64 tokens of 3, a mean 100 times the spread); 576 tokens of 64: 1.2e-6
SHAPES = ((1, 6, 1), (2, 6, 1), (10, 6, 10), (64, 192, 11), (65, 48, 65), (130, 6, 40), (64, 3, 20), (300, 512, 98), (576, 64, 166))


@functools.cache
def session(width: int, keep: int, tokens: int | None = None, grid: int = GRID) -> onnxruntime.InferenceSession:
    spec = ScoreSpec(
        heads=2, head_size=3, hidden_size=width, position_rows=1, keep=keep, mode="dpp", grid_width=grid, visual_tokens=tokens
    )  # fmt: skip
    model = ir.to_proto(build_score(spec).model()).SerializeToString()
    return onnxruntime.InferenceSession(model, session_options(1), providers=["CPUExecutionProvider"])


def run(hidden: npt.ArrayLike, keep: int, tokens: int | None = None, grid: int = GRID) -> tuple[np.ndarray, np.ndarray]:
    """Kept indices [R] and scores [N]."""
    rows = np.asarray(hidden, np.float32)
    feeds = {
        "score_states": np.full((len(rows), 6), np.nan, np.float32),  # not looked at
        "hidden_states": rows,
        "position_ids": np.arange(len(rows))[None],
    }
    kept, scores = session(rows.shape[1], keep, tokens, grid).run(["kept_indices", "token_entropy"], feeds)
    return kept, scores


def rows_of(tokens: int, width: int, kind: str = "gaussian", seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((tokens, width))
    if kind == "mean":
        rows += 100 * rng.standard_normal(width)
    elif kind == "power":
        rows *= np.exp(rng.standard_normal(width))
    elif kind == "clusters":
        rows = 0.1 * rows + rng.standard_normal((max(1, tokens // 8), width))[rng.integers(0, max(1, tokens // 8), tokens)]
    return rows.astype(np.float32)


# ------------------------------------------------------------ the definition


def test_each_step_takes_the_token_that_makes_the_determinant_largest() -> None:
    """By the determinants themselves, no Cholesky factor."""
    rows = rows_of(12, 20).astype(np.float64)
    x = rows - rows.mean(0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    kernel = (1 + x @ x.T) / 2
    for i, j in itertools.product(range(12), range(12)):
        kernel[i, j] *= np.exp(-2 * ((i // GRID - j // GRID) ** 2 + (i % GRID - j % GRID) ** 2) / GRID**2)
    order, variances = dpp_order(rows, 7, GRID)
    taken = [0]
    for _ in range(6):
        found = {j: float(np.linalg.det(kernel[np.ix_([*taken, j], [*taken, j])])) for j in range(12) if j not in taken}
        taken.append(max(found, key=lambda j: found[j]))
    assert order.tolist() == taken
    assert np.log(variances[order]).sum() == pytest.approx(np.linalg.slogdet(kernel[np.ix_(taken, taken)])[1])
    assert log_determinant(rows, order, GRID) == pytest.approx(np.log(variances[order]).sum(), abs=1e-3)


def test_a_shortfall_is_what_a_wrong_step_forwent() -> None:
    rows = rows_of(40, 30)
    order, variances = dpp_order(rows, 8, GRID)
    assert greedy_shortfall(rows, order, GRID) == 0.0
    worst = int(np.argmin(np.where(np.isin(np.arange(40), order), 9.0, variances)))
    last = dpp_order(rows, 7, GRID)[1]
    assert greedy_shortfall(rows, [*order[:7], worst], GRID) == pytest.approx(last[order[7]] - last[worst])
    assert greedy_shortfall(rows, order[::-1], GRID) > 0.01


def test_the_choice_of_another_set_is_judged_by_its_steps_and_its_determinant() -> None:
    rows = rows_of(64, 48)
    order, exact = dpp_order(rows, 11, GRID)
    best = np.sort(order)
    same = determinantal_quality(rows, best, exact, best, exact, GRID)
    assert (same.overlap, same.score_error, same.shortfall, same.determinant_gap) == (1.0, 0.0, 0.0, 0.0)
    lazy = np.arange(11)
    other = determinantal_quality(rows, best, exact, lazy, np.where(np.arange(64) < 11, 1.0 - np.arange(64) / 64, 0.0), GRID)
    assert other.overlap < 0.6
    assert np.isnan(other.score_error)
    assert other.shortfall > 100 * MAX_SHORTFALL
    alike = rows_of(64, 48, "clusters")
    order, exact = dpp_order(alike, 8, GRID)
    assert determinantal_quality(alike, np.sort(order), exact, np.arange(8), exact, GRID).determinant_gap > MAX_DETERMINANT_GAP
    assert determinantal_quality(rows, best, exact, lazy, None, GRID).shortfall == np.inf


def test_a_mode_of_hidden_states_has_no_score_of_heads_but_takes_any_number_of_them() -> None:
    check_score_mode("dpp", 1)
    with pytest.raises(UsageError, match=r"'dpp' has no score of heads: give the hidden states to export\.exact_dpp\.dpp_order"):
        token_scores(np.zeros((4, 8, 3)), "dpp")


# ------------------------------------------------------------ the graph against it


@pytest.mark.parametrize("kind", ["gaussian", "mean", "power", "clusters"])
@pytest.mark.parametrize(("tokens", "width", "keep"), SHAPES)
def test_kept_tokens_and_variances_are_those_of_the_definition(tokens: int, width: int, keep: int, kind: str) -> None:
    rows, grid = rows_of(tokens, width, kind), math.ceil(math.sqrt(tokens))
    order, exact = dpp_order(rows, keep, grid)
    kept, scores = run(rows, keep, grid=grid)
    assert kept.dtype == np.int64
    taken = kept[np.argsort(-scores[kept], kind="stable")]
    assert greedy_shortfall(rows, taken, grid) < 1.2e-5  # measured 1.4e-7; a variance at the floor may count as 0 on one side alone
    if kind != "clusters" and exact[order].min() > 1e-3:  # elsewhere tokens are close enough to equals for float32 to choose otherwise
        assert taken.tolist() == order.tolist()
        assert np.abs(scores - exact).max() < ERROR
    fixed = run(rows, keep, tokens, grid)
    assert (fixed[0] == kept).all()
    assert (fixed[1] == scores).all()


def test_graph_and_definition_share_their_floor() -> None:
    assert VARIANCE_FLOOR == dpp.VARIANCE_FLOOR


def test_a_kernel_that_is_not_centred_or_not_moved_to_0_to_1_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(64, 48, "mean")
    expected = sorted(dpp_order(rows, 11, GRID)[0].tolist())
    assert run(rows, 11)[0].tolist() == expected
    place = np.stack(np.divmod(np.arange(64), GRID), 1)
    near = np.exp(-2 * ((place[:, None] - place[None]) ** 2).sum(2) / GRID**2)
    x = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert greedy(x, (1 + x @ x.T) / 2 * near) != expected
    y = rows - rows.mean(0)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    assert greedy(y, (1 + y @ y.T) / 2 * near) == expected
    assert greedy(y, (1 + y @ y.T) / 2) != expected
    assert greedy(y, y @ y.T * near) != expected
    assert greedy(y, (1 - y @ y.T) / 2 * near + np.eye(64)) != expected


def greedy(rows: Rows, kernel: np.ndarray) -> list[int]:
    """11 tokens, ascending, by variances after regression on those taken."""
    taken = [0]
    while len(taken) < 11:
        inner = kernel[np.ix_(taken, taken)]
        left = np.diag(kernel) - (kernel[:, taken] * np.linalg.lstsq(inner, kernel[taken], rcond=None)[0].T).sum(1)
        left[taken] = -1
        taken.append(int(left.argmax()))
    return sorted(taken)


def test_a_smaller_budgets_set_lies_within_a_larger_ones() -> None:
    rows = rows_of(80, 96, "clusters")
    sets = [set(run(rows, keep)[0].tolist()) for keep in (1, 2, 7, 20, 45, 80)]
    assert all(small < large for small, large in itertools.pairwise(sets))
    assert sets[-1] == set(range(80))


@pytest.mark.parametrize("size", [1e-25, 1e-10, 1e10, 1e37])
def test_the_size_of_the_hidden_states_does_not_matter(size: float) -> None:
    rows = rows_of(64, 48, "power")
    kept, scores = run(rows, 11)
    scaled = run(rows.astype(np.float64) * size / np.abs(rows).max(), 11)
    assert scaled[0].tolist() == kept.tolist()
    assert np.abs(scaled[1] - scores).max() < ERROR


def test_the_same_tokens_give_the_same_bits() -> None:
    rows = rows_of(130, 48, "clusters")
    first = run(rows, 40)
    session.cache_clear()
    again = run(rows, 40)
    assert first[0].tobytes() == again[0].tobytes()
    assert first[1].tobytes() == again[1].tobytes()


# ------------------------------------------------------------ unusual tokens


def test_like_things_at_two_places_are_two_things() -> None:
    rows = np.zeros((64, 48), np.float32)
    rows[:] = rows_of(1, 48)  # the ground
    rows[[9, 54]] = rows_of(2, 48, seed=3)[1]  # one thing, twice
    rows[[10, 53]] += rows_of(1, 48, seed=4) * 0.01
    kept, _ = run(rows, 4)
    assert {9, 54} <= set(kept)
    assert kept.tolist() == sorted(dpp_order(rows, 4, GRID)[0])


@pytest.mark.parametrize("value", [0.0, 0.3, -1234.5])
def test_of_an_image_without_content_the_corners_are_kept(value: float) -> None:
    kept, scores = run(np.broadcast_to(rows_of(1, 48) * value, (64, 48)), 4)
    assert kept.tolist() == [0, 7, 56, 63]
    assert np.abs(scores - dpp_order(np.zeros((64, 48)), 4, GRID)[1]).max() < ERROR


@pytest.mark.parametrize("tokens", [7, 577])
def test_an_image_without_content_is_covered_evenly_whatever_its_size(tokens: int) -> None:
    rows = np.broadcast_to(rows_of(1, 48), (tokens, 48))
    kept, scores = run(rows, 5)
    taken = kept[np.argsort(-scores[kept], kind="stable")]
    assert greedy_shortfall(rows, taken, GRID) < 1e-6
    assert kept.tolist() != [0, 1, 2, 3, 4]


def test_a_token_at_the_mean_is_like_one_that_is_at_a_right_angle_to_all() -> None:
    rows = rows_of(18, 48)
    rows[8:10] = 0
    rows -= rows.mean(0) * np.float32(18 / 16) * (rows != 0)  # the zeros are the mean, but for rounding
    kept, scores = run(rows, 9)
    order, exact = dpp_order(rows, 9, GRID)
    assert kept.tolist() == sorted(order)
    assert np.abs(scores - exact).max() < ERROR
    near = math.exp(-2 / GRID**2) / 2
    assert run(rows[8:10], 1)[1].tolist() == pytest.approx([1.0, 1 - near**2])


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_tokens_that_are_not_finite_are_kept_last_and_leave_the_others_alone(broken: float) -> None:
    rows = rows_of(64, 48)
    bad = [2, 30, 31, 63]
    others = np.setdiff1d(np.arange(64), bad)
    rows[bad, [0, 5, 47, 20]] = broken
    rows[30] = broken
    kept, scores = run(rows, 11)
    order, exact = dpp_order(rows, 11, GRID)
    assert kept.tolist() == sorted(order)
    assert np.abs(scores[others] - exact[others]).max() < ERROR
    assert np.isnan(scores[bad]).all()
    assert np.array_equal(np.isnan(exact), np.isnan(scores))
    assert run(rows, 62)[0].tolist() == sorted([*others, 2, 30]), "of equals, the lower index"
    assert run(rows, 64)[0].tolist() == list(range(64))


def test_where_no_token_is_finite_the_first_ones_are_kept() -> None:
    kept, scores = run(np.full((20, 6), np.nan), 4)
    assert kept.tolist() == [0, 1, 2, 3]
    assert np.isnan(scores).all()
