"""The chain in a device's memory gives what the chain on the CPU gives, with the same graphs; and moves no more than it must."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.build import build_bundle
from export.graphs.kv_write import APPEND
from export.plan import BuildOptions, make_plan
from runtime import names
from runtime.engine_clock import timed_engines
from runtime.errors import ContextLengthError, EngineError
from runtime.generation import Generation
from runtime.manifest import read_manifest
from runtime.pipeline import VisionLanguageModel, load
from tests.models import tiny_llava_checkpoint
from tests.runtime.host_device import HostDevice, device_executor, on_host_device, queued

N, HIDDEN, VOCAB = 16, 64, 408
QUESTION = "what is at row 2 column 3?"
TWO_MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "read row 1."}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
]
IMAGE_ONLY: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}]}]


def export(folder: Path, checkpoint: Path, *, precision: str = "fp32", append: bool = False, score_mode: str | None = None) -> Path:
    """Budgets 4, 2 and 8 with keep auto, split before layer 2; `append`: graphs that give only the new rows of the cache."""
    options = BuildOptions(
        "llava15", target="cpu" if precision == "fp32" else "cuda", precision=precision, checkpoint=str(checkpoint), keep=(4, 2, 8),
        split_layer=2, max_context=512, auto_keep=0.6 if score_mode != "random" else None, score_mode=score_mode,
    )  # fmt: skip
    plan = make_plan(options)
    if append:
        plan = dataclasses.replace(plan, target=dataclasses.replace(plan.target, kv_write=APPEND))
    build_bundle(plan, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava_checkpoint(tmp_path_factory.mktemp("device") / "checkpoint", image_size=56, kv_heads=2, seed=3)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("device") / "bundle", checkpoint)


@pytest.fixture(scope="module")
def plain(bundle: Path) -> VisionLanguageModel:
    return load(bundle)


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def model(bundle: Path, device: HostDevice) -> VisionLanguageModel:
    return on_host_device(bundle, device)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)


def ask(model: VisionLanguageModel, messages: Any, images: list[np.ndarray], **options: Any) -> Generation:
    return model.generate(messages, images, **{"max_new_tokens": 8, "eos_token_ids": (), **options})


def same(found: Generation, expected: Generation, tolerance: float = 1e-6) -> None:
    assert found.token_ids == expected.token_ids
    assert found.kept_indices == expected.kept_indices
    assert (found.prompt_tokens, found.visual_tokens, found.auto_budgets) == (
        expected.prompt_tokens, expected.visual_tokens, expected.auto_budgets,
    )  # fmt: skip
    assert (found.token_entropy is None) == (expected.token_entropy is None)
    if found.token_entropy is not None and expected.token_entropy is not None:
        assert np.allclose(found.token_entropy, expected.token_entropy, atol=tolerance, equal_nan=True)


def logits_of(model: VisionLanguageModel, messages: Any, images: list[np.ndarray], steps: int = 4, **options: Any) -> np.ndarray:
    """Logits of a prompt's last token and of some tokens after it."""
    prompt = model.prompts.build(messages, images)
    conversation, first = model.chain.prefill(prompt.ids.input_ids, prompt.ids.visual_mask, prompt.pixel_values, **options)
    return np.stack([first, *(model.chain.decode(conversation, 100 + i) for i in range(steps))])


# ---------------------------------------------------------------- the same answers


@pytest.mark.parametrize(
    ("messages", "images"), [(QUESTION, 0), (QUESTION, 1), (QUESTION, 2), (TWO_MESSAGES, 3)],
    ids=["no image", "one image", "two images", "three images in two messages, text between"],
)  # fmt: skip
@pytest.mark.parametrize("keep", [4, 2, "all", "auto"])
def test_answers_are_those_of_the_cpu(
    model: VisionLanguageModel, plain: VisionLanguageModel, messages: Any, images: int, keep: Any
) -> None:
    pictures = [picture(i) for i in range(images)]
    same(ask(model, messages, pictures, keep=keep), ask(plain, messages, pictures, keep=keep))


