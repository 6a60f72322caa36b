"""LLaVA-1.5's published tokenizer, chat template and image processor around a small decoder: the same prompt, pixels and answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from export.build import build_bundle
from export.eager import EagerPrunedLlava, encode_question
from export.plan import BuildOptions, make_plan
from runtime.pipeline import load
from tests.models import tiny_llava_checkpoint

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json", "processor_config.json",
          "chat_template.json", "generation_config.json")  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(model_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of 3 layers with LLaVA-1.5's vocabulary, image size and files, as an old checkpoint of the hub has them."""
    folder = tiny_llava_checkpoint(tmp_path_factory.mktemp("real") / "checkpoint", layers=3, vocab=32064, image_size=336)
    for name in ("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    for name in COPIED:
        shutil.copyfile(model_configs / "llava-1.5-7b-hf" / name, folder / name)
    config = json.loads((folder / "config.json").read_text())
    config |= {"image_token_index": 32000, "pad_token_id": 32001}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.filterwarnings("ignore")  # transformers' own, about the age of these files
def test_answers_are_those_of_the_hugging_face_processor_and_eager_model(checkpoint: Path, tmp_path: Path) -> None:
    build_bundle(make_plan(BuildOptions("llava15", checkpoint=str(checkpoint), keep=(166,), split_layer=2)), tmp_path / "bundle")
    model = load(tmp_path / "bundle")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 310, 3), dtype=np.uint8)).resize((620, 400))
    question = "What is unusual about this image? Antworte auf Deutsch: äöü 你好"
    result = model.generate(question, [image], max_new_tokens=24)
    ids, pixels = encode_question(AutoProcessor.from_pretrained(checkpoint), question, image)
    prompt = model.prompts.build(question, [image])
    assert prompt.ids.input_ids.tolist() == ids[0].tolist()
    assert prompt.ids.visual_mask.sum() == result.visual_tokens == 576
    assert pixels is not None
    assert prompt.pixel_values is not None
    assert np.abs(prompt.pixel_values - pixels.numpy()).max() <= 1e-5
    reference = EagerPrunedLlava(checkpoint, 2, 166)
    assert tuple(reference.generate(ids, pixels, 24, {2}, kept_indices=np.array(result.kept_indices))) == result.token_ids
