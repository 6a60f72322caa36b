"""The reference that every graph and chain is measured against: transformers' own LLaVA, pruned between its layers.

    input_ids [1, S], pixel_values [n, 3, h, w]
      -> vision tower, projector, merge              inputs_embeds [S, d]
      -> decoder layers 0..K-1, every row            hidden_states [S, d], score_states [S, H * d_h]
      -> score of the N visual rows, R of them kept  kept_indices [R]
      -> decoder layers K..L-1, S' = S - N + R rows  post_hidden_states [S', d]
      -> norm, head                                  logits [S', vocab]

The layers, the rotary embedding and the cache are the model's own; the score is float64 with an eigensolver. Knows nothing about
graphs or bundles, and shares no code with the exporter, so that a mistake in either shows as a difference.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, LlamaModel, LlavaForConditionalGeneration

from export.exact_dpp import dpp_order
from export.exact_score import HIDDEN_MODES, SCORELESS_MODES, check_score_mode, checked_indices, select_tokens, token_scores
from runtime.errors import CheckpointError, InputError, UsageError

__all__ = ["EagerPrunedLlava", "Prefill", "Selection", "encode_question", "load_llava"]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which visual tokens stay.

    Attributes:
        kept_indices: int64 [R], ascending, counted within the prompt's visual tokens (0..N-1).
        scores: float64 [N]; the largest are kept. NaN where the mode defines no score (`random`, `uniform`). `dpp`: a variance, see
            `export.exact_dpp`.
    """

    kept_indices: np.ndarray
    scores: np.ndarray

    @property
    def nonfinite_scores(self) -> int:
        """How many visual tokens have no finite score; they are kept last."""
        return int((~np.isfinite(self.scores)).sum())


@dataclass(frozen=True, slots=True)
class Prefill:
    """What one prompt leaves behind; every tensor is float32 on the CPU, without a batch dimension.

    Attributes:
        logits: [S', vocab], all rows of the second half.
        inputs_embeds: [S, d], what enters layer 0.
        layer_states: per layer, what leaves it: [S, d] below the split, [S', d] above.
        score_states: [S, H * d_h], queries of layer K-1 before rotary embedding, bias included, unscaled.
        keys, values: per layer, [kv_heads, S or S', d_h]; keys after rotary embedding.
        selection: None where nothing was selected (text only, or every visual token kept).
        position_ids: int64 [S'], the positions of the rows that stay, as numbered in the unpruned prompt.
        split_layer: K.
    """

    logits: Tensor
    inputs_embeds: Tensor
    layer_states: list[Tensor]
    score_states: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    selection: Selection | None
    position_ids: Tensor
    split_layer: int

    @property
    def hidden_states(self) -> Tensor:
        """[S, d]: what leaves layer K-1, before the selection."""
        return self.layer_states[self.split_layer - 1]

    @property
    def post_hidden_states(self) -> Tensor:
        """[S', d]: what leaves the last layer, before the final norm."""
        return self.layer_states[-1]


