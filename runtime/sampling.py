"""From logits to the next token: Hugging Face's generation options and the order in which it applies them, in numpy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import BundleError, EngineError, UsageError, shown

# Entries of generation_config.json that would change the text and are not implemented, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "min_length": (0,), "min_new_tokens": (0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1.0,), "typical_p": (1.0,), "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,), "min_p": (0.0,), "top_h": (), "penalty_alpha": (0.0,), "guidance_scale": (1.0,), "bad_words_ids": (),
    "force_words_ids": (), "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "sequence_bias": (), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "exponential_decay_length_penalty": (), "dola_layers": (),
}  # fmt: skip
LARGEST = 1e30  # of temperatures and penalties, which divide and multiply float32 values
_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "seed")


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How tokens are chosen and when to stop; the names and meanings are those of Hugging Face's generation config.

    Without `do_sample` the most probable token is taken, and temperature, top_k, top_p and seed have no effect (a checkpoint's file
    may hold them all the same). `top_k` 0 and `top_p` 1 keep every token. The same `seed` gives the same text; None draws a new one.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise UsageError(f"do_sample must be true or false, got {shown(self.do_sample)}")
        _check_integer("max_new_tokens", self.max_new_tokens, 1)
        _check_integer("top_k", self.top_k, 0, "; 0 keeps every token")
        if self.seed is not None:
            _check_integer("seed", self.seed, 0)
        _check_above_zero("temperature", self.temperature, "; for the most probable token at each step leave do_sample off")
        _check_above_zero("repetition_penalty", self.repetition_penalty, "; 1 changes nothing")
        if self.repetition_penalty < 1 / LARGEST:
            raise UsageError(f"repetition_penalty must be at least {1 / LARGEST:g}; 1 changes nothing: got {self.repetition_penalty!r}")
        _check_above_zero("top_p", self.top_p, " up to 1; 1 keeps every token")
        if self.top_p > 1:
            raise UsageError(f"top_p must be a number above 0 up to 1; 1 keeps every token: got {shown(self.top_p)}")
        for token_id in self.eos_token_ids:
            _check_integer("each of eos_token_ids", token_id, 0)
        if any(type(stop) is not str or stop == "" for stop in self.stop_strings):
            raise UsageError(f"stop_strings must be texts that are not empty: got {shown(self.stop_strings)}")

    @classmethod
    def from_json(cls, config: Any) -> GenerationConfig:
        """Reads a parsed generation_config.json; `max_length` is not used, as `max_new_tokens` and the context bound the text.

        Raises:
            BundleError: an entry has a value out of range, or asks for a way of decoding that is not implemented.
        """
        if not isinstance(config, dict):
            raise BundleError(f"generation_config.json must hold a JSON object, not {type(config).__name__}: export the bundle again")
        given = {name: value for name, value in config.items() if value is not None}
        for name, neutral in _NEUTRAL.items():
            if name in given and given[name] not in neutral:
                raise BundleError(
                    f"generation_config.json asks for {name} = {shown(given[name])}, which is not implemented: remove it there"
                )
        known = {field.name for field in dataclasses.fields(cls)} - {"seed", "eos_token_ids", "stop_strings"}
        values = {name: value for name, value in given.items() if name in known}
        if values.get("temperature") == 0 and not values.get("do_sample"):
            del values["temperature"]  # another way of writing "no sampling"
        stops = _as_tuple(given.get("stop_strings", ()))
        try:
            return cls(**values, eos_token_ids=_as_tuple(given.get("eos_token_id", ())), stop_strings=stops)
        except UsageError as error:
            raise BundleError(f"generation_config.json: {error}: correct it there") from error

    def override(self, **options: Any) -> GenerationConfig:
        """The same with a user's options; None stands for "not given".

        `eos_token_ids` and `stop_strings` may also be one value or a list.

        Raises:
            UsageError: an option is unknown, out of range, or would have no effect because `do_sample` is off.
        """
        names = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(options) - set(names))
        if unknown:
            raise UsageError(f"unknown option {', '.join(unknown)}: expected some of {', '.join(names)}")
        given = {name: value for name, value in options.items() if value is not None}
        for name in ("eos_token_ids", "stop_strings"):
            if name in given:
                given[name] = _as_tuple(given[name])
        changed = dataclasses.replace(self, **given)
        idle = [name for name in _SAMPLING_ONLY if name in given]
        if idle and not changed.do_sample:
            raise UsageError(f"{', '.join(idle)} would have no effect without sampling: pass do_sample=True, or leave it out")
        return changed


class Sampler:
    """Chooses tokens for one generation; holds its random state, so make one per generation."""

    def __init__(self, config: GenerationConfig) -> None:
        self.config = config
        self._random = np.random.default_rng(config.seed)

    def next(self, logits: npt.NDArray[np.float32], previous_ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> int:
        """The next token.

        Args:
            logits: float32 [vocab], left unchanged.
            previous_ids: all tokens so far, the prompt's (its image placeholders included) and the generated ones.

        Raises:
            EngineError: the logits hold NaN, or nothing finite.
        """
        scores = _penalised(logits, previous_ids, self.config.repetition_penalty)
        best = int(scores.argmax())  # numpy's argmax stops at the first NaN
        if not math.isfinite(scores[best]):
            raise EngineError(f"the engine gave logits that are not numbers (the largest is {scores[best]}): use fp32 or bf16")
        if not self.config.do_sample:
            return best
        probabilities = self._filtered(scores)
        kept = np.flatnonzero(probabilities)
        cumulative = probabilities[kept].cumsum()
        drawn = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return int(kept[min(drawn, len(kept) - 1)])

    def probabilities(
        self, logits: npt.NDArray[np.float32], previous_ids: Sequence[int] | npt.NDArray[np.integer[Any]]
    ) -> npt.NDArray[np.float64]:
        """The distribution that `next` draws from when sampling: float64 [vocab], 0 for tokens that are left out."""
        return self._filtered(_penalised(logits, previous_ids, self.config.repetition_penalty))

    def _filtered(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Temperature, then top_k, then top_p, as in Hugging Face; ties at rank top_k all stay."""
        config = self.config
        scores = scores / np.float32(max(config.temperature, 1e-30))  # below, float32 overflows; only the largest is left by then
        kept = np.arange(len(scores))
        if 0 < config.top_k < len(scores):
            threshold = np.partition(scores, -config.top_k)[-config.top_k]
            kept = np.flatnonzero(scores >= threshold)
        weights = _softmax(scores[kept])
        if config.top_p < 1:
            order = weights.argsort(kind="stable")
            dropped = weights[order].cumsum() <= 1 - config.top_p  # from the least probable token up
            dropped[-1] = False
            kept = kept[order[~dropped]]
            weights = _softmax(scores[kept])
        probabilities = np.zeros(len(scores))
        probabilities[kept] = weights
        return probabilities


def _penalised(
    logits: npt.NDArray[np.float32], previous_ids: Sequence[int] | npt.NDArray[np.integer[Any]], penalty: float
) -> npt.NDArray[np.float32]:
    """Divides positive logits of tokens seen before by the penalty, multiplies negative ones; once per token."""
    if penalty == 1:
        return logits
    seen = np.unique(np.asarray(previous_ids, np.int64))
    seen = seen[seen < len(logits)]  # placeholders may lie beyond the head's vocabulary
    scores = logits.copy()
    scores[seen] = np.where(scores[seen] < 0, scores[seen] * np.float32(penalty), scores[seen] / np.float32(penalty))
    return scores


def _softmax(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    weights = np.exp(scores.astype(np.float64) - scores.max())
    result: npt.NDArray[np.float64] = weights / weights.sum()
    return result


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _check_integer(name: str, value: Any, least: int, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} must be an integer of {least} or more{hint}: got {shown(value)}")


def _check_above_zero(name: str, value: Any, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value < math.inf):
        raise UsageError(f"{name} must be a number above 0{hint}: got {shown(value)}")
    if value > LARGEST:
        raise UsageError(f"{name} must be a number above 0{hint}, and at most {LARGEST:g}: got {shown(value)}")
