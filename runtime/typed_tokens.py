"""Special tokens that somebody typed: tokenised as plain characters, never obeyed.

What a chat template writes (`<image>`, `<|im_end|>`) and the same characters in a message look alike once they are rendered. So the
messages are rendered a second time with a mask in place of every character that may begin a special token: what still is a special
token there, the template wrote. Masks and the names that stand for the template's tokens hold a random number, so nobody can type them.
A tokenizer may look for special tokens in normalised text: characters that become the beginning of one ("＜" by NFKC) are masked too.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

# Private-use characters around digits alone: a template may strip, change the case or write JSON, and they stay as they are.
_OPEN, _CLOSE = "\U000f4e50", "\U000f4e51"


class TypedTokens:
    """Masks messages, and encodes a prompt that was rendered from masked ones.

    Args:
        core: the tokenizer; it is copied when the first prompt needs it (a few of them do), and left as it is.
    """

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        self._core = core
        self._tokens = {number: token for number, token in core.get_added_tokens_decoder().items() if token.special and token.content}
        self._nonce = str(secrets.randbits(64))
        self._names = {token.content: f"{_OPEN}{self._nonce}2{number}{_CLOSE}" for number, token in self._tokens.items()}
        self._first = {token.content[0] for token in self._tokens.values()}
        self._added = set(self._normal("0")) - {"0"}  # what the normaliser puts before any text
        self._first_normal = {n for token in self._tokens.values() if token.normalized for n in self._normal_parts(token.content)[:1]}
        self._copy: tuple[tokenizers.Tokenizer, dict[int, int]] | None = None

    def mask(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """Messages (from `normalize_messages`) with masks in their texts; None where there is nothing to mask."""
        masked = [{**message, "content": [self._masked(part) for part in message["content"]]} for message in messages]
        return masked if masked != list(messages) else None

    def differ(self, text: str, masked: str) -> bool:
        """Whether a rendered prompt holds other special tokens than what the template wrote, by the prompt from masked messages."""
        return self._special(text) != self._special(masked)

    def encode(self, masked: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a prompt from masked messages: the template's special tokens as such, all else as plain characters."""
        copy, ids = self._copy = self._copy or self._make_copy()
        contents = sorted(self._names, key=len, reverse=True)
        text = re.sub("|".join(map(re.escape, contents)), lambda found: self._names[found[0]], masked)
        text = re.sub(f"{_OPEN}{self._nonce}1(\\d+){_CLOSE}", lambda found: chr(int(found[1])), text)
        return [ids.get(i, i) for i in copy.encode(text, add_special_tokens=add_special_tokens).ids]

    def _masked(self, part: Mapping[str, str]) -> dict[str, str]:
        if part["type"] != "text":
            return dict(part)
        masks = {c: f"{_OPEN}{self._nonce}1{ord(c)}{_CLOSE}" for c in set(part["text"]) if self._may_begin(c)}
        return {**part, "text": "".join(masks.get(character, character) for character in part["text"])}

    def _may_begin(self, character: str) -> bool:
        """Whether a special token may begin with a character, as it is or normalised."""
        if character in self._first or not self._first_normal:
            return character in self._first
        return not self._first_normal.isdisjoint(self._normal_parts(character))

    def _normal(self, text: str) -> str:
        normalizer = self._core.normalizer
        return str(normalizer.normalize_str(text)) if normalizer else text

    def _normal_parts(self, text: str) -> list[str]:
        return [character for character in self._normal(text) if character not in self._added]

    def _special(self, text: str) -> list[int]:
        return [i for i in self._core.encode(text, add_special_tokens=False).ids if i in self._tokens]

    def _make_copy(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A tokenizer to which special tokens are text, and their names are tokens; and what the names' ids stand for."""
        copy = tokenizers.Tokenizer.from_str(self._core.to_str())
        copy.encode_special_tokens = True
        stands_for = {}
        for number, token in self._tokens.items():
            settings = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": token.normalized}
            copy.add_tokens([tokenizers.AddedToken(self._names[token.content], **settings)])
            named = copy.token_to_id(self._names[token.content])
            if named is not None:
                stands_for[named] = number
        return copy, stands_for