def load_llava(checkpoint: Path, attention: str = "eager", dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """Loads a checkpoint in float32 or another type, whatever it is stored in; nothing is fetched from a network.

    Raises:
        CheckpointError: not a directory, unreadable, of another architecture, or with weights missing (named).
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a directory: name a folder that holds a Hugging Face LLaVA checkpoint")
    try:
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation=attention, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint} cannot be loaded as a LLaVA checkpoint: {error}") from error
    model: LlavaForConditionalGeneration
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{checkpoint} lacks {len(missing)} weights, {missing[0]} among them: copy the checkpoint again")
    return model


def encode_question(processor: Any, question: str, image: Image.Image | None) -> tuple[Tensor, Tensor | None]:
    """A question as the model's input, in the processor's own conversation format.

    Returns:
        input_ids int64 [1, S] with one entry per visual token, and pixel_values float32 [1, 3, h, w] (None without an image).
    """
    parts = [*([] if image is None else [{"type": "image"}]), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    encoded = processor(text=text, images=image, return_tensors="pt") if image is not None else processor(text=text, return_tensors="pt")
    return encoded["input_ids"], encoded.get("pixel_values")


class EagerPrunedLlava:
    """A LLaVA that drops visual tokens before layer K, in float32. Holds one conversation: `prefill` starts a new one.

    Args:
        checkpoint: a checkpoint's folder, or a model that is already loaded in float32 (its attention implementation is set, and it
            is put into evaluation mode).
        split_layer: K in 1..L-1; layers K..L-1 see the kept tokens only.
        keep: R >= 1, how many of the prompt's visual tokens stay. None, or no fewer than there are, keeps all.
        score_mode: one of `runtime.names.SCORE_MODES`; with `random` and `uniform` the kept indices have to be given.
        attention: transformers' implementation.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        UsageError: an option is out of range, or the mode needs more heads than there are.
    """

    def __init__(
        self,
        checkpoint: Path | LlavaForConditionalGeneration,
        split_layer: int,
        keep: int | None,
        score_mode: str = "trace",
        *,
        attention: Literal["eager", "sdpa"] = "eager",
    ) -> None:
        self.model = load_llava(checkpoint, attention) if isinstance(checkpoint, Path) else checkpoint
        decoder = self.model.model.language_model
        if not isinstance(decoder, LlamaModel):
            raise CheckpointError(f"the decoder is {type(decoder).__name__}, the reference runs LlamaModel: use a LLaVA-1.5 checkpoint")
        if self.model.dtype != torch.float32:
            raise UsageError(f"the model holds {self.model.dtype}, the reference runs in torch.float32: load it with dtype=torch.float32")
        if not torch.equal(decoder.rotary_emb.inv_freq, type(decoder.rotary_emb)(config=decoder.config).inv_freq):
            raise UsageError(
                "the model's rotary frequencies were once cast to a smaller dtype and are rounded: load it with dtype=torch.float32"
            )
        self._decoder: Any = decoder
        self.heads = int(decoder.config.num_attention_heads)
        vision = self.model.config.vision_config
        self.grid_width = int(vision.image_size) // int(vision.patch_size)
        if not 1 <= split_layer < len(decoder.layers):
            raise UsageError(f"split_layer is {split_layer}, expected 1..{len(decoder.layers) - 1} for {len(decoder.layers)} layers")
        if keep is not None and keep < 1:
            raise UsageError(f"keep is {keep}, expected at least 1 visual token, or None to keep all")
        check_score_mode(score_mode, self.heads if keep is not None else None)
        self.split_layer, self.keep, self.score_mode = split_layer, keep, score_mode
        self.model.train(False)
        self.model.set_attn_implementation(attention)
        self._cache = DynamicCache()
        self._next_position = 0

    @torch.no_grad()
    def image_embeds(self, pixel_values: Tensor) -> Tensor:
        """pixel_values float32 [n, 3, h, w] -> [N, d], the visual tokens of all images in order."""
        return torch.cat(list(self.model.get_image_features(pixel_values, return_dict=True).pooler_output))

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, pixel_values: Tensor | None = None, *, kept_indices: np.ndarray | None = None) -> Prefill:
        """Runs a prompt and starts a conversation.

        Args:
            input_ids: int64 [1, S], each image already as many placeholder tokens as it has visual tokens.
            pixel_values: float32 [n, 3, h, w], None for a prompt without images.
            kept_indices: int [R], ascending, within the visual tokens of all images: used instead of the score's own choice.

        Raises:
            InputError: the prompt's shape is wrong, or placeholders and images do not match.
            UsageError: unusable `kept_indices`, or none with a mode that needs them.
        """
        embeds, visual_rows = self._embed(input_ids, pixel_values)
        positions = torch.arange(len(embeds))  # of the rows that are left, which in the whole prompt are also their row numbers
        self._cache, self._next_position = DynamicCache(), len(embeds)
        with self._captured_queries() as queries:
            states = self._run_layers(embeds, positions, 0, self.split_layer)
        selection = self._select(queries[0][visual_rows], states[-1][visual_rows], kept_indices)
        if selection is not None:
            stays = torch.ones(len(embeds), dtype=torch.bool)
            stays[visual_rows] = False
            stays[visual_rows[torch.from_numpy(selection.kept_indices)]] = True
            positions = positions[stays]
        states += self._run_layers(states[-1][positions], positions, self.split_layer, len(self._decoder.layers))
        keys, values = self.cached()
        return Prefill(self._head(states[-1]), embeds, states, queries[0], keys, values, selection, positions, self.split_layer)

    @torch.no_grad()
    def decode(self, token_id: int) -> Tensor:
        """Appends one token to the conversation in both groups of layers, at the next position of the unpruned prompt.

        Returns:
            Logits float32 [vocab] of what follows it.

        Raises:
            UsageError: there is no prompt yet.
        """
        if self._next_position == 0:
            raise UsageError("decode was called without a prompt: call prefill first")
        embeds = self._decoder.embed_tokens(torch.tensor([token_id]))
        position = torch.tensor([self._next_position])
        states = self._run_layers(embeds, position, 0, len(self._decoder.layers))
        self._next_position += 1
        return self._head(states[-1])[0]

    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        max_new_tokens: int = 64,
        eos_token_ids: Collection[int] = (),
        *,
        kept_indices: np.ndarray | None = None,
    ) -> list[int]:
        """Greedy decoding. Returns the new tokens, the end token included where one came (as transformers' own `generate` does)."""
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        logits = self.prefill(input_ids, pixel_values, kept_indices=kept_indices).logits[-1]
        generated = [int(logits.argmax())]
        while len(generated) < max_new_tokens and generated[-1] not in eos_token_ids:
            generated.append(int(self.decode(generated[-1]).argmax()))
        return generated

    def answer(
        self, question: str, image: Image.Image | None, processor: Any, max_new_tokens: int = 12, *, kept_indices: np.ndarray | None = None
    ) -> str:
        """Answers a question about an image in words, greedily; `processor` is the checkpoint's Hugging Face processor."""
        input_ids, pixel_values = encode_question(processor, question, image)
        end = {processor.tokenizer.eos_token_id}
        generated = self.generate(input_ids, pixel_values, max_new_tokens, end, kept_indices=kept_indices)
        return str(processor.tokenizer.decode(generated, skip_special_tokens=True)).strip()

    def cached(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of the conversation so far: per layer [kv_heads, length, d_h]; the two groups differ in length."""
        layers: list[Any] = self._cache.layers
        return [layer.keys[0] for layer in layers], [layer.values[0] for layer in layers]

    def _embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> tuple[Tensor, Tensor]:
        """inputs_embeds [S, d], and the rows int64 [N] that are visual tokens."""
        if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
            raise InputError(f"input_ids have the shape {list(input_ids.shape)}, expected [1, S] with S >= 1: give one prompt at a time")
        ids = input_ids[0]
        embeds: Tensor = self._decoder.embed_tokens(ids)
        rows = (ids == self.model.config.image_token_id).nonzero()[:, 0]
        visual = embeds[:0] if pixel_values is None else self.image_embeds(pixel_values)
        if len(rows) != len(visual):
            raise InputError(
                f"the prompt has {len(rows)} image placeholders, its images give {len(visual)} visual tokens: expand each image"
            )
        embeds[rows] = visual
        return embeds, rows

    def _run_layers(self, rows: Tensor, positions: Tensor, first: int, last: int) -> list[Tensor]:
        """Layers first..last-1 over new rows [n, d] at positions int64 [n] (several only onto an empty cache); what leaves each, [n, d]."""
        rotary = self._decoder.rotary_emb(rows[None], position_ids=positions[None])
        mask = None  # one new row sees everything before it
        if len(rows) > 1:
            mask = torch.full((1, 1, len(rows), len(rows)), torch.finfo(rows.dtype).min).triu(1)
        states = []
        hidden = rows[None]
        for layer in self._decoder.layers[first:last]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions[None],
                past_key_values=self._cache,
                use_cache=True,
                position_embeddings=rotary,
            )
            states.append(hidden[0])
        return states

    def _head(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(self._decoder.norm(rows))
        return logits

    @contextmanager
    def _captured_queries(self) -> Iterator[list[Tensor]]:
        """Collects what the query projection of layer K-1 gives, [S, H * d_h]."""
        seen: list[Tensor] = []
        projection = self._decoder.layers[self.split_layer - 1].self_attn.q_proj
        hook = projection.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
        try:
            yield seen
        finally:
            hook.remove()

    def exact_selection(self, queries: Tensor, hidden: Tensor, keep: int) -> Selection:
        """The mode's choice of `keep` visual tokens by queries [N, H * d_h] of layer K-1, or by hidden states [N, d] entering layer K."""
        if self.score_mode in HIDDEN_MODES:
            order, variances = dpp_order(hidden.numpy(), keep, self.grid_width)
            return Selection(np.sort(order), variances)
        scores = token_scores(queries.reshape(len(queries), self.heads, -1), self.score_mode)
        return Selection(select_tokens(scores, keep), scores)

    def _select(self, queries: Tensor, hidden: Tensor, kept_indices: np.ndarray | None) -> Selection | None:
        n = len(queries)
        if kept_indices is not None:
            kept = checked_indices(kept_indices, n, self.keep)
            return Selection(kept, self.exact_selection(queries, hidden, len(kept)).scores) if len(kept) else None
        if self.keep is None or self.keep >= n:
            return None
        if self.score_mode in SCORELESS_MODES:
            raise UsageError(f"the reference does not choose tokens by {self.score_mode!r}: give kept_indices")
        return self.exact_selection(queries, hidden, self.keep)
