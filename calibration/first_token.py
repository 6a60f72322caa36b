"""Time to first token of every setting, from profiles of bundles (`python -m runtime.profile --json`).

A setting that was profiled is taken as measured. Any other is estimated from the profile nearest to it in FLOPs: the medians of pre_ecl and
post_ecl scaled by their matrix-product FLOPs, everything else as it was. Knows nothing about agreement.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.cost import layer_flops, prefill_flops
from calibration.grid import Setting
from export.spec import ModelSpec
from runtime.errors import StorageError, UsageError

__all__ = ["FirstToken", "FirstTokens", "ProfiledSetting", "read_profiles"]

FLOPS_TOLERANCE = 1e-3  # between a profile's unpruned FLOPs and those of the geometry; both are exact up to float rounding


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A median in milliseconds; `measured` is False for an estimate."""

    ms: float
    measured: bool


@dataclass(frozen=True, slots=True)
class ProfiledSetting:
    """Medians of one profile, in milliseconds, of a prompt of N visual and `text_tokens` text tokens."""

    setting: Setting
    text_tokens: int
    first_token_ms: float
    pre_ms: float
    post_ms: float
    unpruned_first_token_ms: float
    surroundings: tuple[Any, ...]

    @classmethod
    def parse(cls, raw: Any, name: str, model: str, spec: ModelSpec) -> ProfiledSetting:
        """Reads a profile's JSON object.

        Raises:
            UsageError: it is no profile, or one of another model or geometry.
        """
        try:
            subject, machine, pruned = raw["subject"], raw["machine"], raw["pruned"]
            setting = Setting(str(subject["score_mode"]), int(subject["split_layer"]), int(subject["keep"]))
            pre, post = (float(pruned["stages"][stage]["median_ms"]) for stage in ("pre_ecl", "post_ecl"))
            found = cls(
                setting, int(subject["text_tokens"]), float(pruned["first_token"]["median_ms"]), pre, post,
                float(raw["dense"]["first_token"]["median_ms"]),
                (subject["target"], subject["precision"], int(subject["text_tokens"]), machine["cpu"], machine["engine_threads"]),
            )  # fmt: skip
            of = str(subject["model"]), int(subject["layers"]), int(subject["visual_tokens"]), float(raw["comparison"]["flops_dense"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{name} is not a profile ({error!r}): give a profile.json of python -m runtime.profile") from error
        times = (found.first_token_ms, found.pre_ms, found.post_ms, found.unpruned_first_token_ms)
        if not all(math.isfinite(ms) and ms > 0 for ms in times):
            raise UsageError(f"{name} holds times of 0 ms or less, or none: profile the bundle again")
        found._check(of, name, model, spec)
        return found

    def _check(self, of: tuple[str, int, int, float], name: str, model: str, spec: ModelSpec) -> None:
        decoder, count = spec.decoder, spec.vision.visual_tokens
        if of[:3] != (model, decoder.layers, count):
            raise UsageError(
                f"{name} is a profile of {of[0]} ({of[1]} layers, {of[2]} visual tokens), this is {model} ({decoder.layers} layers, "
                f"{count} visual tokens): profile a bundle of this model"
            )
        dense = prefill_flops(decoder, visual_tokens=count, keep=count, split_layer=1, text_tokens=self.text_tokens)
        dense += 2 * decoder.hidden_size * decoder.vocab_size
        if not math.isclose(of[3], dense, rel_tol=FLOPS_TOLERANCE):
            raise UsageError(
                f"{name} is a profile of a decoder of {of[3]:.4g} FLOP unpruned, this one has {dense:.4g}: profile a bundle of this model"
            )
        if not (1 <= self.setting.split_layer < decoder.layers and 1 <= self.setting.keep <= count):
            raise UsageError(f"{name} is of {self.setting.describe()}, which this model does not have: profile the bundle again")


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """Times of any setting; `profiles` holds at least one."""

    spec: ModelSpec
    profiles: tuple[ProfiledSetting, ...]

    def of(self, setting: Setting) -> FirstToken:
        """The time of one setting."""
        if setting.keep == self.spec.vision.visual_tokens:  # the bundle keeps all whatever its split: each profile has measured that
            return FirstToken(self.profiles[0].unpruned_first_token_ms, True)
        for profile in self.profiles:
            if profile.setting == setting:
                return FirstToken(profile.first_token_ms, True)
        base = min(self.profiles, key=lambda p: (self._distance(p.setting, setting, p.text_tokens), p.setting.mode != setting.mode))
        (pre, post), (pre_base, post_base) = (self._halves(s, base.text_tokens) for s in (setting, base.setting))
        changed = base.pre_ms * (pre / pre_base - 1) + base.post_ms * (post / post_base - 1)
        return FirstToken(base.first_token_ms + changed, False)

    def _halves(self, setting: Setting, text_tokens: int) -> tuple[int, int]:
        decoder, count = self.spec.decoder, self.spec.vision.visual_tokens
        before = setting.split_layer * layer_flops(decoder, count + text_tokens)
        return before, (decoder.layers - setting.split_layer) * layer_flops(decoder, setting.keep + text_tokens)

    def _distance(self, one: Setting, other: Setting, text_tokens: int) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(self._halves(one, text_tokens), self._halves(other, text_tokens), strict=True))


def read_profiles(paths: Sequence[Path], model: str, spec: ModelSpec) -> FirstTokens | None:
    """Reads profile.json files, or what `runtime.profile --json` printed (its last line); None where there are none.

    Raises:
        UsageError: a file is not a profile, is one of another model, or they were taken on different machines or with other prompts.
        StorageError: a file cannot be read.
    """
    found = [ProfiledSetting.parse(_json(path), str(path), model, spec) for path in paths]
    for path, profile in zip(paths, found, strict=True):
        if profile.surroundings != found[0].surroundings:
            raise UsageError(
                f"{path} was taken with {_words(profile)}, {paths[0]} with {_words(found[0])}: give profiles of one machine, one target "
                "and one prompt"
            )
    return FirstTokens(spec, tuple(found)) if found else None


def _json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot read --profile {path}: {error.strerror}; name a profile.json of python -m runtime.profile") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--profile {path} is not text: give a profile.json of python -m runtime.profile") from error
    for part in (text, *text.strip().splitlines()[-1:]):
        try:
            return json.loads(part)
        except (ValueError, RecursionError):
            continue
    raise UsageError(f"--profile {path} holds no JSON: give a profile.json of python -m runtime.profile")


def _words(profile: ProfiledSetting) -> str:
    target, precision, text_tokens, cpu, threads = profile.surroundings
    return f"{target} {precision}, {text_tokens} text tokens, {threads} threads on {cpu}"
