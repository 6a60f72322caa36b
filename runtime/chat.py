"""From a prompt to token ids: messages, the checkpoint's chat template, the tokenizer, and room for the visual tokens.

Knows nothing about engines or pixels.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import numpy as np
import numpy.typing as npt
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.errors import BundleError, InputError, shown
from runtime.typed_tokens import TypedTokens

ROLES = ("system", "user", "assistant")


def normalize_messages(
    prompt_or_messages: str | Sequence[Mapping[str, Any]], image_count: int, *, text_needed: bool = True
) -> list[dict[str, Any]]:
    """Messages in the one form that every chat template understands: each content a list of text and image parts.

    Args:
        prompt_or_messages: one user's text, which gets all images in front; or messages `{"role": ..., "content": ...}` whose content
            is a text or a list of `{"type": "text", "text": ...}` and `{"type": "image"}`.
        image_count: how many images are given, in the order of the image parts.
        text_needed: whether messages without any text are an error.

    Raises:
        InputError: something is empty, malformed, or the image parts are not as many as the images.
    """
    if isinstance(prompt_or_messages, str):
        images = [{"type": "image"} for _ in range(image_count)]
        prompt_or_messages = [{"role": "user", "content": [*images, {"type": "text", "text": prompt_or_messages}]}]
    if not isinstance(prompt_or_messages, Sequence):
        raise InputError(f"a prompt must be a text or a list of messages, not {type(prompt_or_messages).__name__}")
    messages = [_message(message, f"message {number}") for number, message in enumerate(prompt_or_messages, 1)]
    parts = [part for message in messages for part in message["content"]]
    if not parts or (text_needed and not any(part["type"] == "text" and part["text"].strip() for part in parts)):
        raise InputError("the prompt is empty: write a question or an instruction")
    placed = sum(part["type"] == "image" for part in parts)
    if placed != image_count:
        raise InputError(
            f'the messages hold {placed} image part(s) for {image_count} image(s): give one {{"type": "image"}} for each image'
        )
    return messages


class ChatTemplate:
    """A Hugging Face chat template, rendered in a sandbox as transformers renders it.

    Args:
        text: the Jinja template.

    Raises:
        BundleError: it is not a valid template.
    """

    def __init__(self, text: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise BundleError(f"the chat template is not valid (line {error.lineno}: {error.message}): export the bundle again") from error
        except MemoryError as error:  # constants are computed here
            raise BundleError("the chat template was stopped (it asks for too much memory): use one from a source you trust") from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **special_tokens: Any) -> str:
        """The prompt's text.

        Args:
            messages: from `normalize_messages`.
            add_generation_prompt: end with the beginning of an assistant's turn.
            special_tokens: what templates may use by name, such as bos_token (see `special_tokens`).

        Raises:
            InputError: the template refuses these messages.
            BundleError: the template does what no chat template may.
        """
        values = {"tools": None, "documents": None, **special_tokens}
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **values)
        except (jinja2.exceptions.SecurityError, MemoryError) as error:
            why = _one_line(error) or "it asks for too much memory"
            raise BundleError(f"the chat template was stopped ({why}): use one from a source you trust") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InputError(f"the chat template cannot render these messages: {_one_line(error)}") from error


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens (bos_token, eos_token, ...) of a parsed tokenizer_config.json, for `ChatTemplate.render`."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


@dataclass(frozen=True, slots=True, eq=False)
class PromptIds:
    """A prompt as the decoder sees it.

    `input_ids` is int64 [S], each image's placeholder repeated once per visual token; `visual_mask` is bool [S], true there.
    """

    input_ids: npt.NDArray[np.int64]
    visual_mask: npt.NDArray[np.bool_]


class Tokenizer:
    """The checkpoint's tokenizer, from `tokenizer.json` alone.

    Args:
        core: a tokenizer; truncation and padding are switched off in it.
    """

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        core.no_truncation()
        core.no_padding()
        self._core = core
        self._typed = TypedTokens(core)
        self._special_ids = frozenset(number for number, token in core.get_added_tokens_decoder().items() if token.special)
        plain, marked = core.encode("a", add_special_tokens=False).ids, core.encode("a").ids
        begins = [i for i in range(len(marked)) if marked[i : i + len(plain)] == plain]
        self._prefix = marked[: begins[0]] if begins else []

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads a `tokenizer.json`.

        Raises:
            BundleError: it is missing or not a tokenizer.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"cannot read the tokenizer {path} ({_one_line(error)}): export the bundle again") from error
        try:
            core = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(f"{path} is not a tokenizer this version reads ({_one_line(error)}): export the bundle again") from error
        return cls(core)

    def mask(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """Messages to render a second time, for `encode`; None where no text can hold a special token."""
        return self._typed.mask(messages)

    def encode(self, text: str, image_token_id: int, visual_tokens_per_image: Sequence[int], *, masked: str | None = None) -> PromptIds:
        """Token ids of a rendered prompt, each image placeholder expanded.

        What the tokenizer puts at the beginning (`<s>`) is added unless the text already begins with it.

        Args:
            text: from `ChatTemplate.render`.
            image_token_id: the placeholder's id.
            visual_tokens_per_image: for each image, how many visual tokens it gives.
            masked: the same prompt rendered from what `mask` gave. Special tokens that stand in the messages themselves are then plain
                characters; without it, they are obeyed.

        Raises:
            InputError: the placeholders are not as many as the images, or the text is not Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError("the prompt holds half a surrogate pair, which is not a character: pass valid Unicode text") from error
        ids = np.array(self._encode(text, masked), np.int64)
        placeholders = ids == image_token_id
        found, images = int(placeholders.sum()), len(visual_tokens_per_image)
        if found != images:
            name = self.token(image_token_id)
            raise InputError(
                f"the rendered prompt holds {found} placeholder(s) {name!r} for {images} image(s): "
                "leave the placeholder out of the text, the chat template adds one for each image"
            )
        if any(count < 1 for count in visual_tokens_per_image):
            raise InputError(f"each image needs at least one visual token, got {list(visual_tokens_per_image)}")
        repeats = np.ones(len(ids), np.int64)
        repeats[placeholders] = visual_tokens_per_image
        return PromptIds(ids.repeat(repeats), placeholders.repeat(repeats))

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids beyond the vocabulary are skipped."""
        return self._core.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """A token as the vocabulary writes it; None for an id beyond it."""
        return self._core.id_to_token(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether it is a control token (end of text, image placeholder), which `decode` leaves out."""
        return token_id in self._special_ids

    def _encode(self, text: str, masked: str | None) -> list[int]:
        def encode(add_special_tokens: bool) -> list[int]:
            if typed:
                return self._typed.encode(masked or "", add_special_tokens)
            ids: list[int] = self._core.encode(text, add_special_tokens=add_special_tokens).ids
            return ids

        typed = masked is not None and self._typed.differ(text, masked)
        plain = encode(False)
        begun = bool(self._prefix) and plain[: len(self._prefix)] == self._prefix
        return plain if begun else encode(True)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what an assistant wrote; rendering, it is its body in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        got = shown(sorted(map(str, message))) if isinstance(message, Mapping) else type(message).__name__
        raise InputError(f"{where} must be an object with role and content and nothing else, got {got}")
    if not isinstance(message["role"], str) or message["role"] not in ROLES:
        raise InputError(f"{where}: the role is {shown(message['role'])}, expected one of {', '.join(ROLES)}")
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or not content:
        raise InputError(f"{where}: the content must be a text or a list of parts that is not empty, got {shown(content)}")
    return {"role": message["role"], "content": [_part(part, where) for part in content]}


def _part(part: Any, where: str) -> dict[str, str]:
    if isinstance(part, Mapping) and part.get("type") == "image" and set(part) == {"type"}:
        return {"type": "image"}
    if isinstance(part, Mapping) and part.get("type") == "text" and set(part) == {"type", "text"} and isinstance(part["text"], str):
        return {"type": "text", "text": part["text"]}
    raise InputError(
        f'{where}: a part must be {{"type": "text", "text": "..."}} or {{"type": "image"}} (images are passed beside the messages), '
        f"got {shown(part)}"
    )


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:200]
