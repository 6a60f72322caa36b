"""How far a pruned model's answers are from the unpruned one's, for one image and every setting of a grid.

The questions of an image are followed along an answer, token by token: the label where there is one, else what the unpruned model says
greedily. At each of these answer positions two distributions of the next token are compared, unpruned and pruned:

    KL(unpruned || pruned)    nats, from float64 log-softmax
    agreement                 whether both have the same most likely token
    unchanged                 whether that is so at every position of the answer
    right                     whether greedy decoding gives the label (each label token is the most likely one)

Sums over an image are kept, not means, so that images with many questions count for as much as their questions do. Knows nothing about
files or statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from calibration.activations import VisionLanguageReader
from calibration.grid import Grid, Setting
from calibration.pruned_forward import DensePass, PrunedForward, exact, pack
from calibration.questions import EncodedQuestion, Question, encode
from calibration.selection import Ranking, Selector, rank
from runtime.errors import InputError, UsageError
from runtime.images import image_hash, image_seed

__all__ = ["GREEDY_TOKENS", "Agreement", "AgreementReader"]

GREEDY_TOKENS = 32  # the longest answer that is generated where there is no label
PASS_QUESTIONS, PASS_TOKENS = 32, 256  # packed into one pass; one question may have more answer tokens


@dataclass(frozen=True, slots=True)
class Agreement:
    """Sums over the questions of one image; tuples have one entry for each of `Grid.settings()`.

    Attributes:
        questions, labelled: how many, and how many of them have a label.
        positions: answer positions of all of them.
        text_tokens: prompt tokens besides the image, summed over the questions.
        unpruned_right: labels that the unpruned model gives.
        kl: nats, summed over the positions.
        agreeing: positions with the same most likely token.
        unchanged: questions with agreement at every position.
        right: labels that are given.
        mass: the kept tokens' share of the score mass (no sum).
    """

    questions: int
    labelled: int
    positions: int
    text_tokens: int
    unpruned_right: int
    kl: tuple[float, ...]
    agreeing: tuple[int, ...]
    unchanged: tuple[int, ...]
    right: tuple[int, ...]
    mass: tuple[float, ...]


class _Sums:
    """Running sums: [settings] each."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        self.at = {setting: index for index, setting in enumerate(settings)}
        self.kl = np.zeros(len(settings))
        self.agreeing, self.unchanged, self.right = (np.zeros(len(settings), np.int64) for _ in range(3))
        self.unpruned_right = 0

    def add(self, setting: Setting, kl: float, agreeing: int, unchanged: int, right: int) -> None:
        index = self.at[setting]
        self.kl[index] += kl
        self.agreeing[index] += agreeing
        self.unchanged[index] += unchanged
        self.right[index] += right


