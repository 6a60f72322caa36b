"""One image's numbers: against definitions computed one question at a time, with every token kept, and without labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration import agreement
from calibration.activations import load_reader
from calibration.agreement import AgreementReader
from calibration.grid import Grid, Setting
from calibration.pruned_forward import pack
from calibration.questions import Question, encode
from calibration.selection import Selector, rank
from export.eager import EagerPrunedLlava, load_llava
from runtime.images import image_hash, image_seed, load_image
from tests.calibration.asking import ANSWERS, TEXTS

GRID = Grid(("trace", "random", "uniform"), ("random", "uniform"), (2, 5), (16, 5))


@pytest.fixture(scope="module")
def reader(plain: Path) -> AgreementReader:
    return AgreementReader(load_reader(plain, "llava15", "cpu", "float32"), 16)


@pytest.fixture(scope="module")
def questions(images: Path) -> list[Question]:
    return [Question(images / "00.png", text, answer) for text, answer in zip(TEXTS, ANSWERS, strict=True)]


def test_sums_are_those_of_the_definitions_one_question_at_a_time(reader: AgreementReader, plain: Path, questions: list[Question]) -> None:
    image = load_image(questions[0].image)
    found = reader.measure(image, questions, GRID)
    model, setting = load_llava(plain, "sdpa"), Setting("random", 5, 5)
    index = GRID.settings().index(setting)
    kl, agreeing, unchanged, positions = 0.0, 0, 0, 0
    for question in questions:
        ids, pixels = encode(question, image, reader.processor)
        prompt = pack([ids], model.config.image_token_id)
        dense = reader.forward.dense(prompt, reader.forward.image_embeds(pixels))
        kept = rank(reader.forward, dense, 5, Selector("random"), image_seed(image_hash(image))).kept(5)
        rows = []
        for keep, indices in ((None, None), (5, kept)):
            eager = EagerPrunedLlava(model, 5, keep, "random", attention="sdpa")
            whole = torch.tensor([[*ids.prompt_ids, *(ids.answer_ids or ())[:-1]]])
            logits = eager.prefill(whole, pixels, kept_indices=indices).logits[-len(ids.answer_ids or ()) :]
            rows.append(logits.double().log_softmax(-1))
        p, q = rows
        kl += float((p.exp() * (p - q)).sum())
        same = p.argmax(-1) == q.argmax(-1)
        agreeing, unchanged, positions = agreeing + int(same.sum()), unchanged + bool(same.all()), positions + len(same)
    assert kl > 0.1
    assert found.kl[index] == pytest.approx(kl, rel=1e-4)
    assert (found.agreeing[index], found.unchanged[index], found.positions) == (agreeing, unchanged, positions)
    assert (found.questions, found.labelled) == (3, 3)


def test_keeping_every_token_changes_nothing(reader: AgreementReader, questions: list[Question]) -> None:
    found = reader.measure(load_image(questions[0].image), questions, GRID)
    for index, setting in enumerate(GRID.settings()):
        if setting.keep == 16:
            assert found.kl[index] < 1e-8
            assert (found.agreeing[index], found.unchanged[index]) == (found.positions, 3)
            assert found.right[index] == found.unpruned_right
            assert found.mass[index] == pytest.approx(1.0)
        else:
            assert found.kl[index] > 1e-3  # the control: fewer tokens do change something
            assert found.mass[index] < 1


def test_without_a_label_the_unpruned_models_own_answer_is_followed(
    reader: AgreementReader, plain: Path, questions: list[Question]
) -> None:
    image = load_image(questions[0].image)
    ids, pixels = encode(dataclasses.replace(questions[0], answer=None), image, reader.processor)
    said = reader.greedy_answer(ids.prompt_ids, pixels)
    end = reader.processor.tokenizer.eos_token_id
    eager = EagerPrunedLlava(load_llava(plain, "sdpa"), 2, None, attention="sdpa")
    assert list(said) == eager.generate(torch.tensor([ids.prompt_ids]), pixels, agreement.GREEDY_TOKENS, {end})
    found = reader.measure(image, [dataclasses.replace(question, answer=None) for question in questions], GRID)
    assert (found.labelled, found.unpruned_right, found.right) == (0, 0, (0,) * 12)
    assert found.positions >= len(said)
    mixed = reader.measure(image, [questions[1], dataclasses.replace(questions[0], answer=None)], GRID)
    assert (mixed.questions, mixed.labelled) == (2, 1)


def test_many_questions_are_run_in_several_passes_and_give_the_same(
    reader: AgreementReader, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = load_image(questions[0].image)
    together = reader.measure(image, questions, GRID)
    for name, value in (("PASS_QUESTIONS", 2), ("PASS_TOKENS", 1)):
        monkeypatch.setattr(agreement, name, value)
        apart = reader.measure(image, questions, GRID)
        assert np.allclose(apart.kl, together.kl, rtol=1e-4, atol=1e-8)
        assert dataclasses.replace(apart, kl=()) == dataclasses.replace(together, kl=())
