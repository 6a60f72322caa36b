"""Turns, kept image state and the prefix cache: reuse is exact, earlier selections never change, states are not shared by accident."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import ContextLengthError, InputError, UsageError
from runtime.generation import Generation
from runtime.pipeline import VisionLanguageModel, load
from runtime.state import PromptState

IMAGE_ONLY: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}]}]
QUESTIONS = ("what is at row 2 column 3?", "read row 1.", "how many digits?")
N, KEEP = 16, 4


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> VisionLanguageModel:
    return load(tiny_bundle)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)


def answer(result: Generation) -> tuple[Any, ...]:
    return result.token_ids, result.kept_indices, result.prompt_tokens


def turn(role: str, text: str, images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


# ---------------------------------------------------------------- one image, many questions


def test_questions_about_a_state_are_answered_as_if_asked_afresh(model: VisionLanguageModel) -> None:
    state = model.prefill(IMAGE_ONLY, [picture(1)])
    for question in (*QUESTIONS, *QUESTIONS):
        asked = model.generate(question, state=state, max_new_tokens=12)
        fresh = model.generate(question, [picture(1)], max_new_tokens=12)
        assert answer(asked) == answer(fresh)
        assert asked.reused_tokens >= N
        assert fresh.reused_tokens == 0
        assert "vision" not in asked.stages_ms
        assert "score" not in asked.stages_ms


def test_asking_again_copies_no_cache(model: VisionLanguageModel) -> None:
    state = model.prefill(IMAGE_ONLY, [picture(1)])
    before = {name: buffer.ctypes.data for name, buffer in state.conversation.post.buffers.items()}
    for question in QUESTIONS:
        model.generate(question, state=state, max_new_tokens=4)
    assert {name: buffer.ctypes.data for name, buffer in state.conversation.post.buffers.items()} == before


def test_a_state_keeps_nothing_of_another_image(model: VisionLanguageModel) -> None:
    states = [model.prefill(IMAGE_ONLY, [picture(seed)]) for seed in (1, 2)]
    first, second = (model.generate(QUESTIONS[0], state=s, max_new_tokens=12) for s in states)
    assert first.kept_indices != second.kept_indices
    assert answer(second) == answer(model.generate(QUESTIONS[0], [picture(2)], max_new_tokens=12))


def test_a_clone_is_independent(model: VisionLanguageModel) -> None:
    state = model.prefill(IMAGE_ONLY, [picture(1)])
    clone = state.clone()
    expected = [answer(model.generate(q, state=state, max_new_tokens=12)) for q in QUESTIONS]
    for buffer in state.conversation.pre.buffers.values():
        buffer[:] = 7.0
    assert [answer(model.generate(q, state=clone, max_new_tokens=12)) for q in QUESTIONS] == expected
    assert clone.nbytes == state.nbytes > 0


def test_clones_answer_in_parallel(model: VisionLanguageModel) -> None:
    state = model.prefill(IMAGE_ONLY, [picture(1)])
    expected = [answer(model.generate(q, state=state, max_new_tokens=12)) for q in QUESTIONS]
    clones = [state.clone() for _ in QUESTIONS]
    with ThreadPoolExecutor(len(clones)) as pool:
        results = pool.map(
            lambda pair: answer(model.generate(pair[0], state=pair[1], max_new_tokens=12)), zip(QUESTIONS, clones, strict=True)
        )
    assert list(results) == expected


def test_a_state_in_use_is_refused_and_free_again_afterwards(model: VisionLanguageModel) -> None:
    state = model.prefill(IMAGE_ONLY, [picture(1)])
    stream = model.stream(QUESTIONS[0], state=state, max_new_tokens=12, eos_token_ids=())
    next(iter(stream))
    with pytest.raises(UsageError, match=r"used by another answer: wait for it, close it, or clone\(\)"):
        model.generate(QUESTIONS[1], state=state)
    stream.close()
    assert stream.result.finish_reason == "cancelled"
    assert answer(model.generate(QUESTIONS[1], state=state, max_new_tokens=8)) == answer(
        model.generate(QUESTIONS[1], [picture(1)], max_new_tokens=8)
    )


def test_a_state_survives_a_prompt_that_is_too_long(model: VisionLanguageModel) -> None:
    state = model.prefill(IMAGE_ONLY, [picture(1)])
    with pytest.raises(ContextLengthError):
        model.generate("row " * 800, state=state)
    assert answer(model.generate(QUESTIONS[0], state=state, max_new_tokens=8)) == answer(
        model.generate(QUESTIONS[0], [picture(1)], max_new_tokens=8)
    )


def test_a_state_has_one_budget(model: VisionLanguageModel) -> None:
    state = model.prefill(IMAGE_ONLY, [picture(1)], keep=2)
    assert model.generate(QUESTIONS[0], state=state, max_new_tokens=2).kept_tokens == 2
    with pytest.raises(UsageError, match="made with keep 2, not 4"):
        model.generate(QUESTIONS[0], state=state, keep=4)


def test_a_prefill_without_images_or_text_is_refused(model: VisionLanguageModel) -> None:
    with pytest.raises(InputError):
        model.prefill([], [])
    with pytest.raises(InputError, match="image"):
        model.prefill(IMAGE_ONLY, [])


# ---------------------------------------------------------------- several turns


def test_a_second_turn_reuses_the_first_with_its_answer(model: VisionLanguageModel) -> None:
    state = model.prefill(IMAGE_ONLY, [picture(1)])
    first = model.generate(QUESTIONS[0], state=state, max_new_tokens=8)
    messages = [turn("user", QUESTIONS[0], 1), turn("assistant", first.text or "nothing"), turn("user", QUESTIONS[1])]
    second = model.generate(messages, state=state, max_new_tokens=12)
    assert answer(second) == answer(model.generate(messages, [picture(1)], max_new_tokens=12))
    assert second.reused_tokens >= N + 8, "the first question was not run again"


def test_a_later_image_is_selected_apart_and_changes_nothing_before_it(model: VisionLanguageModel) -> None:
    one = model.generate(QUESTIONS[0], [picture(1)], max_new_tokens=8)
    messages = [turn("user", QUESTIONS[0], 1), turn("assistant", "7"), turn("user", QUESTIONS[1], 1)]
    fresh = model.generate(messages, [picture(1), picture(2)], max_new_tokens=12)
    assert fresh.kept_tokens == 2 * KEEP
    assert fresh.visual_tokens == 2 * N
    assert fresh.kept_indices[:KEEP] == one.kept_indices
    state = model.prefill(IMAGE_ONLY, [picture(1)])
    assert answer(model.generate(messages, [picture(2)], state=state, max_new_tokens=12)) == answer(fresh)
    assert answer(model.generate(QUESTIONS[0], state=state, max_new_tokens=8)) == answer(one), "the state still is what it was"


def test_images_of_one_message_share_one_budget(model: VisionLanguageModel) -> None:
    both = model.generate(QUESTIONS[0], [picture(1), picture(2)], max_new_tokens=4)
    assert (both.visual_tokens, both.kept_tokens) == (2 * N, KEEP)
    state = model.prefill([{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], [picture(1), picture(2)])
    assert answer(model.generate(QUESTIONS[0], state=state, max_new_tokens=4)) == answer(both)


def test_an_image_added_to_the_same_message_selects_again(model: VisionLanguageModel) -> None:
    state = model.prefill(IMAGE_ONLY, [picture(1)])
    messages = [turn("user", QUESTIONS[0], 2)]
    result = model.generate(messages, [picture(2)], state=state, max_new_tokens=8)
    assert answer(result) == answer(model.generate(messages, [picture(1), picture(2)], max_new_tokens=8))
    assert result.reused_tokens < N


def test_system_prompt_before_the_image_is_part_of_the_state(model: VisionLanguageModel) -> None:
    system = turn("system", "answer in one word.")
    state = model.prefill([system, *IMAGE_ONLY], [picture(1)])
    asked = model.generate(QUESTIONS[0], state=state, max_new_tokens=8)
    assert answer(asked) == answer(model.generate([system, turn("user", QUESTIONS[0], 1)], [picture(1)], max_new_tokens=8))
    assert asked.prompt_tokens > model.generate(QUESTIONS[0], [picture(1)], max_new_tokens=1).prompt_tokens


# ---------------------------------------------------------------- the cache of beginnings


def test_the_cache_answers_as_without_it(tiny_bundle: Path, model: VisionLanguageModel) -> None:
    cached = load(tiny_bundle, cache_bytes=50_000_000)
    for question in QUESTIONS:
        for seed in (1, 2, 1):
            result = cached.generate(question, [picture(seed)], max_new_tokens=8)
            assert answer(result) == answer(model.generate(question, [picture(seed)], max_new_tokens=8))
    assert result.reused_tokens >= N
    assert cached.generate(QUESTIONS[0], [picture(1)], keep=2, max_new_tokens=8).reused_tokens < N, "another budget selects anew"


def test_the_cache_stays_within_its_bytes_and_drops_the_oldest(tiny_bundle: Path) -> None:
    probe = load(tiny_bundle, cache_bytes=50_000_000)
    probe.generate(QUESTIONS[0], [picture(0)], max_new_tokens=2)
    cached = load(tiny_bundle, cache_bytes=int(2.5 * probe.cache.nbytes))
    for seed in range(4):
        cached.generate(QUESTIONS[0], [picture(seed)], max_new_tokens=2)
        assert cached.cache.nbytes <= cached.cache.limit_bytes
    assert cached.generate(QUESTIONS[0], [picture(3)], max_new_tokens=2).reused_tokens >= N
    assert cached.generate(QUESTIONS[0], [picture(0)], max_new_tokens=2).reused_tokens == 0


def test_a_negative_cache_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="cache_bytes is -1"):
        load(tiny_bundle, cache_bytes=-1)


def test_a_question_joins_the_last_user_message_or_makes_a_new_one() -> None:
    state = PromptState.__new__(PromptState)
    state.messages = (turn("user", "look:", 1),)
    assert state.with_question("well?") == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "look:"}, {"type": "text", "text": "well?"}]}
    ]
    state.messages = (turn("user", "look:", 1), turn("assistant", "yes"))
    assert list(state.with_question("well?"))[-1] == turn("user", "well?")
