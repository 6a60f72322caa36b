"""Text from tokens as they come: pieces that never split a character, and stop strings across pieces.

Knows nothing about models; of the tokenizer it needs `decode` and `token` only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from runtime.errors import UsageError

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Decoder(Protocol):
    """What detokenisation asks of a tokenizer; `runtime.chat.Tokenizer` has it."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def token(self, token_id: int) -> str | None: ...

    def is_special(self, token_id: int) -> bool: ...


class IncrementalDetokenizer:
    """Decodes a growing token sequence piece by piece; the pieces and `flush()` join to the text of all tokens decoded at once.

    Each push decodes a window of a few tokens: the pending ones, and one earlier token of context, since what a token looks like can
    depend on the token before it (a leading space is dropped at the start of a text). Two things wait for more tokens: text that ends
    in U+FFFD, which may be the beginning of a multi-byte character, and byte-fallback tokens (`<0x0A>`), as decoders judge a run of
    them as one: a single bad byte turns the whole run into U+FFFD.
    """

    def __init__(self, tokenizer: Decoder, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []
        self._pending_text: str | None = ""  # of the pending tokens; None: not decoded yet

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that is certain now, often one token's, sometimes none."""
        token = self._tokenizer.token(token_id)
        if token is None or (self._skip_special_tokens and self._tokenizer.is_special(token_id)):
            return ""  # decoding skips it as well
        self._pending.append(token_id)
        if _BYTE_TOKEN.fullmatch(token):
            self._pending_text = None
            return ""
        before, text = self._pending_text, self._decode(self._pending)
        if text and not text.endswith(_REPLACEMENT):
            self._move_on(token_id)
            return text
        self._pending_text = text
        if before and len(text) == len(before) + len(self._decode([token_id])):
            # The new token's bytes did not join those before it (joining makes the text shorter), so those are final.
            self._pending, self._pending_text = [token_id], text[len(before) :]
            return before
        return ""

    def flush(self) -> str:
        """Ends the text: returns what was waiting, and makes ready for another sequence."""
        text = self._decode(self._pending)
        self._context, self._context_text, self._pending, self._pending_text = [], "", [], ""
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode([*self._context, *ids], self._skip_special_tokens)[len(self._context_text) :]

    def _move_on(self, token_id: int) -> None:
        """The pending text was given out; its last token becomes the context if it shows anything by itself.

        The context must show something, or the tokenizer would take what follows for the start of the text.
        """
        shown = [token_id]
        text = self._tokenizer.decode(shown, self._skip_special_tokens)
        if not text and not self._context:
            shown = self._pending
            text = self._tokenizer.decode(shown, self._skip_special_tokens)
        if text:
            self._context, self._context_text = shown, text
        self._pending, self._pending_text = [], ""


class StopStrings:
    """Ends a text before the first stop string, wherever pieces are cut.

    What could still become a stop string is held back. The stop string that is complete first counts; of several that end at the same
    character, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(stops):
            raise UsageError(f"stop strings must be a list of texts that are not empty, got {stops!r}")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """Takes the next piece of text.

        Returns:
            The text that may be shown now, and whether a stop string was met; once it was, nothing more is shown.
        """
        if self._stopped:
            return "", True
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._stopped, self._held = True, ""
            return text[: min(found)[1]], True
        keep = self._partial(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Ends the text: returns what was held back, as no stop string can follow any more."""
        held, self._held = self._held, ""
        return held

    def _partial(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
