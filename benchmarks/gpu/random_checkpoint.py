"""A checkpoint of LLaVA-1.5-7B's shape with random weights, so that the kit needs no download: geometry of `configs/models/llava15.toml`,
the shipped model's small tokenizer, weights as transformers initialises them. It answers nonsense, in the real time.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import UsageError

if TYPE_CHECKING:
    from export.spec import ModelSpec

SHARD = "2GB"


def real_shape() -> ModelSpec:
    """LLaVA-1.5-7B's geometry.

    Raises:
        UsageError: its config file has none.
    """
    from export.configs import load_model_config

    spec = load_model_config("llava15").spec
    if spec is None:
        raise UsageError("configs/models/llava15.toml has no geometry: give it one")
    return spec


def small_shape() -> ModelSpec:
    """The same model made small enough for a rehearsal: 16 visual tokens, 4 layers of 64."""
    spec = real_shape()
    decoder = dataclasses.replace(
        spec.decoder, layers=4, hidden_size=64, intermediate_size=96, query_heads=4, kv_heads=4, head_size=16, vocab_size=512,
        max_positions=1024,
    )  # fmt: skip
    vision = dataclasses.replace(spec.vision, image_size=56, hidden_size=48, intermediate_size=96, layers=2, heads=4, output_size=64)
    return dataclasses.replace(spec, decoder=decoder, vision=vision)


def random_checkpoint(folder: Path, spec: ModelSpec, seed: int, dtype: str) -> Path:
    """Writes the checkpoint, on a GPU's random numbers where there is one.

    Args:
        folder: made where it does not exist; a checkpoint that is there is written over.
        dtype: torch's name of the stored type.

    Returns:
        `folder`.
    """
    import torch
    from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor

    from benchmarks.gpu.transformers import llava_config
    from tiny_llava.model import CHAT_TEMPLATE, build_tokenizer

    tokenizer = build_tokenizer()
    config = llava_config(dataclasses.replace(spec, image_token_id=tokenizer.get_vocab()["<image>"]))
    for part in (config, config.text_config):
        part.bos_token_id, part.eos_token_id, part.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlavaForConditionalGeneration._from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=SHARD)
    side = spec.vision.image_size
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    LlavaProcessor(
        images, tokenizer, patch_size=spec.vision.patch_size, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder
