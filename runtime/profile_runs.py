"""The runs of a profile: pruned and unpruned in turn, a new image each time, and a second question on a kept state.

Knows how to measure, not what the figures mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import names
from runtime.engine_clock import EngineClock, EngineTotals, timed_engines
from runtime.errors import UsageError
from runtime.flops import COUNTED_TEXT_TOKENS
from runtime.generation import Generation
from runtime.pipeline import VisionLanguageModel
from runtime.prompt import ImageSource, Message

SYNTHETIC_SIZE = (640, 480)  # width, height: resizing costs what it costs with a camera's picture
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FIRST_QUESTION = "What is this?"  # the one before the second question on a kept state
FILLER = (
    "What is in this picture? Look at all of it, row by row, and say what you see, where it is, how big it is, which colour it has, "
    "what stands next to it, and which of all these things is the one that you would show to somebody else first, and why."
)
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class ImageSupply:
    """Where each round's image comes from: `files` in turn, or seeded synthetic pictures where there are none."""

    files: tuple[Path, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path) -> ImageSupply:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
        if not files:
            raise UsageError(f"--images {folder} holds no image ({', '.join(SUFFIXES)}): name a directory of images, or leave it out")
        return cls(tuple(files))

    def distinct(self, count: int) -> int:
        """How many different ones there are among `count` that follow each other."""
        return min(count, len(self.files)) if self.files else count

    def __getitem__(self, index: int) -> ImageSource:
        return self.files[index % len(self.files)] if self.files else synthetic_image(index)


@dataclass(frozen=True, slots=True)
class Run:
    """One answer, in milliseconds: stages of the prefill, then the first token and the average further token.

    `per_token_ms` is all that a user waits for a further token; of it, `step_ms` is spent in the chain, `engines_ms` of that in calls of
    engines, and `library_ms` of that in the engine library (None where it cannot be seen). `engines_prefill_ms`: the prefill's calls.
    """

    preprocess_ms: float
    vision_ms: float
    embed_ms: float
    pre_ecl_ms: float
    score_ms: float
    post_ecl_ms: float
    first_token_ms: float
    per_token_ms: float
    step_ms: float
    engines_ms: float
    library_ms: float | None
    engines_prefill_ms: float
    text_tokens: int
    new_tokens: int

    @classmethod
    def of(cls, result: Generation, wall_ms: float, prefill: EngineTotals, decode: EngineTotals) -> Run:
        stages, steps = result.stages_ms, len(result.token_ids) - 1
        return cls(
            stages["preprocess"], stages[names.VISION], stages["embed"], stages[names.PRE_ECL], stages.get(names.SCORE, 0.0),
            stages[names.POST_ECL], result.ttft_ms, per_token_ms=(wall_ms - result.ttft_ms) / steps, step_ms=stages["decode"] / steps,
            engines_ms=decode.run_ms / steps, library_ms=None if decode.library_ms is None else decode.library_ms / steps,
            engines_prefill_ms=prefill.run_ms, text_tokens=result.prompt_tokens - result.visual_tokens, new_tokens=len(result.token_ids),
        )  # fmt: skip

    @property
    def decoder_ms(self) -> float:
        """What pruning is about: pre_ecl, score and post_ecl of the prefill."""
        return self.pre_ecl_ms + self.score_ms + self.post_ecl_ms

    @property
    def rest_ms(self) -> float:
        """What the prefill's stages leave of the time to the first token: gathering rows, choosing the token."""
        return self.first_token_ms - self.preprocess_ms - self.vision_ms - self.embed_ms - self.decoder_ms

    @property
    def between_ms(self) -> float:
        """A decode step's time in the chain outside its engines."""
        return self.step_ms - self.engines_ms

    @property
    def between_prefill_ms(self) -> float:
        """The prefill's time outside preprocessing and engines: token table, gathering rows, the first token's choice."""
        return self.first_token_ms - self.preprocess_ms - self.engines_prefill_ms


@dataclass(frozen=True, slots=True)
class Round:
    """One image: asked with pruning, without, and as a second question on a kept state (pruned; time to first token).

    `reused_tokens` of the second question's prompt were in the state.
    """

    pruned: Run
    dense: Run
    second_question_ms: float
    reused_tokens: int


