"""A bundle's tokenizer, chat template, image processor and generation defaults, in one form whatever the checkpoint's age.

Everything is tried with the runtime's own readers while building, so that a bundle which is written can be used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Core

from export.plan import BuildPlan
from runtime.chat import ChatTemplate, Tokenizer, normalize_messages, special_tokens
from runtime.errors import BundleError, CheckpointError, InputError
from runtime.images import ImageProcessor
from runtime.prompt import GENERATION_FILE, PREPROCESSOR_FILE, SPECIAL_TOKENS_FILE, TEMPLATE_FILE, TOKENIZER_FILE
from runtime.sampling import GenerationConfig


def bundle_text_files(plan: BuildPlan) -> dict[str, str]:
    """Names and texts of the bundle's files that are not graphs or weights.

    Raises:
        CheckpointError: a file is missing or asks for something that the runtime does not do.
    """
    texts = plan.checkpoint.text_files()
    tokens = special_tokens(_object(texts.get("tokenizer_config.json", "{}"), "tokenizer_config.json"))
    files = {
        TOKENIZER_FILE: texts[TOKENIZER_FILE],
        TEMPLATE_FILE: _chat_template(texts),
        PREPROCESSOR_FILE: json.dumps(_image_processor(texts), indent=2) + "\n",
        SPECIAL_TOKENS_FILE: json.dumps(tokens, indent=2) + "\n",
        GENERATION_FILE: texts.get(GENERATION_FILE, "{}\n"),
    }
    try:
        _try_out(files, tokens, plan)
    except (BundleError, InputError) as error:
        raise CheckpointError(f"{plan.checkpoint.directory}: {error}") from error
    return files


def _try_out(files: Mapping[str, str], tokens: Mapping[str, Any], plan: BuildPlan) -> None:
    plan.checkpoint.image_token(plan.spec.image_token_id)
    tokenizer = _tokenizer(files[TOKENIZER_FILE], plan)
    text = ChatTemplate(files[TEMPLATE_FILE]).render(normalize_messages("What is this?", 1), **tokens)
    tokenizer.encode(text, plan.spec.image_token_id, [plan.visual_tokens])
    GenerationConfig.from_json(_object(files[GENERATION_FILE], GENERATION_FILE))
    processor = ImageProcessor.from_json(_object(files[PREPROCESSOR_FILE], PREPROCESSOR_FILE))
    side, expected = processor.crop_size or processor.resize_size, plan.spec.vision.image_size
    if side != (expected, expected):
        given = f"{side[0]} x {side[1]} pixels" if side else "images of any shape"
        raise CheckpointError(
            f"the image processor gives {given}, the vision tower takes {expected} x {expected}: "
            "use the processor that belongs to the checkpoint"
        )


def _tokenizer(text: str, plan: BuildPlan) -> Tokenizer:
    try:
        core = Core.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{TOKENIZER_FILE} is not a tokenizer this version reads ({error}): fetch the file again") from error
    rows, image_token = plan.spec.decoder.vocab_size, plan.spec.image_token_id
    beyond = [token for token, number in core.get_vocab().items() if number >= rows and number != image_token]
    if beyond:
        raise CheckpointError(
            f"{TOKENIZER_FILE} has {len(beyond)} token(s) beyond the model's vocabulary of {rows}, such as {beyond[0]!r}: "
            "use the tokenizer that belongs to the checkpoint"
        )
    return Tokenizer(core)


def _chat_template(texts: Mapping[str, str]) -> str:
    if TEMPLATE_FILE in texts:
        return texts[TEMPLATE_FILE]
    for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
        template = _object(texts.get(name, "{}"), name).get("chat_template")
        if isinstance(template, str):
            return template
    raise CheckpointError("the checkpoint has no chat template: put a chat_template.jinja beside its config.json")


def _image_processor(texts: Mapping[str, str]) -> dict[str, Any]:
    if PREPROCESSOR_FILE in texts:
        return _object(texts[PREPROCESSOR_FILE], PREPROCESSOR_FILE)
    inner = _object(texts["processor_config.json"], "processor_config.json").get("image_processor")
    if not isinstance(inner, dict):
        raise CheckpointError("processor_config.json has no image_processor: put a preprocessor_config.json beside config.json")
    return inner


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{name} is not valid JSON ({error}): fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} must hold a JSON object, not {type(value).__name__}: fetch the file again")
    return value
