"""Pieces `latency-BACKEND`: every stage of an answer, keeping all visual tokens and each budget's worth, in turn within one process.

A round asks one new image in every setting; which comes first changes from round to round. Ratios are medians of pairs of one round, with
their interval, by `runtime.profile_statistics`.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

from benchmarks.gpu.settings import LEAST_RUNS, Settings
from runtime.profile_statistics import Distribution, Ratio, paired_ratio

if TYPE_CHECKING:
    from runtime.generation import Generation
    from runtime.manifest import Manifest
    from runtime.pipeline import VisionLanguageModel

T = TypeVar("T")
Budget = int | None  # None keeps all
STAGES = ("preprocess", "vision", "embed", "pre_ecl", "score", "post_ecl")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, in milliseconds: stages of the prefill, the first token, a further token on average, and all of it.

    `decode_ms` is what of a further token is spent in the chain; `per_token_ms` is all that a user waits for it.
    """

    preprocess_ms: float
    vision_ms: float
    embed_ms: float
    pre_ecl_ms: float
    score_ms: float
    post_ecl_ms: float
    first_token_ms: float
    decode_ms: float
    per_token_ms: float
    total_ms: float

    @classmethod
    def of(cls, result: Generation, wall_ms: float) -> Answer:
        stages = {f"{stage}_ms": result.stages_ms.get(stage, 0.0) for stage in STAGES}
        per_token_ms = (wall_ms - result.ttft_ms) / (len(result.token_ids) - 1)
        return cls(**stages, first_token_ms=result.ttft_ms, decode_ms=result.tpot_ms, per_token_ms=per_token_ms, total_ms=wall_ms)

    @property
    def decoder_ms(self) -> float:
        """pre_ecl, score and post_ecl of the prefill: what pruning is about."""
        return self.pre_ecl_ms + self.score_ms + self.post_ecl_ms

    @property
    def prefill_ms(self) -> float:
        """From pixels to the first token: what another implementation is compared in."""
        return self.first_token_ms - self.preprocess_ms


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded bundle with the question it is asked: about as many text tokens as FLOPs are counted with."""

    model: VisionLanguageModel
    question: str
    new_tokens: int

    @classmethod
    def of(cls, model: VisionLanguageModel, new_tokens: int) -> Subject:
        from runtime.profile_runs import usual_question

        return cls(model, usual_question(model), new_tokens)

    @property
    def text_tokens(self) -> int:
        """Of the prompt."""
        from runtime.profile_runs import messages, synthetic_image

        prompt = self.model.prompts.build(messages(self.question), [synthetic_image(0)])
        return len(prompt.ids.input_ids) - self.model.manifest.geometry.visual_tokens

    def ask(self, image: int, keep: Budget) -> Answer:
        """Asks about the synthetic image of that number; end tokens are ignored."""
        from runtime.profile_runs import messages, synthetic_image

        source = synthetic_image(image)
        began = time.perf_counter()
        result = self.model.generate(
            messages(self.question), [source], keep="all" if keep is None else keep, max_new_tokens=self.new_tokens, do_sample=False,
            eos_token_ids=(), stop_strings=(),
        )  # fmt: skip
        return Answer.of(result, (time.perf_counter() - began) * 1e3)


def in_turn(contenders: Sequence[Callable[[int], T]], settings: Settings) -> list[tuple[T, ...]]:
    """Rounds of all contenders, each given the round's number, the first one another each time; without the warm-up.

    Ends after `runs` rounds, or when `seconds` have passed and there are LEAST_RUNS.
    """
    rounds: list[tuple[T, ...]] = []
    ends = None
    for number in range(settings.warmup + settings.runs):
        if number == settings.warmup:
            ends = time.perf_counter() + settings.seconds
        if ends is not None and len(rounds) >= LEAST_RUNS and time.perf_counter() > ends:
            break
        order = [(number + i) % len(contenders) for i in range(len(contenders))]
        found = {i: contenders[i](number) for i in order}
        if number >= settings.warmup:
            rounds.append(tuple(found[i] for i in range(len(contenders))))
    return rounds


def piece(backend: str) -> Callable[[Settings], dict[str, Any]]:
    """The piece of one backend."""

    def run(settings: Settings) -> dict[str, Any]:
        from benchmarks.gpu.device import memory_in_use, open_model
        from benchmarks.gpu.pieces import runnable

        reason = runnable(settings, backend)
        if reason is not None:
            return {"skipped": reason, "said": f"left out: {reason}"}
        before = memory_in_use(settings.device_index, settings.rehearse)
        began = time.perf_counter()
        model = open_model(settings.bundle, backend, settings.device_index)
        loaded_s, loaded = time.perf_counter() - began, memory_in_use(settings.device_index, settings.rehearse)
        subject = Subject.of(model, settings.new_tokens)
        keeps: tuple[Budget, ...] = (None, *settings.budgets)
        rounds = in_turn([_asker(subject, keep) for keep in keeps], settings)
        after = memory_in_use(settings.device_index, settings.rehearse)
        by_keep = dict(zip(keeps, zip(*rounds, strict=True), strict=True))
        ratio = compare(model.manifest, by_keep, subject.text_tokens)
        return {
            "backend": backend, "rounds": len(rounds), "text_tokens": subject.text_tokens, "new_tokens": settings.new_tokens,
            "visual_tokens": model.manifest.geometry.visual_tokens, "load_seconds": round(loaded_s, 1),
            "memory": memory_table(before, loaded, after, settings.rehearse),
            "times_ms": {name_of(keep): times(answers) for keep, answers in by_keep.items()}, "against_all": ratio,
            "said": f"{len(rounds)} rounds; decoder " + ", ".join(f"{r['decoder']['median']:.2f}x at {k}" for k, r in ratio.items()),
        }  # fmt: skip

    return run


def _asker(subject: Subject, keep: Budget) -> Callable[[int], Answer]:
    return lambda number: subject.ask(number, keep)


def name_of(keep: Budget) -> str:
    """A setting's name in the files."""
    return "all" if keep is None else str(keep)


