"""What pruning changes in a model's answers: teacher-forced logits, unpruned and with any selection at any layer, from one unpruned pass.

    PackedPrompt     one image's prefix (everything up to its last visual token), then the rest of several questions with their answers;
                     each question sees the prefix and itself, so the prefix runs once
    dense()          all layers, all rows; keeps what enters every layer, and the visual tokens' queries, keys and values
    pruned()         layers K..L-1 again, over text and kept rows only, for several selections of the same size at once

Layers, rotary embedding, norm and head are transformers' own; positions are those of the unpruned prompt. A question that is answered
greedily with its label is one whose every label token is the most likely one after those before it, so no decoding is needed. Knows
nothing about scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibration.questions import EncodedQuestion
from runtime.errors import InputError, UsageError

STATES = ("query", "key", "value")


@dataclass(frozen=True, slots=True, eq=False)
class PackedPrompt:
    """One image and the questions that share everything up to its last visual token.

    Attributes:
        input_ids: int64 [S], the shared prefix, then each question's own rows, the answer's last token left out.
        position_ids: int64 [S], as in a prompt that held the one question alone.
        segments: int64 [S], 0 in the prefix, q + 1 in question q's rows.
        visual_rows: int64 [N].
        answer_rows: int64 [A], the rows whose logits predict answer tokens, questions one after the other.
        targets: int64 [A], the answer tokens.
        owners: int64 [A], the question that each answer token belongs to.
        questions: how many.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    visual_rows: Tensor
    answer_rows: Tensor
    targets: Tensor
    owners: Tensor
    questions: int

    @property
    def text_rows(self) -> Tensor:
        """int64 [S - N], the rows that are not visual tokens, ascending."""
        stays = torch.ones(len(self.input_ids), dtype=torch.bool)
        stays[self.visual_rows] = False
        return stays.nonzero()[:, 0]

    def allowed(self) -> Tensor:
        """bool [S, S]: whether a row (first axis) may look at another."""
        earlier = self.position_ids[None, :] <= self.position_ids[:, None]
        return earlier & ((self.segments[None, :] == 0) | (self.segments[None, :] == self.segments[:, None]))


def pack(questions: Sequence[EncodedQuestion], image_token_id: int) -> PackedPrompt:
    """Packs questions about one image; each must have `answer_ids`.

    Raises:
        InputError: they do not share their prompt up to the last visual token, or hold none.
    """
    first = np.array(questions[0].prompt_ids)
    visual = np.flatnonzero(first == image_token_id)
    if len(visual) == 0:
        raise InputError("the prompt holds no visual tokens: the checkpoint's processor must expand images into placeholder tokens")
    prefix = int(visual[-1]) + 1
    ids, positions, segments = [first[:prefix]], [np.arange(prefix)], [np.zeros(prefix, np.int64)]
    rows, targets, owners = [], [], []
    at = prefix
    for number, question in enumerate(questions):
        if question.answer_ids is None:
            raise UsageError(f"the question {question.question.text!r} has no answer to follow: give answer_ids")
        prompt, answer = np.array(question.prompt_ids), np.array(question.answer_ids)
        if len(prompt) <= prefix or not np.array_equal(prompt[:prefix], first[:prefix]):
            raise InputError("questions packed together must be about one image that comes before their text: pack them one by one")
        own = np.concatenate([prompt[prefix:], answer[:-1]])
        ids.append(own)
        positions.append(prefix + np.arange(len(own)))
        segments.append(np.full(len(own), number + 1))
        rows.append(at + len(prompt) - prefix - 1 + np.arange(len(answer)))
        targets.append(answer)
        owners.append(np.full(len(answer), number))
        at += len(own)
    joined = [torch.from_numpy(np.concatenate(parts).astype(np.int64)) for parts in (ids, positions, segments, rows, targets, owners)]
    return PackedPrompt(joined[0], joined[1], joined[2], torch.from_numpy(visual), joined[3], joined[4], joined[5], len(questions))


@dataclass(frozen=True, slots=True, eq=False)
class DensePass:
    """The unpruned pass over a packed prompt.

    Attributes:
        entering: per layer l, float [S, d], what enters layer l; what leaves the last layer is not kept.
        states: "query", "key", "value" -> per layer, float [N, heads * d_h], as projected (bias included, before rotary embedding).
        logits: float32 [A, vocab].
    """

    prompt: PackedPrompt
    entering: list[Tensor]
    states: dict[str, list[Tensor]]
    logits: Tensor


