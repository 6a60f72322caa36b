"""Packed, pruned passes against the reference that runs one question at a time, and teacher forcing against greedy generation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from calibration.pruned_forward import DensePass, PackedPrompt, PrunedForward, exact, pack
from calibration.questions import EncodedQuestion, Question, encode, read_questions
from calibration.selection import Selector, rank
from export.eager import EagerPrunedLlava, load_llava
from runtime.errors import InputError, UsageError
from runtime.images import load_image
from tests.calibration.asking import ANSWERS, TEXTS
from tests.conftest import ROOT
from tests.models import tiny_llava_checkpoint

TOLERANCE = 2e-4  # of logits of about 10; measured 2e-5
SHAPES: tuple[dict[str, Any], ...] = ({}, {"heads": 8, "kv_heads": 2, "attention_bias": True}, {"kv_heads": 1, "head_dim": 24})


class Case:
    """A checkpoint, three encoded questions about one image, and both ways to run them."""

    def __init__(self, checkpoint: Path, image: Path) -> None:
        processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = load_llava(checkpoint, "sdpa")
        self.forward = PrunedForward(self.model)
        asked = [Question(image, text, answer) for text, answer in zip(TEXTS, ANSWERS, strict=True)]
        pairs = [encode(question, load_image(image), processor) for question in asked]
        self.encoded, self.pixels = [ids for ids, _ in pairs], pairs[0][1]
        self.prompt = pack(self.encoded, self.model.config.image_token_id)

    def dense(self, prompt: PackedPrompt | None = None) -> DensePass:
        return self.forward.dense(prompt or self.prompt, self.forward.image_embeds(self.pixels))

    def reference(self, split: int, kept: np.ndarray | None) -> torch.Tensor:
        """Logits [A, vocab] of the questions, one after the other."""
        keep = None if kept is None else len(kept)
        eager = EagerPrunedLlava(self.model, split, keep, "random", attention="sdpa")
        rows = []
        for question in self.encoded:
            answer = question.answer_ids or ()
            ids = torch.tensor([[*question.prompt_ids, *answer[:-1]]])
            rows.append(eager.prefill(ids, self.pixels, kept_indices=kept).logits[-len(answer) :])
        return torch.cat(rows)


@pytest.fixture(scope="module", params=SHAPES, ids=("multi-head", "grouped-query", "one key-value head"))
def case(request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tiny_llava_checkpoint(tmp_path_factory.mktemp("c") / "checkpoint", image_size=56, **request.param), images / "00.png")


def test_packed_questions_give_the_logits_of_each_alone(case: Case) -> None:
    logits = case.dense().logits
    assert logits.abs().max() > 1
    assert torch.allclose(logits, case.reference(2, None), atol=TOLERANCE)
    for number, question in enumerate(case.encoded):
        alone = case.dense(pack([question], case.model.config.image_token_id))
        assert torch.allclose(logits[case.prompt.owners == number], alone.logits, atol=TOLERANCE)


@pytest.mark.parametrize("split", [1, 2, 3])
def test_given_selections_give_the_references_logits(case: Case, split: int) -> None:
    kept = np.stack([np.sort(np.random.default_rng(seed).permutation(16)[:5]) for seed in range(3)])
    found = case.forward.pruned(case.dense(), split, kept)
    for row, logits in zip(kept, found, strict=True):
        assert torch.allclose(logits, case.reference(split, row), atol=TOLERANCE)
    assert not torch.allclose(found[0], found[1], atol=100 * TOLERANCE)


def test_keeping_every_token_is_the_unpruned_model(case: Case) -> None:
    dense = case.dense()
    found = case.forward.pruned(dense, 2, np.arange(16)[None])[0]
    assert torch.allclose(found, dense.logits, atol=TOLERANCE)


def test_other_positions_give_other_logits(case: Case) -> None:
    """Negative control: the questions one position later, and the kept tokens numbered anew."""
    dense = case.dense()
    later = dataclasses.replace(case.prompt, position_ids=case.prompt.position_ids + (case.prompt.segments > 0))
    assert not torch.allclose(case.dense(later).logits, dense.logits, atol=100 * TOLERANCE)
    kept = np.array([[1, 5, 6, 11, 15]])
    anew = case.prompt.position_ids.clone()
    anew[case.prompt.visual_rows[torch.from_numpy(kept[0])]] = case.prompt.visual_rows[:5]
    renumbered = dataclasses.replace(dense, prompt=dataclasses.replace(case.prompt, position_ids=anew))
    right = case.forward.pruned(dense, 2, kept)
    assert not torch.allclose(case.forward.pruned(renumbered, 2, kept), right, atol=100 * TOLERANCE)


def test_questions_that_see_each_other_give_other_logits(case: Case) -> None:
    """Negative control: one segment for all questions."""
    together = dataclasses.replace(case.prompt, segments=case.prompt.segments.clamp(max=1))
    assert not torch.allclose(case.dense(together).logits, case.dense().logits, atol=100 * TOLERANCE)


def test_what_cannot_be_packed_is_told(case: Case) -> None:
    token = case.model.config.image_token_id
    first, second, _ = case.encoded
    other = EncodedQuestion(second.question, (7, *second.prompt_ids), second.answer_ids)
    with pytest.raises(InputError, match="must be about one image that comes before their text: pack them one by one"):
        pack([first, other], token)
    with pytest.raises(InputError, match="the prompt holds no visual tokens"):
        pack([dataclasses.replace(first, prompt_ids=(1, 2, 3))], token)
    with pytest.raises(UsageError, match=r"the question 'what is at row 2 column 3\?' has no answer to follow"):
        pack([dataclasses.replace(first, answer_ids=None)], token)
    with pytest.raises(InputError, match="the prompt has 16 visual tokens, the image gives 15"):
        case.forward.dense(case.prompt, case.forward.image_embeds(case.pixels)[:15])


def test_teacher_forcing_tells_what_greedy_generation_of_the_shipped_model_answers() -> None:
    checkpoint, folder = ROOT / "tiny_llava" / "checkpoint", ROOT / "tiny_llava" / "calibration"
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = load_llava(checkpoint, "sdpa")
    forward = PrunedForward(model)
    outcomes = set()
    for name in ("000.png", "001.png"):
        asked = [question for question in read_questions(folder / "questions.json") if question.image.name == name][:4]
        image: Image.Image = load_image(folder / name)
        pairs = [encode(question, image, processor) for question in asked]
        dense = forward.dense(pack([ids for ids, _ in pairs], model.config.image_token_id), forward.image_embeds(pairs[0][1]))
        kept = rank(forward, dense, 2, Selector("trace")).kept(4)
        right = exact(forward.pruned(dense, 2, kept[None])[0], dense.prompt)
        eager = EagerPrunedLlava(model, 2, 4, "trace", attention="sdpa")
        for question, is_right in zip(asked, right.tolist(), strict=True):
            answer = eager.answer(question.text, image, processor, kept_indices=kept)
            assert (answer == question.answer) == is_right, (question.text, answer)
            outcomes.add(is_right)
    assert outcomes == {True, False}  # both are put to the test
