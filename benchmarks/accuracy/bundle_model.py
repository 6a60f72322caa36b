"""A bundle that answers a benchmark harness's requests: text, images and generation options in, text out, with statistics.

Knows nothing about a particular harness: the plugin for lmms-eval (`lmms_plugin/models/entropy_prune.py`) is a thin subclass around it.
A request is what lmms-eval calls a simple one: `(text, options, doc_to_visual, doc_id, task, split)`.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from runtime.errors import EntropyPruneError, InputError, UsageError, shown
from runtime.generation import Generation
from runtime.images import load_image
from runtime.pipeline import load

Request = tuple[str, Mapping[str, Any], Callable[[Any], Any], int, str, str]
Documents = Mapping[str, Mapping[str, Sequence[Any]]]  # task -> split -> documents
IMAGE_PLACEHOLDER = "<image>"
STYLES = ("bundle", "llava")
# LLaVA-1.5's own evaluation (its conversation `vicuna_v1`); the chat template of the llava-hf checkpoints leaves it out.
LLAVA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_SAMPLING = ("temperature", "top_p", "top_k")
# `image_aspect_ratio` is for other models of lmms-eval; how images become square is the argument `style` here.
_KNOWN_OPTIONS = ("max_new_tokens", "until", "do_sample", *_SAMPLING, "repetition_penalty", "num_beams", "image_aspect_ratio")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user chooses, one field for each model argument.

    Attributes:
        bundle: the bundle's directory.
        keep: visual tokens kept: a budget of the bundle, "all", "auto", or None for its first.
        style: "bundle": prompts and images as the bundle's own files prescribe; "llava": as LLaVA-1.5's own evaluation, with its
            system prompt and with images padded to a square, in the processor's mean colour, in place of the centre crop.
        max_new_tokens: for tasks that give none.
        cache_mb: megabytes of caches kept for prompts that begin alike (the same image); 0 runs each image afresh.
        threads: engine threads; None for one per core.
        seed: of tasks that sample.
    """

    bundle: str
    keep: int | str | None = None
    style: str = "bundle"
    max_new_tokens: int = 1024
    cache_mb: int = 0
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise UsageError(f"style is {shown(self.style)}; expected one of {', '.join(STYLES)}")
        for name, least in (("max_new_tokens", 1), ("cache_mb", 0), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UsageError(f"{name} is {shown(value)}; give a whole number from {least} on")

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Settings:
        """From a harness's model arguments, the ones it adds by itself (`batch_size`, `max_batch_size`, `device`) included.

        Raises:
            UsageError: one is unknown, missing, or asks for what a bundle does not do.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        batch, device = given.pop("batch_size", 1), given.pop("device", "cpu")
        given.pop("max_batch_size", None)
        if str(batch) != "1":
            raise UsageError(f"batch_size is {shown(batch)}; a bundle answers one question at a time: leave it out, or give 1")
        if device != "cpu":
            raise UsageError(f"device is {shown(device)}; the bundle's target decides where it runs: leave it out")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise UsageError(f"unknown model argument {', '.join(unknown)}: expected some of {', '.join(known)}")
        if "bundle" not in given:
            raise UsageError("no bundle given: pass bundle=DIR, a directory made by python -m export.build")
        return cls(**{**given, "bundle": str(given["bundle"])})


class BundleModel:
    """A loaded bundle and the statistics of what it has answered.

    Raises:
        BundleError: the bundle is missing or altered.
        UsageError: it has no such budget.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model = load(settings.bundle, threads=settings.threads, cache_bytes=settings.cache_mb * 1_000_000)
        self.model.chain.check_keep(settings.keep)
        self.generations: list[Generation] = []
        self._seeds = random.Random(settings.seed)
        mean = self.model.prompts.image_processor.mean or (0.0, 0.0, 0.0)
        self._padding = (int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255))

    def answer_all(self, requests: Iterable[Request], documents: Documents) -> list[str]:
        """Answers in the order of the requests; an error says which question it is about."""
        return [self._answer(request, documents) for request in tqdm(requests, desc="questions", disable=None, file=sys.stderr)]

    def answer(self, text: str, images: Sequence[Any], options: Mapping[str, Any]) -> str:
        """Answers one question.

        Args:
            text: the question; `<image>` marks the images' places, otherwise they come first.
            images: PIL images or arrays; none for a question about text.
            options: a task's generation options, see `generation_options`.

        Raises:
            InputError: the images cannot be used, or are not as many as the places for them.
            UsageError: an option that is not implemented.
        """
        messages = place_images(text, len(images))
        if self.settings.style == "llava":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": LLAVA_SYSTEM}]})
            images = [padded(load_image(image), self._padding) for image in images]
        chosen = {"max_new_tokens": self.settings.max_new_tokens, **generation_options(options)}
        if chosen.get("do_sample"):
            chosen["seed"] = self._seeds.getrandbits(31)
        self.generations.append(self.model.generate(messages, list(images), keep=self.settings.keep, **chosen))
        return self.generations[-1].text

    def _answer(self, request: Request, documents: Documents) -> str:
        text, options, doc_to_visual, doc_id, task, split = request
        try:
            images = checked_images(doc_to_visual(documents[task][split][doc_id]))
            return self.answer(text, images, options)
        except EntropyPruneError as error:
            raise type(error)(f"task {task}, question {doc_id}: {error}") from error


