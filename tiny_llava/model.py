"""The small LLaVA's shape, tokenizer and processor, as ordinary Hugging Face objects.

LLaVA-1.5's architecture in small: a CLIP vision tower whose last-but-one layer feeds a two-layer projector and a
12-layer Llama decoder of 8 query heads; 64 visual tokens of 14 x 14 pixels, image before question.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tiny_llava.scenes import COLORS, NAMES, SIZE

PATCH = 14
# Renders "USER: <image>\nquestion ASSISTANT:", LLaVA-1.5's conversation format, with any number of turns.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}"
    "{%- if message.role == 'user' -%}{{- 'USER: ' -}}{%- elif message.role == 'assistant' -%}{{- 'ASSISTANT: ' -}}{%- endif -%}"
    "{%- for part in parts if part.type == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}"
    "{%- for part in parts if part.type == 'text' -%}"
    "{%- if message.role == 'assistant' -%}{%- generation -%}{{- part.text + ' ' -}}{%- endgeneration -%}"
    "{%- else -%}{{- part.text + ' ' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 512 entries: every UTF-8 text can be written; the scenes' words are one token each."""
    words = [*NAMES, *COLORS, *map(str, range(10)), "nothing", "yes", "no", "row", "column", "ASSISTANT", "USER"]
    questions = "what is at row column what color the how many digits shapes objects object is there a are there more than where read"
    corpus = [f"{w} {w}? {w}." for w in words] * 3 + [" " + questions, questions.replace(" ", "\n")] * 3
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(corpus, trainer)
    from tokenizers.processors import TemplateProcessing

    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"}, model_max_length=1024, padding_side="left",
    )  # fmt: skip


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """CLIP preprocessing at 112 x 112 pixels and the chat template."""
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """The untrained model in fp32."""
    torch.manual_seed(seed)
    width = 192
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=512, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=1024, rms_norm_eps=1e-5, initializer_range=0.05, tie_word_embeddings=False,
        **special,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=576, num_hidden_layers=5, num_attention_heads=6, image_size=SIZE, patch_size=PATCH,
        projection_dim=width,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-2,
        vision_feature_select_strategy="default", projector_hidden_act="gelu", image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=False, **special,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)