class PrunedForward:
    """Runs packed prompts through a Hugging Face model, unpruned and pruned.

    Args:
        model: as `LlavaForConditionalGeneration`: `model.language_model` with `layers`, `rotary_emb`, `norm`, and `lm_head`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._decoder = model.model.language_model
        self.layers = len(self._decoder.layers)
        self.heads = int(self._decoder.config.num_attention_heads)
        self.kv_heads = int(self._decoder.config.num_key_value_heads)
        model.train(False)
        model.set_attn_implementation("sdpa")

    @torch.no_grad()
    def image_embeds(self, pixel_values: Tensor) -> Tensor:
        """[1, 3, h, w] -> float [N, d]."""
        return torch.cat(list(self.model.get_image_features(pixel_values.to(self._device), return_dict=True).pooler_output))

    @torch.no_grad()
    def dense(self, prompt: PackedPrompt, image_embeds: Tensor) -> DensePass:
        """Everything unpruned."""
        hidden: Tensor = self._decoder.embed_tokens(prompt.input_ids.to(self._device))
        if len(prompt.visual_rows) != len(image_embeds):
            raise InputError(f"the prompt has {len(prompt.visual_rows)} visual tokens, the image gives {len(image_embeds)}")
        hidden[prompt.visual_rows] = image_embeds.to(hidden)
        with self._projections(prompt.visual_rows) as states:
            entering, last = self._run(hidden[None], prompt.position_ids[None], prompt.allowed()[None], 0)
        return DensePass(prompt, [e[0] for e in entering], states, self._logits(last, prompt.answer_rows)[0])

    @torch.no_grad()
    def pruned(self, dense: DensePass, split_layer: int, kept: np.ndarray) -> Tensor:
        """Layers K..L-1 with only some visual tokens, for several selections at once.

        Args:
            split_layer: K in 0..L-1; 0 prunes what enters the decoder.
            kept: int [B, R], each row ascending within the visual tokens.

        Returns:
            Logits float32 [B, A, vocab].
        """
        prompt = dense.prompt
        text = prompt.text_rows.expand(len(kept), -1)
        rows, _ = torch.cat([prompt.visual_rows[torch.from_numpy(kept)], text], 1).sort(1)
        allowed = prompt.allowed()[rows[:, :, None], rows[:, None, :]]
        _, last = self._run(dense.entering[split_layer][rows], prompt.position_ids[rows], allowed, split_layer)
        places = (rows[0][None, :] == prompt.answer_rows[:, None]).nonzero()[:, 1]  # the same in each: answers follow all visual tokens
        return self._logits(last, places)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def _run(self, hidden: Tensor, positions: Tensor, allowed: Tensor, first: int) -> tuple[list[Tensor], Tensor]:
        """Layers first..L-1 over [B, S, d]; what enters each of them, and what leaves the last."""
        rotary = self._decoder.rotary_emb(hidden, position_ids=positions.to(self._device))
        mask = allowed[:, None].to(self._device)
        entering = []
        for layer in self._decoder.layers[first:]:
            entering.append(hidden)
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        return entering, hidden

    def _logits(self, last: Tensor, rows: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(self._decoder.norm(last[:, rows])).float()
        return logits

    @contextmanager
    def _projections(self, rows: Tensor) -> Iterator[dict[str, list[Tensor]]]:
        """Collects the visual rows of every layer's q, k and v projections."""
        seen: dict[str, list[Tensor]] = {name: [] for name in STATES}
        hooks = [
            getattr(layer.self_attn, f"{name[0]}_proj").register_forward_hook(
                lambda _m, _i, out, name=name: seen[name].append(out[0, rows])
            )
            for layer in self._decoder.layers
            for name in STATES
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


def exact(logits: Tensor, prompt: PackedPrompt) -> Tensor:
    """Whether greedy decoding gives each question's answer: bool [..., questions] from logits [..., A, vocab]."""
    wrong = (logits.argmax(-1).cpu() != prompt.targets).to(torch.int64)
    errors = torch.zeros((*wrong.shape[:-1], prompt.questions), dtype=torch.int64)
    return errors.index_add_(-1, prompt.owners, wrong) == 0
