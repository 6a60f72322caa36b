"""What a benchmark harness's requests become: settings, options, images' places, answers, statistics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.accuracy.bundle_model import (
    LLAVA_SYSTEM,
    BundleModel,
    Settings,
    checked_images,
    generation_options,
    padded,
    place_images,
    seconds_and_tokens,
    statistics,
)
from runtime.chat import ChatTemplate, Tokenizer, normalize_messages
from runtime.errors import BundleError, EntropyPruneError, InputError, UsageError
from runtime.images import load_image

Part = dict[str, str]
IMAGE: Part = {"type": "image"}


def text(value: str) -> Part:
    return {"type": "text", "text": value}


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def settings(bundle: Path, **changes: Any) -> Settings:
    return Settings.from_arguments({"bundle": bundle, "max_new_tokens": 6, **changes})


# ------------------------------------------------------------ settings


def test_settings_take_the_arguments_that_a_harness_adds_by_itself() -> None:
    given = {"bundle": "b", "keep": 166, "batch_size": "1", "max_batch_size": None, "device": None}
    assert Settings.from_arguments(given) == Settings("b", keep=166)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bundle": "b", "kep": 1}, "unknown model argument kep: expected some of bundle, keep, style"),
        ({"keep": 1}, "no bundle given: pass bundle=DIR"),
        ({"bundle": "b", "batch_size": 4}, "batch_size is 4; a bundle answers one question at a time"),
        ({"bundle": "b", "device": "cuda"}, "device is 'cuda'; the bundle's target decides"),
        ({"bundle": "b", "style": "vicuna"}, "style is 'vicuna'; expected one of bundle, llava"),
        ({"bundle": "b", "max_new_tokens": 0}, "max_new_tokens is 0; give a whole number from 1 on"),
        ({"bundle": "b", "cache_mb": 1.5}, r"cache_mb is 1\.5; give a whole number from 0 on"),
    ],
)
def test_settings_refuse_with_what_was_got_and_expected(given: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings.from_arguments(given)


def test_a_missing_bundle_and_an_absent_budget_are_told_before_anything_is_answered(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a directory: name a bundle made by"):
        BundleModel(settings(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="this bundle holds the budgets 4, 2 and all, not 3: export it with --keep 3"):
        BundleModel(settings(tiny_bundle, keep=3))


# ------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"max_new_tokens": 128, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, {"max_new_tokens": 128}),
        ({"until": ["\n\n", ""], "do_sample": False}, {"stop_strings": ["\n\n"]}),
        ({"until": "ASSISTANT:"}, {"stop_strings": ["ASSISTANT:"]}),
        ({"until": []}, {}),
        ({"temperature": 0.2, "top_p": None}, {"do_sample": True, "temperature": 0.2}),
        ({"temperature": 0.2, "do_sample": False}, {}),
        ({"temperature": 0.0, "do_sample": True, "top_p": 0}, {}),
        ({"do_sample": True, "top_k": 5, "repetition_penalty": 1.2}, {"do_sample": True, "top_k": 5, "repetition_penalty": 1.2}),
        ({"image_aspect_ratio": "original"}, {}),
    ],
)
def test_a_tasks_generation_options_become_the_runtimes(given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert generation_options(given) == expected


def test_generation_options_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(UsageError, match="num_beams is 3; beam search is not implemented: set it to 1"):
        generation_options({"num_beams": 3})
    with pytest.raises(UsageError, match="generation option min_p is not implemented: expected some of max_new_tokens, until"):
        generation_options({"min_p": 0.1})


# ------------------------------------------------------------ images


@pytest.mark.parametrize(
    ("given", "images", "content"),
    [
        ("why?", 0, [text("why?")]),
        ("why?", 2, [IMAGE, IMAGE, text("why?")]),
        ("is <image> like <image>?", 2, [text("is"), IMAGE, text("like"), IMAGE, text("?")]),
        ("<image>\nwhy?", 1, [IMAGE, text("why?")]),
    ],
)
def test_images_stand_at_their_marks_or_first(given: str, images: int, content: list[Part]) -> None:
    assert place_images(given, images) == [{"role": "user", "content": content}]


@pytest.mark.parametrize(("given", "images"), [("<image> <image>", 1), ("<image> why?", 2), ("<image> why?", 0)])
def test_marks_that_do_not_match_the_images_are_refused(given: str, images: int) -> None:
    with pytest.raises(InputError, match=rf"the text has \d <image> for {images} image\(s\): mark every image once, or none"):
        place_images(given, images)


def test_videos_and_sounds_are_refused() -> None:
    assert checked_images(None) == []
    for visuals in (["film.mp4"], [{"array": [], "sampling_rate": 16000}]):
        with pytest.raises(InputError, match="only images are implemented, no video and no sound"):
            checked_images(visuals)


def test_padding_puts_the_image_in_the_middle_of_a_square() -> None:
    square = np.asarray(padded(picture(0, 60, 40), (1, 2, 3)))
    assert square.shape == (60, 60, 3)
    np.testing.assert_array_equal(square[10:50], np.asarray(picture(0, 60, 40)))
    assert (square[:10] == (1, 2, 3)).all()
    assert (square[50:] == (1, 2, 3)).all()


# ------------------------------------------------------------ answers


@pytest.mark.parametrize("keep", ["all", 4, 2])
def test_answers_are_those_of_generate(tiny_bundle: Path, keep: int | str) -> None:
    bundle = BundleModel(settings(tiny_bundle, keep=keep))
    one, two = picture(1), picture(2)
    cases: list[tuple[str, list[Image.Image]]] = [("why?", []), ("what is this?", [one]), ("<image> or <image>?", [one, two])]
    for question, images in cases:
        assert bundle.answer(question, images, {"max_new_tokens": 5}) == bundle.generations[-1].text
        direct = bundle.model.generate(place_images(question, len(images)), images, keep=keep, max_new_tokens=5)
        assert bundle.generations[-1].token_ids == direct.token_ids
        assert bundle.generations[-1].kept_indices == direct.kept_indices
    kept = 16 if keep == "all" else int(keep)
    assert [g.kept_tokens for g in bundle.generations] == [0, kept, 32 if keep == "all" else kept]


def test_tasks_without_a_limit_of_tokens_get_the_settings(tiny_bundle: Path) -> None:
    bundle = BundleModel(settings(tiny_bundle))
    bundle.answer("why?", [], {})
    bundle.answer("why?", [], {"max_new_tokens": 2})
    assert [(len(g.token_ids), g.finish_reason) for g in bundle.generations] == [(6, "length"), (2, "length")]


def test_sampling_differs_from_question_to_question_and_repeats_with_the_seed(tiny_bundle: Path) -> None:
    def drawn(seed: int) -> list[tuple[int, ...]]:
        bundle = BundleModel(settings(tiny_bundle, seed=seed))
        for _ in range(3):
            bundle.answer("why?", [], {"temperature": 1.0})
        return [g.token_ids for g in bundle.generations]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 3


def test_style_llava_puts_the_system_prompt_first_and_pads(tiny_bundle: Path) -> None:
    bundle, image = BundleModel(settings(tiny_bundle, style="llava")), picture(3)
    bundle.answer("why?", [image], {})
    mean = bundle.model.prompts.image_processor.mean
    assert mean is not None
    messages = [{"role": "system", "content": [text(LLAVA_SYSTEM)]}, {"role": "user", "content": [IMAGE, text("why?")]}]
    square = padded(load_image(image), (int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)))
    direct = bundle.model.generate(messages, [square], max_new_tokens=6)
    plain = bundle.model.generate("why?", [image], max_new_tokens=6)
    assert bundle.generations[0].token_ids == direct.token_ids
    np.testing.assert_array_equal(bundle.generations[0].token_entropy, direct.token_entropy)
    assert bundle.generations[0].prompt_tokens > plain.prompt_tokens
    assert plain.token_entropy is not None
    assert (plain.token_entropy != direct.token_entropy).any()


def test_style_llava_has_the_image_where_the_papers_scripts_expect_it(model_configs: Path) -> None:
    folder = model_configs / "llava-1.5-7b-hf"
    messages = [{"role": "system", "content": LLAVA_SYSTEM}, *place_images("What is this?", 1)]
    template = ChatTemplate((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    rendered = template.render(normalize_messages(messages, 1))
    assert rendered == f"{LLAVA_SYSTEM} USER: <image>\nWhat is this? ASSISTANT:"
    ids = Tokenizer.from_file(folder / "tokenizer.json").encode(rendered, 32000, [576])
    assert int(ids.visual_mask.argmax()) == 35  # image_token_start_index of the authors' scripts


def test_requests_are_answered_in_order_and_an_error_names_the_question(tiny_bundle: Path) -> None:
    bundle = BundleModel(settings(tiny_bundle))
    documents = {"set": {"test": [{"images": [picture(seed)]} for seed in range(3)] + [{"images": ["film.mp4"]}]}}

    def request(number: int, options: Mapping[str, Any]) -> Any:
        return (f"question {number}", options, lambda doc: doc["images"], number, "set", "test")

    answers = bundle.answer_all([request(number, {}) for number in (2, 0, 1)], documents)
    for answer, number in zip(answers, (2, 0, 1), strict=True):
        assert answer == bundle.model.generate(f"question {number}", [picture(number)], max_new_tokens=6).text
    for refused, message in ((request(3, {}), "only images"), (request(1, {"num_beams": 2}), "num_beams is 2")):
        with pytest.raises(EntropyPruneError, match=rf"^task set, question \d: .*{message}"):
            bundle.answer_all([refused], documents)


def test_statistics_leave_out_the_times_of_images_that_were_in_the_cache(tiny_bundle: Path) -> None:
    bundle = BundleModel(settings(tiny_bundle, keep=2, cache_mb=100))
    for question in ("why?", "where?", "who?"):
        bundle.answer(question, [picture(5)], {})
    assert [g.reused_tokens > 0 for g in bundle.generations] == [False, True, True]
    found = statistics(bundle.generations)
    assert (found["questions"], found["visual_tokens"], found["kept_tokens"]) == (3, 16, 2)
    assert found["ttft_questions"] == 1
    assert found["ttft_ms_p50"] == pytest.approx(bundle.generations[0].ttft_ms)
    seconds, tokens = seconds_and_tokens(bundle.generations)
    assert tokens == sum(len(g.token_ids) for g in bundle.generations)
    assert seconds * 1e3 >= sum(g.ttft_ms for g in bundle.generations)
    assert statistics([]) == {}