class AgreementReader:
    """Measures images with a loaded model.

    Args:
        reader: model and processor.
        visual_tokens: N.
    """

    def __init__(self, reader: VisionLanguageReader, visual_tokens: int) -> None:
        self.model, self.processor, self.visual_tokens = reader.model, reader.processor, visual_tokens
        self.forward = PrunedForward(reader.model)

    def measure(self, image: Image.Image, questions: Sequence[Question], grid: Grid) -> Agreement:
        """Runs one image's questions, unpruned and with every setting.

        Args:
            image: RGB.
            questions: about this image; those without a label are answered greedily first.

        Raises:
            InputError: a question cannot be packed, or something is not finite (layer or setting named).
            UsageError: the device's memory is full.
        """
        try:
            return self._measure(image, questions, grid)
        except torch.OutOfMemoryError as error:
            raise UsageError("the device's memory is full: take --dtype bfloat16, or --device cpu") from error

    def _measure(self, image: Image.Image, questions: Sequence[Question], grid: Grid) -> Agreement:
        encoded, embeds = self._encode(image, questions)
        sums, rankings = _Sums(grid.settings()), dict[tuple[str, int], Ranking]()
        seed = image_seed(image_hash(image))
        for together in _passes(encoded):
            dense = self.forward.dense(pack(together, self.model.config.image_token_id), embeds)
            _check_finite(dense)
            if not rankings:  # of what precedes the questions: the same in every pass
                rankings = {
                    (mode, split): rank(self.forward, dense, split, Selector(mode), seed, grid.scored_keep)
                    for split in grid.splits
                    for mode in grid.modes
                }
            labelled = torch.tensor([question.question.answer is not None for question in together])
            sums.unpruned_right += int((exact(dense.logits, dense.prompt) & labelled).sum())
            self._compare(dense, labelled, grid, rankings, sums)
        return Agreement(
            questions=len(encoded), labelled=sum(e.question.answer is not None for e in encoded),
            positions=sum(len(e.answer_ids or ()) for e in encoded),
            text_tokens=sum(len(e.prompt_ids) - self.visual_tokens for e in encoded), unpruned_right=sums.unpruned_right,
            kl=tuple(sums.kl.tolist()), agreeing=tuple(sums.agreeing.tolist()), unchanged=tuple(sums.unchanged.tolist()),
            right=tuple(sums.right.tolist()),
            mass=tuple(rankings[s.mode, s.split_layer].kept_mass(s.keep) for s in grid.settings()),
        )  # fmt: skip

    def _encode(self, image: Image.Image, questions: Sequence[Question]) -> tuple[list[EncodedQuestion], Tensor]:
        """Token ids with an answer each, and image_embeds float [N, d]."""
        encoded = []
        for question in questions:
            ids, pixels = encode(question, image, self.processor)
            pixels = pixels.to(self.model.device, self.model.dtype)
            if ids.answer_ids is None:
                ids = dataclasses.replace(ids, answer_ids=self.greedy_answer(ids.prompt_ids, pixels))
            encoded.append(ids)
        embeds = self.forward.image_embeds(pixels)
        if len(embeds) != self.visual_tokens:
            raise InputError(f"the image gives {len(embeds)} visual tokens, the checkpoint's config.json {self.visual_tokens}")
        return encoded, embeds

    @torch.no_grad()
    def greedy_answer(self, prompt_ids: Sequence[int], pixels: Tensor) -> tuple[int, ...]:
        """What the unpruned model says, at most GREEDY_TOKENS tokens, the end token included where it comes.

        Args:
            pixels: [1, 3, h, w], on the model's device and in its type.
        """
        from transformers import GenerationConfig

        ends = self.model.generation_config.eos_token_id
        pad = self.processor.tokenizer.pad_token_id
        ends = self.processor.tokenizer.eos_token_id if ends is None else ends
        ids = torch.tensor([list(prompt_ids)], device=self.model.device)
        config = GenerationConfig(max_new_tokens=GREEDY_TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=0 if pad is None else pad)
        said = self.model.generate(
            input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), generation_config=config
        )  # fmt: skip
        return tuple(said[0, len(prompt_ids) :].tolist())

    def _compare(self, dense: DensePass, labelled: Tensor, grid: Grid, rankings: dict[tuple[str, int], Ranking], sums: _Sums) -> None:
        expected = dense.logits.double().log_softmax(-1)
        top = dense.logits.argmax(-1)
        unpruned = dataclasses.replace(dense.prompt, targets=top.cpu())
        for split in grid.splits:
            for keep in grid.keeps:
                kept = np.stack([rankings[mode, split].kept(keep) for mode in grid.modes])
                every = self.forward.pruned(dense, split, kept)
                for mode, logits in zip(grid.modes, every, strict=True):
                    setting = Setting(mode, split, keep)
                    kl = float((expected.exp() * (expected - logits.double().log_softmax(-1))).sum())
                    if not np.isfinite(kl):
                        raise InputError(f"{setting.describe()}: the logits hold NaN or infinity: check the checkpoint's weights")
                    right = int((exact(logits, dense.prompt) & labelled).sum())
                    sums.add(setting, max(kl, 0.0), int((logits.argmax(-1) == top).sum()), int(exact(logits, unpruned).sum()), right)


def _passes(encoded: Sequence[EncodedQuestion]) -> Iterator[list[EncodedQuestion]]:
    """Questions that are packed together: their rows see each other's only to be masked, so that many of them cost more than they save."""
    together: list[EncodedQuestion] = []
    tokens = 0
    for question in encoded:
        length = len(question.answer_ids or ())
        if together and (len(together) == PASS_QUESTIONS or tokens + length > PASS_TOKENS):
            yield together
            together, tokens = [], 0
        together.append(question)
        tokens += length
    if together:
        yield together


def _check_finite(dense: DensePass) -> None:
    advice = "check the checkpoint's weights, or take another --dtype"
    for layer, entering in enumerate(dense.entering):
        if not bool(torch.isfinite(entering).all()):
            where = "the embeddings hold" if layer == 0 else f"layer {layer - 1}: what it gives holds"
            raise InputError(f"{where} NaN or infinity: {advice}")
    if not bool(torch.isfinite(dense.logits).all()):
        raise InputError(f"layer {len(dense.entering) - 1}, or the head after it: the unpruned logits hold NaN or infinity: {advice}")
