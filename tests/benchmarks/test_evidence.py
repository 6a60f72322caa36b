"""The evidence's parts: statistics, neighbours, equal costs, budgets per image; and that its answers are the exported chain's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.accuracy import neighbours, per_image, report
from benchmarks.accuracy.evaluation import UNPRUNED, Evaluation, Outcomes, open_evaluation
from benchmarks.accuracy.settings import Setting, average_keeps, equal_cost, keeps
from benchmarks.accuracy.statistics import ImageBootstrap
from calibration import cost
from calibration.pruned_forward import PrunedForward, pack
from calibration.questions import EncodedQuestion, Question, encode, read_questions
from export.spec import DecoderSpec
from tiny_llava.heldout import CHECKPOINT, FOLDER

DECODER = DecoderSpec(
    layers=12, hidden_size=192, intermediate_size=512, query_heads=8, kv_heads=8, head_size=24, vocab_size=408, rms_norm_eps=1e-5,
    rope_theta=1e4, max_positions=1024,
)  # fmt: skip


def test_the_papers_keep_counts_at_the_papers_size() -> None:
    assert average_keeps(576, 32, 2) == (166, 98, 29)
    assert average_keeps(64, 12, 4) == (None, None, None)
    assert keeps(64) == (32, 21, 14, 7, 4)


@pytest.mark.parametrize("split", [1, 2, 4])
def test_pruning_before_the_decoder_is_given_no_more_flops(split: int) -> None:
    for keep, early in equal_cost(64, 12, split, (16, 11)):
        cheaper, dearer = (cost.flops_share(DECODER, visual_tokens=64, keep=e, split_layer=0, text_tokens=0) for e in (early, early + 1))
        assert cheaper <= cost.flops_share(DECODER, visual_tokens=64, keep=keep, split_layer=split, text_tokens=0)
        assert dearer > cost.flops_share(DECODER, visual_tokens=64, keep=keep, split_layer=split, text_tokens=0) * 0.97


def test_intervals_treat_an_image_as_one_draw() -> None:
    rng = np.random.default_rng(0)
    per_image = rng.integers(0, 2, 60)
    images = np.repeat(np.arange(60), 10)
    clustered = ImageBootstrap(images).share(np.repeat(per_image, 10))
    independent = ImageBootstrap(np.arange(600)).share(np.repeat(per_image, 10))
    assert clustered.mean == independent.mean == pytest.approx(per_image.mean())
    assert clustered.high - clustered.low > 2.5 * (independent.high - independent.low)


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(400) < 0.5
    worse = hard & (rng.random(400) < 0.9)
    difference = ImageBootstrap(np.arange(400)).difference(hard, worse)
    assert difference.low > 0
    assert difference.mean == pytest.approx(hard.mean() - worse.mean())
    assert ImageBootstrap(np.arange(400)).ratio(worse, hard).mean == pytest.approx(worse.sum() / hard.sum())


def test_divprune_spreads_over_clusters_and_a_top_k_would_not() -> None:
    centres = np.eye(4, 16)
    points = torch.tensor(np.repeat(centres, 5, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(20, 16)))
    order = neighbours.divprune_order(points)
    assert sorted(i // 5 for i in order[:4]) == [0, 1, 2, 3]
    assert sorted(order) == list(range(20))


def test_cdpruner_leaves_out_what_the_question_is_not_about() -> None:
    basis = np.eye(6)
    points, question = torch.tensor(basis), torch.tensor(basis[:3].sum(0, keepdims=True))
    assert set(neighbours.cdpruner_order(points, question, 3)) == {0, 1, 2}
    assert len(set(neighbours.cdpruner_order(points, question, 6))) == 6


def test_fastv_ranks_by_the_attention_map_that_transformers_gives(
    evaluation: Evaluation, first: tuple[EncodedQuestion, torch.Tensor]
) -> None:
    question, pixels = first
    model = evaluation.forward.model
    prompt = pack([question], model.config.image_token_id)
    dense = evaluation.forward.dense(prompt, evaluation.forward.image_embeds(pixels))
    order = neighbours.fastv_order(evaluation.forward, dense, 2)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.tensor([question.prompt_ids])
        maps = model(input_ids=ids, pixel_values=pixels, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    expected = maps[1][0, :, -1].mean(0)[prompt.visual_rows].double().numpy()
    np.testing.assert_array_equal(order[:20], np.argsort(-expected, kind="stable")[:20])
    assert not np.array_equal(order[:20], np.argsort(-maps[0][0, :, -1].mean(0)[prompt.visual_rows].numpy(), kind="stable")[:20])


def constructed(right: dict[int, list[bool]], masses: list[list[float]]) -> report.Evidence:
    """One question an image, budgets 2 < 4 < 8 at split 2, mode `trace`."""
    keeps_ = tuple(sorted(right))
    settings = (UNPRUNED, *(Setting("trace", 2, keep) for keep in keeps_))
    rows = np.array([[True] * len(masses), *(right[keep] for keep in keeps_)])
    stacked = np.array(masses)[:, None, None, :].repeat(3, axis=2)
    outcomes = Outcomes(settings, rows, np.arange(len(masses)), ("any",) * len(masses), stacked, (2,), keeps_, 10.0)
    return report.Evidence(outcomes, DECODER, 64, 2, ())


def test_a_mass_that_knows_which_images_are_hard_beats_fixed_budgets_and_one_that_does_not_does_not() -> None:
    hard = [i % 2 == 1 for i in range(200)]
    right = {2: [not h for h in hard], 4: [not h for h in hard], 8: [True] * 200}
    knowing = [[0.9, 0.95, 1.0] if not h else [0.1, 0.2, 0.9] for h in hard]
    found = per_image.per_image(constructed(right, knowing), 0, 2, [2, 4, 8], 5.0)
    assert found.average_keep == 5.0
    assert found.accuracy.mean == 1.0
    assert found.difference.low > 0.2
    blind = [[0.9, 0.95, 1.0] if i % 4 < 2 else [0.1, 0.2, 0.9] for i in range(200)]
    assert per_image.per_image(constructed(right, blind), 0, 2, [2, 4, 8], 5.0).difference.low < 0


@pytest.mark.parametrize(("wrong", "verdict"), [(3, "which reaches the paper's 96%"), (5, "which does not reach the paper's 96%")])
def test_the_verdict_on_the_papers_goal_follows_the_answers(wrong: int, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAIN", ("trace",))
    answers = [n >= wrong for n in range(100)]
    made = constructed({4: answers, 8: answers, 12: answers}, [[1.0, 1.0, 1.0]] * 100)
    assert any(verdict in part for part in report._goal(made))
    dear = constructed({40: answers, 50: answers, 60: answers}, [[1.0, 1.0, 1.0]] * 100)
    assert "No split that was tried can save as much." in list(report._goal(dear))


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--splits", "abc"], "'abc' is not a list of whole numbers"), (["--splits", "12"], "--split-layer 12 is out of range"),
     (["--limit", "0"], "'0' is not a whole number above 0")],
)  # fmt: skip
def test_a_wrong_option_is_told_before_anything_is_measured(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.accuracy import evidence

    try:
        status = evidence.main([*argv, "--output", str(tmp_path / "out")])
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return open_evaluation(CHECKPOINT, [2], (11,))


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    found = read_questions(FOLDER / "questions.json")
    return [*found[:3], *found[7:10]]  # two images


@pytest.fixture(scope="module")
def first(evaluation: Evaluation, questions: list[Question]) -> tuple[EncodedQuestion, torch.Tensor]:
    from runtime.images import load_image

    found: tuple[EncodedQuestion, torch.Tensor] = encode(questions[0], load_image(questions[0].image), evaluation.processor)
    return found


@pytest.fixture(scope="module")
def outcomes(evaluation: Evaluation, questions: list[Question], tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return evaluation.run(questions, tmp_path_factory.mktemp("evidence"))


@pytest.mark.parametrize(("mode", "keep"), [("trace", 14), ("trace", 4), ("uniform", 11), ("random", 7), ("dpp", 11)])
def test_answers_are_those_of_the_exported_chain(
    mode: str, keep: int, outcomes: Outcomes, questions: list[Question], tmp_path: Path
) -> None:
    from export.build import build_bundle
    from export.plan import BuildOptions, make_plan
    from runtime.pipeline import load

    build_bundle(make_plan(BuildOptions("tiny-llava", keep=(keep,), split_layer=2, score_mode=mode)), tmp_path / "bundle")
    model = load(tmp_path / "bundle")
    answers = [model.generate(q.text, [q.image], max_new_tokens=12).text == q.answer for q in questions]
    assert outcomes.of(Setting(mode, 2, keep)).tolist() == answers
    assert outcomes.of(UNPRUNED).tolist() == [
        model.generate(q.text, [q.image], keep="all", max_new_tokens=12).text == q.answer for q in questions
    ]


def test_an_evaluation_goes_on_where_it_was(
    evaluation: Evaluation, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    calls = 0
    dense = PrunedForward.dense

    def stopping(self: PrunedForward, *args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 5:  # the second image's shared prompt: 1 + 3 for the first
            raise Stopped
        return dense(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(PrunedForward, "dense", stopping)
    with pytest.raises(Stopped):
        evaluation.run(questions, tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 1
    evaluation.run(questions, tmp_path)
    assert calls == 5 + 4
    assert evaluation.run(questions, tmp_path).right.shape[1] == 6
    assert calls == 5 + 4


def test_tables_hold_every_method_and_the_verdict_on_the_papers_goal(outcomes: Outcomes) -> None:
    text = report.markdown(report.Evidence(outcomes, DECODER, 64, 2, (11,)))
    for method in (*report.MAIN, "fastv", "divprune", "cdpruner"):
        assert f"`{method}`" in text
    assert "of the unpruned accuracy; decoder prefill alone" in text
    rows = report.as_data(report.Evidence(outcomes, DECODER, 64, 2, (11,)))
    assert len({(r["method"], r["split_layer"], r["keep"]) for r in rows}) == len(rows)
