"""The embeddable API over a small exported model: answers, streams, threads, budgets, limits, and caches that grow."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import runtime
from export.build import build_bundle
from export.plan import BuildOptions, make_plan
from runtime import pipeline
from runtime.engines.onnxruntime import ThreadPool
from runtime.errors import ContextLengthError, EntropyPruneError, InputError, UsageError
from runtime.generation import Generation
from runtime.pipeline import VisionLanguageModel, load
from runtime.state import PromptState
from tests.models import tiny_llava_checkpoint
from tests.runtime.host_device import host

N = 16  # visual tokens of one image
QUESTION = "what is at row 2 column 3?"


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> VisionLanguageModel:
    return load(tiny_bundle)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)


def facts(result: Generation) -> tuple[Any, ...]:
    """What must be the same for the same call: everything but times."""
    entropy = None if result.token_entropy is None else result.token_entropy.tobytes()
    return result.text, result.token_ids, result.prompt_tokens, result.kept_indices, result.finish_reason, entropy


# ---------------------------------------------------------------- one answer


def test_public_names_are_those_promised() -> None:
    assert runtime.__all__ == ["AnswerStream", "Generation", "PromptState", "VisionLanguageModel", "load"]
    assert runtime.load is load
    assert runtime.Generation is Generation
    with pytest.raises(AttributeError, match="module 'runtime' has no attribute 'nothing'"):
        _ = runtime.nothing


def test_an_answer_comes_with_its_statistics(model: VisionLanguageModel) -> None:
    result = model.generate(QUESTION, [picture()], max_new_tokens=7, eos_token_ids=())
    assert len(result.token_ids) == 7
    assert result.finish_reason == "length"
    assert (result.visual_tokens, result.kept_tokens, len(result.kept_indices)) == (N, 4, 4)
    assert result.kept_indices == tuple(sorted(set(result.kept_indices)))
    assert 0 <= result.kept_indices[0] <= result.kept_indices[-1] < N
    assert result.token_entropy is not None
    assert result.token_entropy.shape == (N,)
    assert set(np.argsort(-result.token_entropy, kind="stable")[:4]) == set(result.kept_indices), "the highest scores are kept"
    text_only = model.generate(QUESTION, max_new_tokens=1)
    assert result.prompt_tokens - text_only.prompt_tokens >= N
    assert list(result.stages_ms) == ["preprocess", "vision", "embed", "pre_ecl", "score", "post_ecl", "decode"]
    assert all(ms > 0 for ms in result.stages_ms.values())
    assert result.ttft_ms >= sum(ms for stage, ms in result.stages_ms.items() if stage != "decode")
    assert result.tpot_ms == pytest.approx(result.stages_ms["decode"] / 6)
    assert json.loads(json.dumps(result.to_dict()))["token_ids"] == list(result.token_ids)


def test_a_prompt_without_images_runs_no_vision_and_no_score(model: VisionLanguageModel) -> None:
    result = model.generate("how many digits?", max_new_tokens=4)
    assert (result.visual_tokens, result.kept_tokens, result.kept_indices, result.token_entropy) == (0, 0, (), None)
    assert {"vision", "score"}.isdisjoint(result.stages_ms)


def test_the_answer_depends_on_the_image_and_on_the_question(model: VisionLanguageModel) -> None:
    answers = {model.generate(q, [picture(s)], max_new_tokens=8).token_ids for q in (QUESTION, "how many digits?") for s in (0, 1)}
    assert len(answers) == 4


def test_a_path_an_image_and_an_array_give_the_same_answer(model: VisionLanguageModel, tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "scene.png")
    sources = (tmp_path / "scene.png", str(tmp_path / "scene.png"), Image.fromarray(picture()), picture())
    assert len({facts(model.generate(QUESTION, [source], max_new_tokens=12)) for source in sources}) == 1


def test_messages_say_what_a_plain_question_says(model: VisionLanguageModel) -> None:
    parts: list[dict[str, str]] = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    as_list = model.generate([{"role": "user", "content": parts}], [picture()], max_new_tokens=12)
    assert facts(as_list) == facts(model.generate(QUESTION, [picture()], max_new_tokens=12))


def test_system_prompts_and_earlier_turns_are_part_of_the_prompt(model: VisionLanguageModel) -> None:
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    alone = model.generate([question], [picture()], max_new_tokens=8)
    system = model.generate([{"role": "system", "content": "read row 1."}, question], [picture()], max_new_tokens=8)
    turns: list[dict[str, Any]] = [{"role": "user", "content": "is there a red 3?"}, {"role": "assistant", "content": "yes"}, question]
    later = model.generate(turns, [picture()], max_new_tokens=8)
    assert alone.prompt_tokens < system.prompt_tokens < later.prompt_tokens
    assert len({alone.token_ids, system.token_ids, later.token_ids}) == 3
    assert later.kept_tokens == system.kept_tokens == 4


def test_two_images_share_one_budget(model: VisionLanguageModel) -> None:
    one = model.generate(QUESTION, [picture(0)], max_new_tokens=8)
    two = model.generate(QUESTION, [picture(0), picture(1)], max_new_tokens=8)
    swapped = model.generate(QUESTION, [picture(1), picture(0)], max_new_tokens=8)
    assert (two.visual_tokens, two.kept_tokens) == (2 * N, 4)
    assert two.kept_indices == tuple(sorted(set(two.kept_indices)))
    assert max(two.kept_indices) < 2 * N
    assert two.prompt_tokens >= one.prompt_tokens + N
    assert two.token_ids != swapped.token_ids
    assert two.token_entropy is not None
    assert two.token_entropy.shape == (2 * N,)


# ---------------------------------------------------------------- budgets


def test_budgets_are_chosen_by_their_number(model: VisionLanguageModel) -> None:
    results = {keep: model.generate(QUESTION, [picture()], keep=keep, max_new_tokens=12) for keep in (None, 4, 2, "all", N)}
    assert [r.kept_tokens for r in results.values()] == [4, 4, 2, N, N]
    assert facts(results[None]) == facts(results[4])
    assert facts(results["all"]) == facts(results[N])
    assert set(results[2].kept_indices) < set(results[4].kept_indices)
    assert results["all"].kept_indices == tuple(range(N))
    assert results["all"].token_entropy is None
    assert "score" not in results["all"].stages_ms
    assert len({r.token_ids for r in results.values()}) == 3


@pytest.mark.parametrize("keep", [0, 3, -1, N + 1, "most", "4", 2.5])
def test_a_budget_that_is_not_built_in_names_those_that_are(model: VisionLanguageModel, keep: Any) -> None:
    with pytest.raises(UsageError, match=rf"this bundle holds the budgets 4, 2 and all, not {keep}: export it with --keep {keep}"):
        model.generate(QUESTION, [picture()], keep=keep)


def test_as_many_tokens_as_one_image_has_are_not_all_of_two_images(
    model: VisionLanguageModel, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"holds the budgets 4, 2 and all, not 16"):
        model.generate(QUESTION, [picture(0), picture(1)], keep=N)
    build_bundle(make_plan(BuildOptions("llava15", checkpoint=str(tiny_checkpoint), keep=(N,), split_layer=2)), tmp_path / "b")
    wide = load(tmp_path / "b")
    two = wide.generate(QUESTION, [picture(0), picture(1)], max_new_tokens=4)
    assert (two.visual_tokens, two.kept_tokens) == (2 * N, N)
    assert facts(wide.generate(QUESTION, [picture()], max_new_tokens=12)) == facts(
        model.generate(QUESTION, [picture()], keep="all", max_new_tokens=12)
    )


# ---------------------------------------------------------------- ends


def test_the_answer_ends_where_it_is_told_to(model: VisionLanguageModel) -> None:
    whole = model.generate(QUESTION, [picture()], max_new_tokens=30, eos_token_ids=())
    at = next(i for i in range(5, 30) if whole.token_ids[i] not in whole.token_ids[:i])
    ended = model.generate(QUESTION, [picture()], max_new_tokens=30, eos_token_ids=[whole.token_ids[at], 1])
    assert ended.token_ids == whole.token_ids[: at + 1]
    assert ended.finish_reason == "eos"
    assert whole.text.startswith(ended.text)


def test_a_stop_string_ends_the_answer_before_it(model: VisionLanguageModel) -> None:
    whole = model.generate(QUESTION, [picture()], max_new_tokens=40, eos_token_ids=())
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    expected = whole.text[: whole.text.index(stop)]
    stream = model.stream(QUESTION, [picture()], max_new_tokens=40, eos_token_ids=(), stop_strings=["never", stop])
    pieces = list(stream)
    assert stream.result.text == expected.strip()
    assert "".join(pieces).strip() == expected.strip()
    assert stream.result.finish_reason == "stop"
    assert len(stream.result.token_ids) < 40


def test_a_prompt_beyond_the_context_says_how_long_it_is(model: VisionLanguageModel) -> None:
    with pytest.raises(ContextLengthError, match=r"the prompt has \d+ tokens, the bundle's context holds 512 with the answer: shorten it"):
        model.generate("row " * 600, [picture()])
    with pytest.raises(ContextLengthError, match=r"the prompt has \d+ tokens"):
        model.generate(QUESTION, [picture()] * 32)


@pytest.mark.parametrize("text", ["row ", "a", "🙂", "<image>", "</s>"])
def test_a_hundred_thousand_characters_are_refused_soon(model: VisionLanguageModel, text: str) -> None:
    began = time.process_time()
    with pytest.raises(ContextLengthError, match=r"the prompt has \d{5,6} tokens, the bundle's context holds 512 with the answer"):
        model.generate((text * 100_000)[:100_000], [picture()])
    assert time.process_time() - began < 15  # measured: 0.1 to 1.4 s


def test_the_context_bounds_the_answer(model: VisionLanguageModel) -> None:
    base = model.generate("row" * 1, [picture()], max_new_tokens=1).prompt_tokens
    words = "row " * 600
    long = next(words[: 4 * n] for n in range(470, 300, -1) if _fits(model, words[: 4 * n], 502))
    result = model.generate(long, [picture()], max_new_tokens=100, eos_token_ids=())
    assert base < result.prompt_tokens
    assert result.prompt_tokens + len(result.token_ids) == 512
    assert result.finish_reason == "length"


def _fits(model: VisionLanguageModel, text: str, most: int) -> bool:
    return len(model.prompts.build(text, [picture()]).ids.input_ids) <= most


# ---------------------------------------------------------------- sampling


def test_a_seed_makes_sampling_repeatable(model: VisionLanguageModel) -> None:
    def sample(seed: int | None) -> tuple[int, ...]:
        options: dict[str, Any] = {
            "do_sample": True,
            "temperature": 1.5,
            "top_k": 0,
            "seed": seed,
            "max_new_tokens": 16,
            "eos_token_ids": (),
        }
        return model.generate(QUESTION, [picture()], **options).token_ids

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in (1, 2, 3)} | {sample(None) for _ in range(3)}) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1}, "unknown option temprature: expected some of max_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of 1 or more"),
        ({"temperature": 0.5}, "temperature would have no effect without sampling"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused_at_once(model: VisionLanguageModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.stream(QUESTION, **options)


# ---------------------------------------------------------------- streams


def test_a_stream_gives_the_same_answer_in_pieces(model: VisionLanguageModel) -> None:
    whole = model.generate(QUESTION, [picture()], max_new_tokens=40)
    stream = model.stream(QUESTION, [picture()], max_new_tokens=40)
    pieces = list(stream)
    assert len(pieces) > 5
    assert all(pieces)
    assert "".join(pieces).strip() == whole.text
    assert facts(stream.result) == facts(whole)
    assert list(stream) == [], "a stream runs once"


def test_a_stream_has_no_result_before_it_ran(model: VisionLanguageModel) -> None:
    stream = model.stream(QUESTION)
    with pytest.raises(EntropyPruneError, match="the stream has no result yet: iterate over it first"):
        _ = stream.result
    stream.close()
    assert list(stream) == []


def test_a_cancelled_stream_keeps_what_it_said_and_frees_the_model(model: VisionLanguageModel) -> None:
    whole = model.generate(QUESTION, [picture()], max_new_tokens=40)
    with model.stream(QUESTION, [picture()], max_new_tokens=40) as stream:
        pieces = list(itertools.islice(stream, 3))
    result = stream.result
    assert result.finish_reason == "cancelled"
    assert result.text == "".join(pieces).strip()
    assert result.token_ids == whole.token_ids[: len(result.token_ids)]
    assert len(result.token_ids) < 40
    assert facts(model.generate(QUESTION, [picture()], max_new_tokens=40)) == facts(whole)


def in_time(call: Callable[[], Any], seconds: float = 20.0) -> Any:
    """The call's result; fails where it does not return, instead of waiting for ever."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, "the call did not return: a deadlock, or an error in its thread"
    return results[0]


