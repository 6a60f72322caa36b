"""The shipped model: it truly answers, the chain answers as eager does, and its real activations are scored right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from export.build import build_bundle
from export.eager import EagerPrunedLlava, encode_question
from export.exact_score import token_scores
from export.parity import selection_quality
from export.plan import BuildOptions, make_plan
from export.tolerances import MAX_SWAP_DISTANCE, MIN_OVERLAP
from runtime.pipeline import VisionLanguageModel, load
from tiny_llava.evaluate import BLANK, evaluate, overall
from tiny_llava.heldout import CHECKPOINT, load_heldout

ANSWERS = 210  # held-out questions that chain and eager model answer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return _built(tmp_path_factory.mktemp("trained"), BuildOptions("tiny-llava"))


@pytest.fixture(scope="module")
def reference(model: VisionLanguageModel) -> EagerPrunedLlava:
    return EagerPrunedLlava(CHECKPOINT, model.manifest.split_layer, model.manifest.budgets[0], model.manifest.score_mode)


def _built(folder: Path, options: BuildOptions) -> VisionLanguageModel:
    build_bundle(make_plan(options), folder / "bundle")
    return load(folder / "bundle")


def test_chain_answers_as_the_eager_pruned_model_on_every_question(model: VisionLanguageModel, reference: EagerPrunedLlava) -> None:
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    differing = []
    for item in load_heldout(ANSWERS):
        result = model.generate(item.question, [item.image], max_new_tokens=12)
        with Image.open(item.image) as image:
            ids, pixels = encode_question(processor, item.question, image)
        eager = reference.generate(ids, pixels, 12, {processor.tokenizer.eos_token_id})
        if tuple(eager) != result.token_ids:
            differing.append((item.question, result.text, processor.tokenizer.decode(eager)))
    assert differing == []


def test_selection_on_real_activations_is_the_exact_one(model: VisionLanguageModel, reference: EagerPrunedLlava) -> None:
    keep, found = model.manifest.budgets[0], []
    for path in dict.fromkeys(item.image for item in load_heldout()):
        prompt = model.prompts.build("read row 1.", [path])
        ids, mask = prompt.ids.input_ids, prompt.ids.visual_mask
        conversation, _ = model.chain.prefill(ids, mask, prompt.pixel_values, keep=keep)
        states = reference.prefill(torch.from_numpy(ids)[None], torch.from_numpy(prompt.pixel_values)).score_states[torch.from_numpy(mask)]
        exact = token_scores(states.reshape(len(states), reference.heads, -1), "trace")
        entropy = conversation.token_entropy
        found.append(selection_quality(exact, conversation.kept_indices, float(np.abs(entropy - exact).max())))
    assert len(found) >= 100
    assert np.mean([q.overlap for q in found]) >= MIN_OVERLAP
    assert max(q.score_error for q in found) <= MAX_SWAP_DISTANCE / 2
    assert max(q.swap_distance for q in found) <= MAX_SWAP_DISTANCE


def test_checkpoint_loads_as_an_ordinary_hugging_face_model() -> None:
    from transformers import LlavaForConditionalGeneration

    llava = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT)
    assert llava.dtype == torch.bfloat16
    assert sum(f.stat().st_size for f in CHECKPOINT.iterdir()) <= 16_000_000
    assert llava.config.text_config.num_hidden_layers >= 12
    assert llava.config.text_config.num_attention_heads >= 8


def test_blank_image_cannot_be_answered(model: VisionLanguageModel) -> None:
    questions = load_heldout(210)
    seen, blank = (overall(evaluate(model, questions, "all", blank=b))[0] / len(questions) for b in (False, True))
    assert blank <= 0.40
    assert seen > blank + 0.4


def test_random_selection_right_after_the_first_layer_loses_answers(tmp_path: Path, model: VisionLanguageModel) -> None:
    questions = load_heldout(210)
    tokens = model.manifest.geometry.visual_tokens
    random = _built(tmp_path, BuildOptions("tiny-llava", keep=(round(0.11 * tokens),), split_layer=1, score_mode="random"))
    unpruned, pruned = (overall(evaluate(m, questions, k))[0] / len(questions) for m, k in ((model, "all"), (random, None)))
    assert unpruned - pruned >= 0.10


def test_grey_image_is_not_mistaken_for_a_scene(model: VisionLanguageModel) -> None:
    assert model.generate("read row 2.", [BLANK], keep="all").text == "nothing"
