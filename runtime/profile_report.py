"""What a profile says: figures from runs, as plain data for JSON and as a table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from runtime.flops import COUNTED_TEXT_TOKENS, decoder_flops
from runtime.machine import Machine, PeakMemory
from runtime.manifest import Manifest
from runtime.profile_runs import SYNTHETIC_SIZE, ImageSupply, Round, Run
from runtime.profile_statistics import Distribution, Ratio, paired_ratio
from runtime.units import format_bytes, format_flops

STAGES = ("preprocess", "vision", "embed", "pre_ecl", "score", "post_ecl", "rest")


@dataclass(frozen=True, slots=True)
class Subject:
    """What was profiled, and with which prompt. Images are new in every pair if `distinct_images` equals the number of pairs."""

    bundle: str
    model: str
    target: str
    precision: str
    layers: int
    split_layer: int
    score_mode: str
    visual_tokens: int
    keep: int
    question: str
    text_tokens: int
    new_tokens: int
    images: str
    distinct_images: int
    warmup: int
    backend: str

    @classmethod
    def of(
        cls, bundle: Path, manifest: Manifest, keep: int, question: str, images: ImageSupply, rounds: Sequence[Round], warmup: int,
        backend: str,
    ) -> Subject:  # fmt: skip
        run = rounds[0].pruned
        width, height = SYNTHETIC_SIZE
        source = f"{len(images.files)} files" if images.files else f"synthetic, {width} x {height}, seeded by their number"
        return cls(
            str(bundle), manifest.model, manifest.target, manifest.precision, manifest.geometry.layers, manifest.split_layer,
            manifest.score_mode, manifest.geometry.visual_tokens, keep, question, run.text_tokens, run.new_tokens, source,
            images.distinct(len(rounds)), warmup, backend,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting's times. `stages` add up to `first_token` in every run (not so their medians); `per_token` is a further token's.

    `between_engines` is a decode step's time in the chain outside its engines, `between_engines_share` the median share of the step;
    `binding` is the time inside the engines' calls but outside the engine library (None where it cannot be seen), likewise with its
    share; `between_engines_prefill` is the prefill's, without preprocessing.
    """

    keep: int
    stages: dict[str, Distribution]
    first_token: Distribution
    per_token: Distribution
    between_engines: Distribution
    between_engines_share: float
    binding: Distribution | None
    binding_share: float | None
    between_engines_prefill: Distribution

    @classmethod
    def of(cls, keep: int, runs: Sequence[Run]) -> Setting:
        def times(value: Callable[[Run], float]) -> Distribution:
            return Distribution.of([value(run) for run in runs])

        def share(value: Callable[[Run], float]) -> float:
            return statistics.median(value(run) / run.step_ms for run in runs)

        def binding(run: Run) -> float:
            return run.engines_ms - (run.library_ms or 0.0)

        visible = all(run.library_ms is not None for run in runs)
        return cls(
            keep, {stage: times(attrgetter(f"{stage}_ms")) for stage in STAGES},
            times(lambda run: run.first_token_ms), times(lambda run: run.per_token_ms),
            times(lambda run: run.between_ms), share(lambda run: run.between_ms),
            times(binding) if visible else None, share(binding) if visible else None, times(lambda run: run.between_prefill_ms),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """How much longer the unpruned chain takes: its times divided by the pruned ones', in pairs.

    `decoder` is pre_ecl + score + post_ecl of the prefill. `flops_ratio` is that of the decoder's matrix products for this very prompt,
    and `realised` is `decoder` divided by it.
    """

    decoder: Ratio
    flops_dense: float
    flops_pruned: float
    flops_ratio: float
    realised: Ratio
    first_token: Ratio
    per_token: Ratio


@dataclass(frozen=True, slots=True)
class KeptState:
    """A second question about an image that is already in the caches: time to first token, and its share of asking afresh."""

    first_token: Distribution
    share_of_afresh: Ratio
    reused_tokens: int


@dataclass(frozen=True, slots=True)
class ColdStart:
    """What comes before the first answer, once each: importing libraries, loading the bundle, the first answer's first token."""

    import_ms: float
    load_ms: float
    first_token_ms: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak resident bytes of the whole process, after loading and at the end (pruned and unpruned runs together)."""

    loaded_bytes: int
    peak_bytes: int
    source: str

    @classmethod
    def of(cls, loaded: PeakMemory | None, peak: PeakMemory | None) -> Memory | None:
        return None if loaded is None or peak is None else cls(loaded.bytes, peak.bytes, peak.source)


@dataclass(frozen=True, slots=True)
class Profile:
    """A whole profile. `notes` say what its figures are not."""

    subject: Subject
    dense: Setting
    pruned: Setting
    comparison: Comparison
    kept_state: KeptState
    cold_start: ColdStart
    memory: Memory | None
    machine: Machine
    notes: tuple[str, ...]

    @property
    def pairs(self) -> int:
        return self.comparison.decoder.pairs

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; times in milliseconds."""
        return dataclasses.asdict(self)


def make_profile(
    subject: Subject, manifest: Manifest, rounds: Sequence[Round], cold: ColdStart, memory: Memory | None, machine: Machine
) -> Profile:
    """Puts the figures together."""
    pruned, dense = [r.pruned for r in rounds], [r.dense for r in rounds]

    def ratio(value: Callable[[Run], float]) -> Ratio:
        return paired_ratio([value(run) for run in dense], [value(run) for run in pruned])

    more, less = (decoder_flops(manifest, keep, subject.text_tokens) for keep in (None, subject.keep))
    decoder = ratio(lambda run: run.decoder_ms)
    comparison = Comparison(
        decoder, more, less, more / less, decoder.divided_by(more / less), ratio(lambda run: run.first_token_ms),
        ratio(lambda run: run.per_token_ms),
    )  # fmt: skip
    second = [r.second_question_ms for r in rounds]
    kept = KeptState(Distribution.of(second), paired_ratio(second, [run.first_token_ms for run in pruned]), rounds[0].reused_tokens)
    return Profile(
        subject, Setting.of(subject.visual_tokens, dense), Setting.of(subject.keep, pruned), comparison, kept, cold, memory, machine,
        _notes(subject, len(rounds)),
    )  # fmt: skip


def _notes(subject: Subject, pairs: int) -> tuple[str, ...]:
    if subject.distinct_images == pairs:
        images = "every pair has an image that was not seen before; published figures of vision-language models often time a cache"
    else:
        images = f"{subject.distinct_images} images for {pairs} pairs: they come again, but nothing of them is cached between answers"
    notes = [images]
    if not subject.images.startswith("synthetic"):
        notes.append("preprocess includes reading and decoding the image files")
    if pairs < 100:
        notes.append(f"p99 of {pairs} runs is close to their maximum")
    notes.append("cold start: the operating system's file cache was left as it was")
    return tuple(notes)


# ---------------------------------------------------------------- the table


def describe(profile: Profile) -> str:
    """The profile as text."""
    s = profile.subject
    head = [
        f"{s.model} for {s.target}, {s.precision}: {s.layers} layers, split before layer {s.split_layer}, score {s.score_mode}",
        f"bundle: {s.bundle}; runs on: {s.backend}",
        f"prompt: {s.visual_tokens} visual + {s.text_tokens} text tokens, {s.new_tokens} tokens generated; images: {s.images}",
        f"{profile.pairs} pairs after {s.warmup} of warm-up, pruned and unpruned in turn, the same new image in both of a pair",
        "",
    ]
    parts = [*head, *_times(profile), "", *_ratios(profile), "", *_overheads(profile), "", *_surroundings(profile), ""]
    return "\n".join([*parts, *(f"note: {note}" for note in profile.notes)])


def _times(profile: Profile) -> list[str]:
    dense, pruned = profile.dense, profile.pruned
    lines = [
        f"{'milliseconds':<24}{f'keep all {dense.keep}':^30}{f'keep {pruned.keep}':^30}".rstrip(),
        f"{'':<24}" + f"{'median':>8}{'p90':>8}{'p99':>8}{'runs':>6}" * 2,
    ]
    rows = [(stage, dense.stages[stage], pruned.stages[stage]) for stage in STAGES]
    rows.append(("time to first token", dense.first_token, pruned.first_token))
    rows.append(("time per output token", dense.per_token, pruned.per_token))
    for name, *cells in rows:
        lines.append(f"  {name:<22}" + "".join(_cells(c) for c in cells))
    second = profile.kept_state.first_token
    lines.append(f"  {'second question, first token':<52}{_cells(second)}")
    return lines


def _cells(d: Distribution) -> str:
    if d.p99_ms == 0:  # a stage that this setting does not have
        return f"{'-':>8}{'-':>8}{'-':>8}{d.runs:>6}"
    return "".join(f"{value:>8.2f}" for value in (d.median_ms, d.p90_ms, d.p99_ms)) + f"{d.runs:>6}"


def _ratios(profile: Profile) -> list[str]:
    c, s, kept = profile.comparison, profile.subject, profile.kept_state
    flops = f"{format_flops(c.flops_dense)} / {format_flops(c.flops_pruned)}"
    scaled = "" if s.text_tokens == COUNTED_TEXT_TOKENS else f", from those at {COUNTED_TEXT_TOKENS}"
    rows = [
        ("pre_ecl + score + post_ecl", _interval(c.decoder), ""),
        ("the same in FLOPs", f"{c.flops_ratio:.3f}", f"{flops} (counted in the graphs; {s.text_tokens} text tokens{scaled})"),
        ("realised share", _interval(c.realised), "time ratio / FLOPs ratio"),
        ("time to first token", _interval(c.first_token), ""),
        ("time per output token", _interval(c.per_token), ""),
    ]
    title = f"keep all {s.visual_tokens} / keep {s.keep}: median of {profile.pairs} pairwise ratios [95 % interval, bootstrap]"
    lines = [title, *(f"  {name:<28}{value:<24}{more}".rstrip() for name, value, more in rows)]
    held = f"{kept.reused_tokens} of {s.visual_tokens + s.text_tokens} prompt tokens already held"
    lines.append(f"second question on a kept state / asked afresh (both keep {s.keep})")
    return [*lines, f"  {'time to first token':<28}{_interval(kept.share_of_afresh):<24}{held}"]


def _interval(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _overheads(profile: Profile) -> list[str]:
    lines = [
        f"{'overhead, median ms (share of a decode step)':<48}{f'keep all {profile.dense.keep}':>18}{f'keep {profile.pruned.keep}':>18}"
    ]
    both = (profile.dense, profile.pruned)
    between = [f"{s.between_engines.median_ms:.3f} ({s.between_engines_share:.1%})" for s in both]
    binding = ["-" if s.binding is None else f"{s.binding.median_ms:.3f} ({s.binding_share:.1%})" for s in both]
    prefill = [f"{s.between_engines_prefill.median_ms:.3f}" for s in both]
    for name, cells in (
        ("between engines, per decode step", between),
        ("handing over tensors, per decode step", binding),
        ("between engines, prefill", prefill),
    ):
        lines.append(f"  {name:<46}" + "".join(f"{cell:>18}" for cell in cells))
    return lines


def _surroundings(profile: Profile) -> list[str]:
    cold, memory = profile.cold_start, profile.memory
    used = "not known on this system"
    if memory is not None:
        peak, loaded = format_bytes(memory.peak_bytes), format_bytes(memory.loaded_bytes)
        used = f"{peak} at its peak, {loaded} once loaded ({memory.source}, whole process)"
    return [
        f"cold start: libraries {cold.import_ms:.0f} ms, loading the bundle {cold.load_ms:.0f} ms, first answer's first token "
        f"{cold.first_token_ms:.1f} ms (median afterwards {profile.pruned.first_token.median_ms:.1f} ms)",
        f"memory: {used}",
        f"machine: {profile.machine.describe()}",
    ]