@pytest.mark.parametrize("keep", [None, 4])
def test_logits_are_those_of_the_cpu(model: VisionLanguageModel, plain: VisionLanguageModel, keep: int | None) -> None:
    found, expected = (logits_of(m, QUESTION, [picture(1)], keep=keep) for m in (model, plain))
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_the_comparison_sees_another_image(model: VisionLanguageModel, plain: VisionLanguageModel) -> None:
    found, expected = logits_of(model, QUESTION, [picture(1)], keep=4), logits_of(plain, QUESTION, [picture(2)], keep=4)
    assert np.abs(found - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("kept", [[0, 1, 2], [3, 4, 9, 15], [15], list(range(N))])
def test_kept_indices_from_elsewhere_are_taken(model: VisionLanguageModel, plain: VisionLanguageModel, kept: list[int]) -> None:
    traces: list[dict[str, np.ndarray]] = [{}, {}]
    found, expected = (
        logits_of(m, QUESTION, [picture(1)], keep=None, kept_indices=np.array(kept), trace=trace)
        for m, trace in zip((model, plain), traces, strict=True)
    )
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    assert traces[0].keys() == traces[1].keys() == {names.HIDDEN_STATES, names.SCORE_STATES}
    for name, array in traces[0].items():
        assert array.shape == traces[1][name].shape
        assert np.allclose(array, traces[1][name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("budget", [2, 8])
def test_auto_gives_the_answer_of_the_budget_it_chose(bundle: Path, plain: VisionLanguageModel, budget: int) -> None:
    """The largest budget's own run, another budget's second run."""
    model = on_host_device(bundle, HostDevice())
    threshold = {2: 1e-6, 8: 1.0}[budget]
    model.manifest = model.chain.manifest = dataclasses.replace(model.manifest, auto_keep=threshold)
    found = ask(model, TWO_MESSAGES, [picture(i) for i in range(3)], keep="auto")
    assert found.auto_budgets == (budget, budget)
    expected = ask(plain, TWO_MESSAGES, [picture(i) for i in range(3)], keep=budget)
    assert (found.token_ids, found.kept_indices) == (expected.token_ids, expected.kept_indices)


@pytest.mark.parametrize(("precision", "append"), [("fp16", False), ("fp16", True), ("fp32", True)])
def test_half_precision_and_graphs_that_give_only_new_rows(precision: str, append: bool, checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(tmp_path / "b", checkpoint, precision=precision, append=append)
    device = HostDevice()
    model, reference = on_host_device(bundle, device), export(tmp_path / "r", checkpoint, precision=precision) if append else bundle
    plain = load(reference, backend="cpu")
    tolerance = 1e-5 if precision == "fp32" else 5e-3
    for images in (0, 1, 2):
        pictures = [picture(i) for i in range(images)]
        found, expected = (logits_of(m, QUESTION, pictures, keep=4, steps=6) for m in (model, plain))
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
        if precision == "fp32" or not append:
            same(ask(model, QUESTION, pictures), ask(plain, QUESTION, pictures), tolerance)
    assert (device.counts["scatter_rows"] > 0) == append


def test_the_control_random_gets_its_seed(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(tmp_path / "b", checkpoint, score_mode="random")
    model, plain = on_host_device(bundle, HostDevice()), load(bundle)
    for seed in (1, 2):
        same(ask(model, QUESTION, [picture(seed)]), ask(plain, QUESTION, [picture(seed)]))


# ---------------------------------------------------------------- states


def test_states_clones_and_second_questions(model: VisionLanguageModel, plain: VisionLanguageModel) -> None:
    states = [m.prefill(IMAGE_ONLY, [picture(1)]) for m in (model, plain)]
    for question in (QUESTION, "read row 1.", QUESTION):
        found, expected = (m.generate(question, state=s, max_new_tokens=6) for m, s in zip((model, plain), states, strict=True))
        same(found, expected)
        assert found.reused_tokens == expected.reused_tokens >= N
    clone = states[0].clone()
    ask(model, "how many digits?", [], state=states[0])
    same(ask(model, QUESTION, [], state=clone), ask(plain, QUESTION, [], state=states[1]))
    for i in range(4):
        mine, theirs = ((s.conversation.pre if i < 2 else s.conversation.post).layer(i) for s in states)
        assert len(mine) == 2
        for found_layer, expected_layer in zip(clone_layer(clone, i), theirs, strict=True):
            assert found_layer.shape == expected_layer.shape
        assert mine[0].shape[2] == theirs[0].shape[2]


def clone_layer(state: Any, i: int) -> tuple[np.ndarray, np.ndarray]:
    group = state.conversation.pre if i < 2 else state.conversation.post
    keys, values = group.layer(i)
    return keys, values


def test_every_layers_keys_and_values_are_those_of_the_cpu(model: VisionLanguageModel, plain: VisionLanguageModel) -> None:
    states = [m.prefill(IMAGE_ONLY, [picture(1)]) for m in (model, plain)]
    clone = states[0].clone()
    for i in range(4):
        expected = clone_layer(states[1], i)
        for state in (states[0], clone):
            for mine, theirs in zip(clone_layer(state, i), expected, strict=True):
                assert np.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_prefix_cache_reuses_device_conversations(bundle: Path, plain: VisionLanguageModel, device: HostDevice) -> None:
    model = on_host_device(bundle, device)
    model.cache.limit_bytes = 1 << 24
    ask(model, QUESTION, [picture(1)])
    again = ask(model, "read row 1.", [picture(1)])
    assert again.reused_tokens >= N
    same(again, ask(plain, "read row 1.", [picture(1)]))


def test_caches_that_grow_give_the_same_answer(model: VisionLanguageModel, plain: VisionLanguageModel) -> None:
    found = ask(model, QUESTION, [picture(1)], max_new_tokens=330)
    assert found.token_ids == ask(plain, QUESTION, [picture(1)], max_new_tokens=330).token_ids
    assert len(found.token_ids) == 330


# ---------------------------------------------------------------- engines of fixed shapes


def test_prompts_longer_than_the_engine_run_in_pieces(bundle: Path, plain: VisionLanguageModel, device: HostDevice) -> None:
    model = on_host_device(bundle, device, max_rows=24, capacity=512)
    for messages, images in ((QUESTION + " row" * 60, 0), (QUESTION + " row" * 60, 1), (TWO_MESSAGES, 3)):
        for keep in (4, "all"):
            pictures = [picture(i) for i in range(images)]
            if images == 3 and keep == 4:
                continue  # two images in one message are more than its score takes
            found, expected = (ask(m, messages, pictures, keep=keep) for m in (model, plain))
            same(found, expected)
    rows = [shape[1] for shape in queued(model, names.PRE_ECL).shapes]
    assert max(rows) == 24
    assert sum(row > 1 for row in rows) > 6


def test_pieces_begin_where_engines_take_addresses(checkpoint: Path, tmp_path: Path, device: HostDevice) -> None:
    """128 bytes a row: every second one is aligned."""
    bundle = export(tmp_path / "b", checkpoint, precision="fp16")
    model = on_host_device(bundle, device, max_rows=25)
    found, expected = (logits_of(m, QUESTION + " row" * 40, [picture(1)], keep=4) for m in (model, load(bundle, backend="cpu")))
    assert np.abs(found - expected).max() <= 5e-3 * np.abs(expected).max()
    assert {shape[1] for shape in queued(model, names.PRE_ECL).shapes} >= {1, 24}


@pytest.mark.parametrize("ranges", [((1, 8), (1, 20), (33, 50)), ((1, 8), (16, 40))])
def test_rows_between_two_profiles_run_in_pieces_that_fit(
    ranges: tuple[tuple[int, int], ...], bundle: Path, plain: VisionLanguageModel, device: HostDevice
) -> None:
    model = on_host_device(bundle, device, row_ranges=ranges, capacity=512)
    for words in range(0, 80, 9):
        messages = QUESTION + " row" * words
        for images in (0, 1):
            same(ask(model, messages, [picture(1)] * images), ask(plain, messages, [picture(1)] * images))


def test_rows_that_no_profile_takes_are_an_error(bundle: Path, device: HostDevice) -> None:
    model = on_host_device(bundle, device, row_ranges=((16, 40),))
    with pytest.raises(EngineError, match=r"the engine of pre_ecl takes 16 rows or more at once, \d+ are left: compile the bundle again"):
        ask(model, QUESTION + " row" * 40, [])


def test_more_visual_tokens_than_a_score_takes_say_how_to_compile(bundle: Path, device: HostDevice) -> None:
    model = on_host_device(bundle, device, max_rows=24)
    message = r"the engine of score\.4 takes 24 visual tokens at once, the message has 32: .*`python -m runtime.compile --images 2`"
    with pytest.raises(EngineError, match=message):
        ask(model, QUESTION, [picture(0), picture(1)])
    assert ask(model, QUESTION, [picture(0)]).token_ids, "the model goes on"


def test_a_fixed_capacity_bounds_prompt_and_answer(bundle: Path, device: HostDevice) -> None:
    model = on_host_device(bundle, device, capacity=96)
    assert model.chain.max_context == 96
    result = ask(model, QUESTION, [picture(0)], max_new_tokens=400)
    assert result.prompt_tokens + len(result.token_ids) == 96
    with pytest.raises(ContextLengthError, match="context holds 96 with the answer: shorten it, or compile with a larger --capacity"):
        ask(model, QUESTION + " row" * 90, [picture(0)])
    group = model.chain.new_conversation(10, 10).pre
    assert group.capacity == 96
    with pytest.raises(ContextLengthError, match=r"97 tokens exceed the maximum context of 96: .* compile with a larger --capacity"):
        group.reserve(97)


# ---------------------------------------------------------------- what moves


def test_hidden_states_never_leave_the_device(model: VisionLanguageModel, device: HostDevice) -> None:
    result = ask(model, TWO_MESSAGES, [picture(i) for i in range(3)], max_new_tokens=5)
    logits, kept, scores = 4 * VOCAB, 8 * 4, [4 * 2 * N, 4 * N]
    assert sorted(device.downloads) == sorted([*[logits] * 5, kept, kept, *scores])
    assert result.kept_tokens == 8
    text = result.prompt_tokens - result.visual_tokens
    assert sum(device.uploads) < 3 * 4 * 3 * 56 * 56 + text * HIDDEN * 4 + 4 * (HIDDEN * 4 + 5 * 256) + 32 * 256, "visual rows stay there"


def test_one_images_rows_are_scored_where_they_lie(model: VisionLanguageModel) -> None:
    ask(model, QUESTION, [picture(1)], max_new_tokens=1)
    pre, score, post = (queued(model, graph).last for graph in (names.PRE_ECL, "score.4", names.POST_ECL))
    start = (score[names.HIDDEN_STATES].address - pre[names.HIDDEN_STATES].address) // (4 * HIDDEN)
    prompt = model.prompts.build(QUESTION, [picture(1)]).ids
    assert start == np.flatnonzero(prompt.visual_mask)[0]
    assert (score[names.SCORE_STATES].address - pre[names.SCORE_STATES].address) // (4 * HIDDEN) == start
    assert (score[names.KEPT_HIDDEN_STATES].address - post[names.HIDDEN_STATES].address) // (4 * HIDDEN) == start


def test_a_later_messages_kept_rows_go_straight_to_their_place(model: VisionLanguageModel) -> None:
    ask(model, TWO_MESSAGES, [picture(i) for i in range(3)], max_new_tokens=1)
    score, post = (queued(model, graph).last for graph in ("score.4", names.POST_ECL))
    visual = np.flatnonzero(model.prompts.build(TWO_MESSAGES, [picture(i) for i in range(3)]).ids.visual_mask)
    place = int(visual[2 * N]) - 2 * N + 4
    assert score[names.KEPT_HIDDEN_STATES].address - post[names.HIDDEN_STATES].address == place * 4 * HIDDEN


def test_copies_are_as_few_as_there_are_stretches(model: VisionLanguageModel, device: HostDevice) -> None:
    ask(model, QUESTION, [picture(1)], max_new_tokens=1)
    assert device.counts["copy"] == 3 + 2, "text, image, text into the embeddings; text on both sides of the kept rows"
    ask(model, QUESTION, [picture(1)], max_new_tokens=1, keep="all")
    assert device.counts["copy"] == 5 + 3, "what leaves the first half enters the second"
    ask(model, QUESTION, [], max_new_tokens=1)
    assert device.counts["copy"] == 8


# ---------------------------------------------------------------- decode


def test_steps_are_captured_once_and_replayed(model: VisionLanguageModel, device: HostDevice) -> None:
    ask(model, QUESTION, [picture(1)], max_new_tokens=9)
    assert (device.counts["capture"], device.counts["replay"]) == (1, 7), "the first of eight steps runs as it is"
    assert len(queued(model, names.PRE_ECL).shapes) == 3, "prefill, one step, one recording"
    assert device.counts["run pre_ecl"] == 9


def test_a_next_conversation_replays_the_first_ones_capture(
    model: VisionLanguageModel, device: HostDevice, plain: VisionLanguageModel
) -> None:
    ask(model, QUESTION, [picture(1)])
    first = queued(model, names.PRE_ECL).last
    device.counts.clear()
    same(ask(model, QUESTION, [picture(2)]), ask(plain, QUESTION, [picture(2)]))
    assert (device.counts["capture"], device.counts["replay"]) == (0, 7)
    assert device.counts["allocate"] == 0
    again = queued(model, names.PRE_ECL).last
    assert all(array == again[name] for name, array in first.items() if name.startswith(names.PAST))


def test_streams_in_turn_have_captures_of_their_own(model: VisionLanguageModel, device: HostDevice, plain: VisionLanguageModel) -> None:
    streams = [model.stream(QUESTION, [picture(i)], max_new_tokens=20, eos_token_ids=()) for i in range(2)]
    running = [iter(stream) for stream in streams]
    while running:
        running = [pieces for pieces in running if next(pieces, None) is not None]
    for i, stream in enumerate(streams):
        same(stream.result, ask(plain, QUESTION, [picture(i)], max_new_tokens=20))
    assert device.counts["capture"] == 2


def test_capture_is_left_out_where_it_is_switched_off_or_refused(
    bundle: Path, plain: VisionLanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    expected = ask(plain, QUESTION, [picture(1)])
    off, refusing, engines = HostDevice(), HostDevice(refuses_capture="no captures in this driver"), HostDevice()
    same(ask(on_host_device(bundle, off, capture=False), QUESTION, [picture(1)]), expected)
    assert caplog.messages == []
    same(ask(on_host_device(bundle, refusing), QUESTION, [picture(1)]), expected)
    assert caplog.messages == ["decode steps are not captured, each is enqueued anew: no captures in this driver"]
    caplog.clear()
    same(ask(on_host_device(bundle, engines, uncapturable="ONNX Runtime cannot run within a capture"), QUESTION, [picture(1)]), expected)
    assert caplog.messages == ["decode steps are not captured: ONNX Runtime cannot run within a capture"]
    assert [d.counts["capture"] + d.counts["replay"] for d in (off, refusing, engines)] == [0, 0, 0]


def test_a_step_goes_up_and_comes_back_in_one_copy_each(model: VisionLanguageModel, device: HostDevice) -> None:
    ask(model, QUESTION, [], max_new_tokens=1)
    before = device.counts.copy()
    ask(model, QUESTION, [], max_new_tokens=2)
    prefill = {"upload": before["upload"], "download": before["download"], "synchronize": before["synchronize"]}
    step = {name: device.counts[name] - before[name] - count for name, count in prefill.items()}
    assert step == {"upload": 1, "download": 1, "synchronize": 1}


def test_a_step_that_breaks_leaves_the_state_usable(
    model: VisionLanguageModel, plain: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [m.prefill(IMAGE_ONLY, [picture(1)]) for m in (model, plain)]
    executor = device_executor(model)
    enqueue = executor._post.enqueue

    def broken(arrays: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(executor._post, "enqueue", broken)
    with pytest.raises(KeyboardInterrupt):
        ask(model, QUESTION, [], state=states[0])
    groups = (states[0].conversation.pre, states[0].conversation.post)
    assert not executor.caches.block_of(groups[0]).sound, "a run that broke off may have left anything"
    monkeypatch.setattr(executor._post, "enqueue", enqueue)
    same(ask(model, QUESTION, [], state=states[0]), ask(plain, QUESTION, [], state=states[1]))
    assert all(executor.caches.block_of(group).sound for group in groups)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(executor._step, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        ask(model, QUESTION, [], state=states[0])
    assert not any(executor.caches.block_of(group).sound for group in groups)


# ---------------------------------------------------------------- memory


def test_allocations_return_to_what_they_were(model: VisionLanguageModel, device: HostDevice) -> None:
    for keep in ("all", 4):  # the largest that is to come
        ask(model, TWO_MESSAGES, [picture(i) for i in range(3)], keep=keep, max_new_tokens=200)
    gc.collect()
    device_executor(model).caches.free_idle()
    baseline = device.allocated, device.allocated_bytes
    for i in range(6):
        states = [model.prefill(IMAGE_ONLY, [picture(i)]) for _ in range(3)]
        ask(model, QUESTION, [], state=states[0].clone())
        ask(model, QUESTION, [picture(i)], max_new_tokens=40 + 20 * i)
    del states
    gc.collect()
    caches = device_executor(model).caches
    caches.collect()
    device.synchronize()
    assert len(caches._idle) <= 2 * 2
    caches.free_idle()
    assert (device.allocated, device.allocated_bytes) == baseline
    assert device_executor(model)._step.steps == {}, "captures go with their caches"


def test_closing_frees_everything_and_says_so_afterwards(model: VisionLanguageModel, device: HostDevice) -> None:
    state = model.prefill(IMAGE_ONLY, [picture(1)])
    ask(model, QUESTION, [picture(1)])
    model.close()
    assert device.allocated == 0
    assert device.closed
    for call in (lambda: ask(model, QUESTION, []), lambda: ask(model, QUESTION, [], state=state), lambda: state.clone()):
        with pytest.raises(EngineError, match="the model was closed"):
            call()
    model.close()


def test_a_model_that_nobody_holds_closes_its_device(bundle: Path, device: HostDevice) -> None:
    model = on_host_device(bundle, device)
    state = model.prefill(IMAGE_ONLY, [picture(1)])
    del model
    gc.collect()
    assert device.closed
    del state


def test_the_pool_gives_way_where_memory_is_short(bundle: Path, device: HostDevice) -> None:
    model = on_host_device(bundle, device)
    first = ask(model, QUESTION, [picture(1)])
    gc.collect()
    device_executor(model).caches.collect()
    device.limit_bytes = device.allocated_bytes + 280_000
    assert len(ask(model, QUESTION, [picture(1)], max_new_tokens=250).token_ids) == 250
    device.limit_bytes = device.allocated_bytes
    with pytest.raises(EngineError, match=r"out of memory: \d+ bytes were asked for"):
        _ = [model.prefill(IMAGE_ONLY, [picture(1)]) for _ in range(8)]
    device.limit_bytes = 1 << 40
    same(ask(model, QUESTION, [picture(1)]), first)


def test_caches_with_numbers_that_are_not_finite_are_not_handed_on(bundle: Path, device: HostDevice, plain: VisionLanguageModel) -> None:
    model = on_host_device(bundle, device, capacity=128)  # every conversation's caches would fit the next
    state = model.prefill(IMAGE_ONLY, [picture(1)])
    for buffer in state.conversation.pre.buffers.values():
        device.view(buffer)[:] = np.nan
    with pytest.raises(EngineError, match="the engine gave logits that are not numbers"):
        ask(model, QUESTION, [], state=state, max_new_tokens=3)
    del state
    gc.collect()
    same(ask(model, QUESTION, [picture(1)]), ask(plain, QUESTION, [picture(1)]))


# ---------------------------------------------------------------- the clock


def test_a_profile_times_stages_and_steps(model: VisionLanguageModel) -> None:
    with timed_engines(model.chain) as clock:
        result = ask(model, QUESTION, [picture(1)], max_new_tokens=5)
    prefill, decode = clock.split()
    assert prefill.library_ms is None
    assert 0 < prefill.run_ms <= result.ttft_ms
    assert 0 < decode.run_ms <= result.stages_ms["decode"]
    assert list(result.stages_ms) == ["preprocess", "vision", "embed", "pre_ecl", "score", "post_ecl", "decode"]
    ask(model, QUESTION, [picture(1)], max_new_tokens=5)
    assert clock.split() == (prefill, decode), "it stops with the block"


def test_an_engine_that_is_missing_is_named(bundle: Path, device: HostDevice) -> None:
    from runtime.device.executor import DeviceExecutor

    with pytest.raises(EngineError, match="there is no engine of vision: compile the bundle again"):
        DeviceExecutor(bundle, read_manifest(bundle), device, {}, "nothing")
