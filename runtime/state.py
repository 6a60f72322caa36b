"""Kept image state: a prompt's beginning, run once and asked about many times; and a cache of such beginnings.

A state owns its caches. Asking truncates two lengths; nothing is copied. One answer at a time uses a state: `clone` it for more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.budgets import Keep
from runtime.conversation import Conversation
from runtime.errors import UsageError
from runtime.manifest import Manifest
from runtime.prompt import Message, Prompt


class PromptState:
    """What `VisionLanguageModel.prefill` gives back: messages and images that are already in the caches.

    Attributes:
        messages: what was prefilled; a question is added to its last user message, or as a new one.
        images: its images, prepared; not to be passed again.
        keep: visual tokens kept, "auto", or None for all; every question about the state uses it.
        manifest: the bundle that the caches belong to.
    """

    def __init__(self, prompt: Prompt, keep: Keep, conversation: Conversation, manifest: Manifest) -> None:
        self.messages, self.images, self.keep = prompt.messages, prompt.images, keep
        self.conversation, self.manifest = conversation, manifest

    @property
    def nbytes(self) -> int:
        """Bytes of both cache groups."""
        return self.conversation.nbytes

    @property
    def kept_indices(self) -> np.ndarray:
        """int64 [R]: the visual tokens kept, ascending."""
        return self.conversation.kept_indices

    def clone(self) -> PromptState:
        """An independent copy, for asking in parallel."""
        other = PromptState.__new__(PromptState)
        other.messages, other.images, other.keep = self.messages, self.images, self.keep
        other.conversation, other.manifest = self.conversation.clone(), self.manifest
        return other

    def with_question(self, messages: str | Sequence[Message]) -> Sequence[Message]:
        """The whole conversation's messages: a question is appended, a list of messages replaces what was prefilled."""
        if not isinstance(messages, str):
            return messages
        text = {"type": "text", "text": messages}
        if self.messages and self.messages[-1]["role"] == "user":
            last = {**self.messages[-1], "content": [*self.messages[-1]["content"], text]}
            return [*self.messages[:-1], last]
        return [*self.messages, {"role": "user", "content": [text]}]


def check_state(state: Any, manifest: Manifest) -> None:
    """Raises UsageError unless `state` is None or a state of this bundle."""
    if state is not None and not (isinstance(state, PromptState) and state.manifest == manifest):
        got = "one of another bundle" if isinstance(state, PromptState) else type(state).__name__
        raise UsageError(f"state must be what this model's prefill gave, not {got}: prefill the messages with this model")


class PrefixCache:
    """Conversations kept for prompts that begin alike, least recently used out first.

    Args:
        limit_bytes: bytes of caches kept at most; 0 keeps none.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise UsageError(f"cache_bytes is {limit_bytes}; give the bytes of caches to keep, 0 for none")
        self.limit_bytes = limit_bytes
        self._kept: OrderedDict[int, Conversation] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the conversations that are not in use."""
        return sum(c.nbytes for c in self._kept.values())

    def clear(self) -> None:
        """Forgets all conversations."""
        self._kept.clear()

    def take(self, prompt: Prompt, keep: Keep) -> Conversation | None:
        """Removes and returns the conversation that shares most with a prompt, its first images at least; None where none does."""
        least = prompt.groups[0].stop if prompt.groups else 1
        shared = {key: c.shared_with(prompt.ids.input_ids, prompt.groups, keep) for key, c in self._kept.items()}
        best = max(shared, key=lambda key: shared[key], default=None)
        return self._kept.pop(best) if best is not None and shared[best] >= least else None

    def put(self, conversation: Conversation) -> None:
        """Keeps a conversation as the most recently used one, and drops the oldest ones beyond the limit."""
        if conversation.nbytes > self.limit_bytes:
            return
        self._kept[id(conversation)] = conversation
        while self.nbytes > self.limit_bytes:
            self._kept.popitem(last=False)