def test_a_stream_left_half_way_blocks_nobody(model: VisionLanguageModel) -> None:
    whole = model.generate(QUESTION, [picture()], max_new_tokens=10)
    stream = model.stream(QUESTION, [picture()], max_new_tokens=10)
    first = next(iter(stream))  # and the stream stays open
    assert facts(in_time(lambda: model.generate(QUESTION, [picture()], max_new_tokens=10))) == facts(whole)
    assert (first + "".join(stream)).strip() == whole.text, "it goes on where it was"


def test_streams_advanced_in_turn_do_not_disturb_each_other(model: VisionLanguageModel) -> None:
    calls: list[tuple[str, int, int | str]] = [(QUESTION, 0, 4), ("how many digits?", 1, 2), (QUESTION, 2, "all")]
    alone = [model.generate(q, [picture(s)], keep=k, max_new_tokens=90, eos_token_ids=()).text for q, s, k in calls]
    streams = [model.stream(q, [picture(s)], keep=k, max_new_tokens=90, eos_token_ids=()) for q, s, k in calls]

    def advance() -> list[str]:
        texts, running = ["", "", ""], {i: iter(stream) for i, stream in enumerate(streams)}
        while running:
            for i, pieces in list(running.items()):
                piece = next(pieces, None)
                if piece is None:
                    del running[i]
                else:
                    texts[i] += piece
        return [text.strip() for text in texts]

    assert in_time(advance) == alone


