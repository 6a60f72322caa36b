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
from export.parity import compare_selection
from export.plan import BuildOptions, make_plan
from export.tolerances import MAX_SHORTFALL, MAX_SWAP_DISTANCE, MIN_OVERLAP
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


@pytest.mark.parametrize("mode", ["trace", "dpp"])
def test_selection_on_real_activations_is_the_exact_one(mode: str, tmp_path: Path) -> None:
    model = _built(tmp_path, BuildOptions("tiny-llava", score_mode=mode))
    reference = EagerPrunedLlava(CHECKPOINT, model.manifest.split_layer, None, mode)
    images = list(dict.fromkeys(item.image for item in load_heldout()))
    prompts = (model.prompts.build("read row 1.", [path]) for path in images)
    found = [compare_selection(model.chain, reference, prompt, model.manifest.budgets[0])[0] for prompt in prompts]
    assert len(found) >= 100
    assert np.mean([q.overlap for q in found]) >= MIN_OVERLAP
    assert max(q.swap_distance for q in found) <= MAX_SWAP_DISTANCE
    assert max(q.shortfall for q in found) <= MAX_SHORTFALL
    errors = np.array([q.score_error for q in found])
    assert mode == "dpp" or np.isfinite(errors).all()  # NaN is for `dpp` alone, where the sets differ
    assert np.nanmax(errors) <= MAX_SWAP_DISTANCE / 2


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