def memory_table(before: int, loaded: int, after: int, rehearse: bool) -> dict[str, Any]:
    """What loading and running took of the device's memory; of the whole process's in a rehearsal."""
    source = "peak resident memory of the process" if rehearse else "nvidia-smi, the whole device, less what was in use before"
    return {"loaded_bytes": loaded - before, "after_runs_bytes": after - before, "source": source}


def times(answers: Sequence[Answer]) -> dict[str, Any]:
    """Percentiles of every stage and of what a user waits for."""
    entries = (*STAGES, "decoder", "prefill", "first_token", "decode", "per_token", "total")
    return {name: dataclasses.asdict(Distribution.of([attrgetter(f"{name}_ms")(answer) for answer in answers])) for name in entries}


def compare(manifest: Manifest, by_keep: Mapping[Budget, Sequence[Answer]], text_tokens: int) -> dict[str, Any]:
    """Each budget against keeping all: times of all divided by the budget's, and how much of the FLOPs ratio that is.

    `score_share` is the score's time over the whole dense prefill of the decoder.
    """
    from runtime.flops import decoder_flops

    dense, found = by_keep[None], {}
    for keep in (k for k in by_keep if k is not None):

        def ratio(entry: str, pruned: Sequence[Answer] = by_keep[keep]) -> Ratio:
            value = attrgetter(entry)
            return paired_ratio([value(a) for a in dense], [value(a) for a in pruned])

        flops = decoder_flops(manifest, None, text_tokens) / decoder_flops(manifest, keep, text_tokens)
        decoder = ratio("decoder_ms")
        share = paired_ratio([a.score_ms for a in by_keep[keep]], [a.decoder_ms for a in dense])
        found[name_of(keep)] = {
            "decoder": dataclasses.asdict(decoder), "flops_ratio": flops, "realised": dataclasses.asdict(decoder.divided_by(flops)),
            "first_token": dataclasses.asdict(ratio("first_token_ms")), "per_token": dataclasses.asdict(ratio("per_token_ms")),
            "total": dataclasses.asdict(ratio("total_ms")), "score_share": dataclasses.asdict(share),
            "score_ms": statistics.median(a.score_ms for a in by_keep[keep]),
        }  # fmt: skip
    return found