def test_an_error_inside_a_stream_frees_the_model(model: VisionLanguageModel) -> None:
    with pytest.raises(InputError, match="there is no image"):
        list(model.stream(QUESTION, ["nowhere.png"]))
    assert in_time(lambda: model.generate(QUESTION, [picture()], max_new_tokens=2)).token_ids


@pytest.mark.parametrize("failing", ["pre_ecl", "post_ecl"])
@pytest.mark.parametrize("calls", [0, 3])
def test_a_state_survives_an_answer_that_breaks_half_way(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, failing: str, calls: int
) -> None:
    def ask(state: PromptState | None = None) -> tuple[Any, ...]:
        images = [] if state else [picture()]
        return facts(model.generate(QUESTION, images, state=state, max_new_tokens=8, eos_token_ids=()))

    expected, state, run_half, left = (
        ask(),
        model.prefill([{"role": "user", "content": [{"type": "image"}]}], [picture()]),
        host(model).run_half,
        [calls],
    )

    def broken(name: str, *args: Any) -> Any:
        left[0] -= name == failing
        if left[0] < 0:
            raise KeyboardInterrupt
        return run_half(name, *args)

    monkeypatch.setattr(model.chain.executor, "run_half", broken)
    with pytest.raises(KeyboardInterrupt):
        ask(state)
    monkeypatch.undo()
    assert ask(state) == expected
    assert ask() == expected