def generation_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """A task's generation options as the runtime's.

    Without `do_sample`, a temperature above 0 means sampling; a temperature of 0 always means the most probable token. What only sampling
    uses is left out without it, as tasks write `temperature: 0, top_p: 1.0` for greedy decoding.

    Raises:
        UsageError: an option is unknown, or asks for beam search.
    """
    options = {name: value for name, value in given.items() if value is not None}
    unknown = sorted(set(options) - set(_KNOWN_OPTIONS))
    if unknown:
        raise UsageError(f"generation option {', '.join(unknown)} is not implemented: expected some of {', '.join(_KNOWN_OPTIONS)}")
    if options.get("num_beams", 1) != 1:
        raise UsageError(f"num_beams is {shown(options['num_beams'])}; beam search is not implemented: set it to 1")
    temperature = options.get("temperature")
    chosen: dict[str, Any] = {name: options[name] for name in ("max_new_tokens", "repetition_penalty") if name in options}
    if options.get("do_sample", bool(temperature)) and temperature != 0:
        chosen |= {"do_sample": True, **{name: options[name] for name in _SAMPLING if name in options}}
    until = options.get("until", ())
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    return {**chosen, "stop_strings": stops} if stops else chosen


def place_images(text: str, count: int) -> list[dict[str, Any]]:
    """One user's message with `count` images: at the text's `<image>` marks where it has any, otherwise in front of it.

    Raises:
        InputError: the marks are not as many as the images.
    """
    pieces, image = text.split(IMAGE_PLACEHOLDER), {"type": "image"}
    marks = len(pieces) - 1
    if marks not in (0, count):
        raise InputError(f"the text has {marks} {IMAGE_PLACEHOLDER} for {count} image(s): mark every image once, or none")
    if marks == 0:
        return [{"role": "user", "content": [image] * count + [{"type": "text", "text": text}]}]
    parts = [part for piece in pieces for part in (image, {"type": "text", "text": piece.strip()})][1:]
    return [{"role": "user", "content": [part for part in parts if part["type"] == "image" or part["text"]]}]


def checked_images(visuals: Any) -> list[Any]:
    """What a task shows with a question, if it is images; none for None.

    Raises:
        InputError: a video, a sound, or something else.
    """
    images = [] if visuals is None else list(visuals)
    for image in images:
        if not isinstance(image, (Image.Image, np.ndarray)):
            raise InputError(f"it comes with {shown(image)}; only images are implemented, no video and no sound: choose another task")
    return images


def padded(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """An RGB image in the middle of a square of `colour`, as LLaVA-1.5's `image_aspect_ratio: pad`."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def statistics(generations: Sequence[Generation]) -> dict[str, float]:
    """What pruning did to these answers; times in milliseconds, over the questions whose image was not in the cache already."""
    if not generations:
        return {}
    found = {
        "questions": float(len(generations)),
        "visual_tokens": float(np.mean([g.visual_tokens for g in generations])),
        "kept_tokens": float(np.mean([g.kept_tokens for g in generations])),
    }
    fresh = [g.ttft_ms for g in generations if g.reused_tokens == 0]
    if fresh:
        middle, high = (float(value) for value in np.percentile(fresh, (50, 90)))
        found |= {"ttft_questions": float(len(fresh)), "ttft_ms_mean": float(np.mean(fresh)), "ttft_ms_p50": middle, "ttft_ms_p90": high}
    return found


def seconds_and_tokens(generations: Sequence[Generation]) -> tuple[float, int]:
    """Seconds spent on these answers (reading the images not counted), and the tokens they have."""
    spent_ms = sum(g.ttft_ms + g.tpot_ms * max(0, len(g.token_ids) - 1) for g in generations)
    return spent_ms / 1e3, sum(len(g.token_ids) for g in generations)
