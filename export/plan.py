"""What a build will make, settled before anything is written: the model, the split, the budgets, the sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.budget import average_from_keep, check_keep, check_split, keep_from_average, keep_from_percent
from export.checkpoint import Checkpoint
from export.configs import ModelConfig, TargetConfig, load_model_config, load_target_config
from export.families import FamilyWeights, adapter_for
from export.spec import ModelSpec
from runtime.errors import UsageError
from runtime.names import SCORE_MODES

MIN_SCORED_HEADS = 3  # centring over heads leaves rank H - 1: with 2 heads every token's entropy is 0


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """The command line's wishes; None means the model's or target's default. At most one of the three budgets is given."""

    model: str
    target: str = "cpu"
    checkpoint: str | None = None
    keep: tuple[int, ...] | None = None
    avg_keep: float | None = None
    keep_percent: float | None = None
    split_layer: int | None = None
    score_mode: str = "trace"
    precision: str | None = None
    max_context: int | None = None
    debug: bool = False


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """Everything settled: `budgets` are keep counts, the default first; `split_layer` is K."""

    model: ModelConfig
    target: TargetConfig
    checkpoint: Checkpoint
    spec: ModelSpec
    weights: FamilyWeights
    split_layer: int
    budgets: tuple[int, ...]
    score_mode: str
    precision: str
    max_context: int
    debug: bool = False

    @property
    def visual_tokens(self) -> int:
        """N: visual tokens of one image."""
        return self.spec.vision.visual_tokens

    def average_keep(self, keep: int) -> float:
        """The paper's average over layers that a keep count means."""
        return average_from_keep(keep, visual_tokens=self.visual_tokens, split_layer=self.split_layer, layers=self.spec.decoder.layers)


def make_plan(options: BuildOptions) -> BuildPlan:
    """Settles a build and validates the checkpoint, reading its headers but none of its weights.

    Raises:
        UsageError: an option is unknown or out of range.
        CheckpointError: the checkpoint is missing, incomplete or not implemented.
    """
    model, target = load_model_config(options.model), load_target_config(options.target)
    if options.score_mode not in SCORE_MODES:
        raise UsageError(f"unknown --score-mode {options.score_mode!r}: choose one of {', '.join(SCORE_MODES)}")
    precision = options.precision or target.default_precision
    if precision not in target.precisions:
        raise UsageError(f"--precision {precision} is not offered for target {target.name}: choose one of {', '.join(target.precisions)}")
    checkpoint = Checkpoint.open(options.checkpoint or model.default_checkpoint())
    adapter = adapter_for(checkpoint.config, model.family)
    spec = adapter.describe(checkpoint.config)
    weights = FamilyWeights(checkpoint, adapter, spec)
    weights.validate()
    split = check_split(model.split_layer if options.split_layer is None else options.split_layer, layers=spec.decoder.layers)
    if options.score_mode in ("trace", "row", "raw") and spec.decoder.query_heads < MIN_SCORED_HEADS:
        raise UsageError(
            f"--score-mode {options.score_mode} needs at least {MIN_SCORED_HEADS} query heads, the model has {spec.decoder.query_heads}: "
            "choose dpp, energy-high, energy-low, random or uniform"
        )
    return BuildPlan(
        model=model, target=target, checkpoint=checkpoint, spec=spec, weights=weights, split_layer=split,
        budgets=_budgets(options, model, spec, split), score_mode=options.score_mode, precision=precision,
        max_context=_max_context(options, model, spec), debug=options.debug,
    )  # fmt: skip


def _budgets(options: BuildOptions, model: ModelConfig, spec: ModelSpec, split: int) -> tuple[int, ...]:
    count, layers = spec.vision.visual_tokens, spec.decoder.layers
    given = [name for name in ("keep", "avg_keep", "keep_percent") if getattr(options, name) is not None]
    if len(given) > 1:
        raise UsageError("give one of --keep, --avg-keep and --keep-percent, not several")
    if options.keep is not None:
        keeps: Sequence[int] = options.keep
    elif options.keep_percent is not None:
        keeps = [keep_from_percent(options.keep_percent, visual_tokens=count)]
    elif options.avg_keep is not None or model.keep is None:
        average = options.avg_keep
        if average is None:  # the model's default is given for its reference N
            average = (model.avg_keep or model.reference_visual_tokens) * count / model.reference_visual_tokens
        keeps = [keep_from_average(average, visual_tokens=count, split_layer=split, layers=layers)]
    else:
        keeps = [min(model.keep, count)]
    return tuple(dict.fromkeys(check_keep(k, visual_tokens=count) for k in keeps))


def _max_context(options: BuildOptions, model: ModelConfig, spec: ModelSpec) -> int:
    limit = spec.decoder.max_positions
    wanted = min(model.max_context, limit) if options.max_context is None else options.max_context
    least = spec.vision.visual_tokens + 16
    if not least <= wanted <= limit:
        raise UsageError(
            f"--max-context {wanted} is out of range: the model has {limit} positions and an image needs {least}; choose {least} to {limit}"
        )
    return wanted


def default_output(options: BuildOptions) -> Path:
    """Where a bundle goes without --output."""
    return Path("bundles") / f"{options.model}-{options.target}"