# ---------------------------------------------------------------- threads


def test_threads_get_the_answers_that_one_thread_gets(model: VisionLanguageModel) -> None:
    jobs = [(q, s, k) for q in (QUESTION, "how many digits?") for s in (0, 1, 2) for k in (4, 2, "all")]

    def answer(job: tuple[str, int, int | str]) -> tuple[Any, ...]:
        question, seed, keep = job
        return facts(model.generate(question, [picture(seed)], keep=keep, max_new_tokens=20))

    expected = [answer(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, jobs)) == expected


def test_engines_run_one_call_at_a_time(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    run_half, running, most = host(model).run_half, [0], [0]

    def watched(*args: Any) -> Any:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.001)  # long enough for another thread to come in
        running[0] -= 1
        return run_half(*args)

    monkeypatch.setattr(model.chain.executor, "run_half", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: model.generate(QUESTION, [picture(seed)], max_new_tokens=8, eos_token_ids=()), range(4)))
    assert most == [1]


def test_engine_threads_are_started_once(tiny_bundle: Path, model: VisionLanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    size = ThreadPool.size
    assert size is not None
    load(tiny_bundle, threads=size)
    assert caplog.messages == []
    load(tiny_bundle, threads=size + 1)
    assert caplog.messages == [f"the engine threads of this process were started as {size} and cannot become {size + 1}"]
    assert ThreadPool.size == size
    for threads in (0, -2):
        with pytest.raises(UsageError, match=f"threads is {threads}; give 1 to 1024"):
            load(tiny_bundle, threads=threads)


# ---------------------------------------------------------------- caches


def test_caches_that_grow_give_the_answer_of_large_ones(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(reserve: int) -> tuple[Any, ...]:
        monkeypatch.setattr(pipeline, "MAX_RESERVE", reserve)
        return facts(model.generate(QUESTION, [picture()], max_new_tokens=300, eos_token_ids=()))

    expected = answer(400)
    assert len(expected[1]) == 300
    assert answer(1) == expected
    monkeypatch.undo()
    assert facts(model.generate(QUESTION, [picture()], max_new_tokens=300, eos_token_ids=())) == expected


def test_the_groups_hold_what_they_should(model: VisionLanguageModel) -> None:
    prompt = model.prompts.build(QUESTION, [picture()])
    tokens = len(prompt.ids.input_ids)
    conversation, _ = model.chain.prefill(prompt.ids.input_ids, prompt.ids.visual_mask, prompt.pixel_values, keep=4)
    assert (conversation.pre.length, conversation.post.length, conversation.next_position) == (tokens, tokens - N + 4, tokens)
    model.chain.decode(conversation, 100)
    assert (conversation.pre.length, conversation.post.length, conversation.next_position) == (tokens + 1, tokens - N + 5, tokens + 1)
    assert conversation.pre.layers == (0, 1)
    assert conversation.post.layers == (2, 3)


@pytest.mark.parametrize("split", [1, 2, 3, 4])
def test_every_split_builds_and_answers(split: int, tmp_path: Path) -> None:
    """Unpruned, the split changes nothing."""
    checkpoint = tiny_llava_checkpoint(tmp_path / "checkpoint", layers=5, seed=5)
    answers = []
    for k in (split, 1 + split % 4):
        build_bundle(make_plan(BuildOptions("llava15", checkpoint=str(checkpoint), keep=(1,), split_layer=k)), tmp_path / f"b{k}")
        vlm = load(tmp_path / f"b{k}")
        assert vlm.generate(QUESTION, [picture()], max_new_tokens=3).kept_tokens == 1
        answers.append(vlm.generate(QUESTION, [picture()], keep="all", max_new_tokens=12).token_ids)
    assert answers[0] == answers[1]