class Profiler:
    """Asks one question about one image after the other, in all settings.

    Args:
        keep: the budget of the pruned setting.
        new_tokens: generated each time, whatever they are (end tokens are ignored), 2 or more.
    """

    def __init__(self, model: VisionLanguageModel, keep: int, question: str, new_tokens: int, images: ImageSupply) -> None:
        self._model, self._keep, self._question, self._new_tokens, self._images = model, keep, question, new_tokens, images

    def measure(self, runs: int, warmup: int, progress: Progress) -> tuple[Round, ...]:
        """`warmup` rounds that are not counted, then `runs` rounds that are; `progress` hears each round's number.

        Raises:
            InputError: an image cannot be used.
            UsageError: prompt and answer do not fit the context.
        """
        self._check_room()
        rounds: list[Round] = []
        with timed_engines(self._model.chain) as clock:
            for i in range(1, warmup + runs + 1):
                progress(i)
                rounds.append(self._round(i, self._images[i], clock))
        return tuple(rounds[warmup:])

    def _check_room(self) -> None:
        prompt = self._model.prompts.build(messages(self._question), [self._images[0]])
        tokens, context = len(prompt.ids.input_ids), self._model.manifest.max_context
        if tokens + self._new_tokens > context:
            raise UsageError(
                f"a prompt of {tokens} tokens and {self._new_tokens} more exceed the bundle's context of {context}: "
                "lower --max-new-tokens or shorten --prompt"
            )

    def _round(self, index: int, image: ImageSource, clock: EngineClock) -> Round:
        """All settings with one image; which comes first changes from round to round, so that none always follows the same other."""
        runs: dict[int | None, Run] = {}
        second: Generation | None = None
        order: list[int | None] = [self._keep, None] if index % 2 else [None, self._keep]
        if index % 4 < 2:
            second = self._second_question(image)
        for keep in order:
            runs[keep] = self._ask(image, keep, clock)
        second = second or self._second_question(image)
        return Round(runs[self._keep], runs[None], second.ttft_ms, second.reused_tokens)

    def _ask(self, image: ImageSource, keep: int | None, clock: EngineClock) -> Run:
        clock.restart()
        began = time.perf_counter()
        result = self._model.generate(
            messages(self._question), [image], keep="all" if keep is None else keep, max_new_tokens=self._new_tokens, do_sample=False,
            eos_token_ids=(), stop_strings=(),
        )  # fmt: skip
        wall_ms = (time.perf_counter() - began) * 1e3
        return Run.of(result, wall_ms, *clock.split())

    def _second_question(self, image: ImageSource) -> Generation:
        state = self._model.prefill(messages(None), [image], keep=self._keep)
        self._model.generate(FIRST_QUESTION, state=state, max_new_tokens=1, do_sample=False)
        return self._model.generate(self._question, state=state, max_new_tokens=1, do_sample=False)


def messages(question: str | None) -> list[Message]:
    """One user message: an image, then the question if there is one."""
    content = [{"type": "image"}] + ([] if question is None else [{"type": "text", "text": question}])
    return [{"role": "user", "content": content}]


def first_token_ms(model: VisionLanguageModel, keep: int, question: str | None) -> float:
    """Time to first token of one answer, for the first after loading."""
    image = synthetic_image(0)
    return model.generate(messages(question or FIRST_QUESTION), [image], keep=keep, max_new_tokens=1).ttft_ms


def usual_question(model: VisionLanguageModel) -> str:
    """A question that makes a prompt of about as many text tokens as the manifest's FLOPs are counted with."""
    image = model.prompts.prepare(synthetic_image(0))
    words = FILLER.split()
    best, least = words[0], None
    for count in range(1, len(words) + 1):
        question = " ".join(words[:count])
        tokens = len(model.prompts.build(messages(question), [image]).ids.input_ids) - model.manifest.geometry.visual_tokens
        distance = abs(tokens - COUNTED_TEXT_TOKENS)
        if least is not None and distance > least:
            break
        best, least = question, distance
    return best


def synthetic_image(seed: int) -> np.ndarray:
    """A picture of its own for each seed, uint8 [480, 640, 3]: a gradient under coarse and fine noise."""
    rng = np.random.default_rng(seed)
    width, height = SYNTHETIC_SIZE
    layers: Sequence[tuple[int, int]] = ((2, 2), (int(rng.integers(4, 24)), int(rng.integers(4, 24))), (width // 4, height // 4))
    total = np.zeros((height, width, 3), np.float32)
    for size, weight in zip(layers, (0.5, 0.35, 0.15), strict=True):
        cells = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        total += weight * np.asarray(cells.resize(SYNTHETIC_SIZE, Image.Resampling.BILINEAR), np.float32)
    return total.astype(np.uint8)
