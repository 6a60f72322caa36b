"""Tiny random LLaVA checkpoints for tests, written by transformers' own classes: any size, seeded, a few hundred kilobytes.

The weights are scaled so that activations vary from token to token and attention is not uniform: a wrong position, mask or
index changes the logits far more than rounding does.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tiny_llava.model import CHAT_TEMPLATE, build_tokenizer

GAIN = 1.4  # standard deviation that a linear layer gives to an input of unit variance


def tiny_llava_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    layers: int = 4,
    hidden: int = 64,
    intermediate: int = 96,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    vocab: int | None = None,
    max_positions: int = 1024,
    rope_theta: float = 10000.0,
    attention_bias: bool = False,
    tied: bool = False,
    image_size: int = 28,
    patch: int = 14,
    vision_hidden: int = 48,
    vision_layers: int = 3,
    vision_heads: int = 4,
    feature_layer: int = -2,
    strategy: Literal["default", "full"] = "default",
    vision_activation: str = "quick_gelu",
    projector_activation: str = "gelu",
    projector_bias: bool = True,
    dtype: str = "float32",
    shard_size: str = "1GB",
) -> Path:
    """Writes a random checkpoint with tokenizer, processor and chat template; the same arguments give the same bytes.

    Args:
        directory: made where it does not exist.
        kv_heads: as many as `heads` when left out.
        head_dim: `hidden // heads` when left out.
        vocab: at least the tokenizer's 408 entries, which is what it is when left out.
        attention_bias: random biases on q, k and v, and a zero one on the output projection.
        image_size, patch: (image_size // patch) squared visual tokens, and one more with `strategy` "full".
        dtype: torch's name of the stored type; values are drawn in float32.
        shard_size: the largest weight file, as save_pretrained takes it ("100KB" makes several).

    Returns:
        `directory`.
    """
    tokenizer = _tokenizer()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = LlamaConfig(
        vocab_size=vocab or len(tokenizer), hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads or heads, head_dim=head_dim or hidden // heads,
        max_position_embeddings=max_positions, rms_norm_eps=1e-5, attention_bias=attention_bias, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, **special,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden, intermediate_size=2 * vision_hidden, num_hidden_layers=vision_layers, num_attention_heads=vision_heads,
        image_size=image_size, patch_size=patch, projection_dim=vision_hidden, hidden_act=vision_activation,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.get_vocab()["<image>"],
        vision_feature_layer=feature_layer, vision_feature_select_strategy=strategy, projector_hidden_act=projector_activation,
        multimodal_projector_bias=projector_bias, image_seq_length=(image_size // patch) ** 2 + (strategy == "full"),
        tie_word_embeddings=tied, **special,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    _draw_weights(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard_size)
    _processor(tokenizer, image_size, patch, strategy).save_pretrained(directory)
    return directory


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def _processor(tokenizer: PreTrainedTokenizerFast, image_size: int, patch: int, strategy: str) -> LlavaProcessor:
    images = CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size})
    return LlavaProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy=strategy, image_token="<image>",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


@torch.no_grad()
def _draw_weights(model: LlavaForConditionalGeneration, seed: int) -> None:
    """Draws every parameter anew, in the order of the names."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.1 * noise)
        elif name.endswith("o_proj.bias"):
            parameter.zero_()
        elif "embed" in name and "patch" not in name:  # tokens, positions, the class token
            parameter.copy_(noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(noise * (GAIN / math.sqrt(parameter[0].numel())))
