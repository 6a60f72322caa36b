"""What a build will make, settled before anything is written: the model, the split, the budgets, the sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export import calibration_plan
from export.budget import average_from_keep, check_auto_keep, check_keep, check_split, keep_from_average, keep_from_percent
from export.calibration_plan import CalibrationPlan
from export.checkpoint import Checkpoint
from export.configs import ModelConfig, load_model_config
from export.families import FamilyWeights, adapter_for
from export.memory_plan import MemoryRequest, plan_memory, stored_bytes
from export.precision import scheme_of
from export.spec import ModelSpec
from export.target_options import TargetPlan, settle_targets
from export.targets import TargetConfig
from runtime.errors import UsageError
from runtime.kv_cache import round_capacity
from runtime.memory_plan import MemoryPlan
from runtime.names import SCORE_MODES, TENSOR_SCATTER

BUDGET_OPTIONS = ("keep", "avg_keep", "keep_percent")
MIN_SCORED_HEADS = 3  # centring over heads leaves rank H - 1: with 2 heads every token's entropy is 0


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """The command line's wishes; None means what the plan says, else the default. At most one of the three budgets is given.

    `target` may be several with commas, and `precision` one for each; `plan` is the path of a calibration's plan.json; `device_memory` a
    size such as "12GB".
    """

    model: str
    target: str = "cpu"
    checkpoint: str | None = None
    keep: tuple[int, ...] | None = None
    avg_keep: float | None = None
    keep_percent: float | None = None
    split_layer: int | None = None
    score_mode: str | None = None
    precision: str | None = None
    max_context: int | None = None
    debug: bool = False
    plan: str | None = None
    device_memory: str | None = None
    auto_keep: float | None = None


@dataclass(frozen=True, slots=True)
class PlanFile:
    """The calibration that a build follows: the file's name, its SHA-256 (hexadecimal), and what it says."""

    name: str
    sha256: str
    plan: CalibrationPlan


@dataclass(frozen=True, slots=True)
class Origins:
    """Where each of the values that a plan can supply came from, in words."""

    split_layer: str
    budgets: str
    score_mode: str


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """Everything settled: `budgets` are keep counts, the default first; `split_layer` is K; `auto_keep` is the manifest's.

    `target` and `precision` are those of the first target, `others` those of the rest; `each` gives a plan for every one of them.
    """

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
    origins: Origins
    debug: bool = False
    calibration: PlanFile | None = None
    auto_keep: float | None = None
    others: tuple[TargetPlan, ...] = ()
    least_head_pieces: int = 1

    def each(self) -> tuple[BuildPlan, ...]:
        """The plan of each target alone, in their order; those of one precision share their weights, the head's pieces too."""
        targets = (TargetPlan(self.target, self.precision), *self.others)
        plans = [dataclasses.replace(self, target=one.target, precision=one.precision, others=()) for one in targets]
        pieces = {p: max(plan.head_pieces for plan in plans if plan.precision == p) for p in {plan.precision for plan in plans}}
        return tuple(dataclasses.replace(plan, least_head_pieces=pieces[plan.precision]) for plan in plans)

    @property
    def head_pieces(self) -> int:
        """Into how many pieces the first target's language-model head is split."""
        return self.memory_request.head_pieces

    @property
    def visual_tokens(self) -> int:
        """N: visual tokens of one image."""
        return self.spec.vision.visual_tokens

    def average_keep(self, keep: int) -> float:
        """The paper's average over layers that a keep count means."""
        return average_from_keep(keep, visual_tokens=self.visual_tokens, split_layer=self.split_layer, layers=self.spec.decoder.layers)

    @property
    def kv_write(self) -> str:
        """How the graphs write the cache."""
        return self.target.kv_write

    @property
    def capacity(self) -> int | None:
        """The caches' length C in the graphs of both halves; None where any length goes."""
        return round_capacity(self.max_context) if self.kv_write == TENSOR_SCATTER else None

    @property
    def memory_request(self) -> MemoryRequest:
        """What the memory plan is computed from: the largest budget, the whole context."""
        return MemoryRequest(
            self.spec, self.target, self.precision, self.split_layer, max(self.budgets), self.max_context, self.least_head_pieces,
            len(self.budgets),
        )  # fmt: skip

    @property
    def bytes_to_write(self) -> int:
        """Bytes of the token table and of all weights, once for each precision."""
        table = self.spec.decoder.vocab_size * self.spec.decoder.hidden_size
        precisions = dict.fromkeys(plan.precision for plan in self.each())
        return 4 * table + sum(stored_bytes(self.spec, p) - table * scheme_of(p).plain_bytes for p in precisions)

    @property
    def memory(self) -> MemoryPlan:
        """What the bundle will need of its target's memory."""
        return plan_memory(self.memory_request)


def make_plan(options: BuildOptions) -> BuildPlan:
    """Settles a build and validates the checkpoint, reading its headers but none of its weights.

    Raises:
        UsageError: an option is unknown or out of range.
        CheckpointError: the checkpoint is missing, incomplete or not implemented.
    """
    model = load_model_config(options.model)
    (first, *others) = settle_targets(options.target, options.precision, options.device_memory)
    if options.score_mode not in (None, *SCORE_MODES):
        raise UsageError(f"unknown --score-mode {options.score_mode!r}: choose one of {', '.join(SCORE_MODES)}")
    calibration = None if options.plan is None else _read_plan(Path(options.plan))
    checkpoint = Checkpoint.open(options.checkpoint or model.default_checkpoint())
    adapter = adapter_for(checkpoint.config, model.family)
    spec = adapter.describe(checkpoint.config)
    weights = FamilyWeights(checkpoint, adapter, spec)
    weights.validate()
    if calibration is not None:
        calibration.plan.check(model.name, spec, checkpoint)
    options, origins = _settle(options, model, calibration)
    split = check_split(options.split_layer or 0, layers=spec.decoder.layers)
    score_mode = options.score_mode or model.score_mode
    if score_mode in ("trace", "row", "raw") and spec.decoder.query_heads < MIN_SCORED_HEADS:
        raise UsageError(
            f"--score-mode {score_mode} needs at least {MIN_SCORED_HEADS} query heads, the model has {spec.decoder.query_heads}: "
            "choose dpp, energy-high, energy-low, random or uniform"
        )
    budgets = choose_budgets(options, model, spec, split)
    return BuildPlan(
        model=model, target=first.target, checkpoint=checkpoint, spec=spec, weights=weights, split_layer=split,
        budgets=budgets, score_mode=score_mode, precision=first.precision,
        max_context=choose_context(options, model, spec), origins=origins, debug=options.debug, calibration=calibration,
        auto_keep=check_auto_keep(options.auto_keep, budgets=budgets, score_mode=score_mode), others=tuple(others),
    )  # fmt: skip


def _read_plan(path: Path) -> PlanFile:
    data = calibration_plan.read_bytes(path)
    return PlanFile(path.name, calibration_plan.sha256(data), CalibrationPlan.parse(data, str(path)))


def _settle(options: BuildOptions, model: ModelConfig, calibration: PlanFile | None) -> tuple[BuildOptions, Origins]:
    """Fills in split layer, budgets and score mode: from the command line, else from the plan, else the defaults."""
    given = next((name for name in BUDGET_OPTIONS if getattr(options, name) is not None), None)
    budgets = f"--{given.replace('_', '-')}" if given else f"configs/models/{model.name}.toml"
    split = "--split-layer" if options.split_layer is not None else f"configs/models/{model.name}.toml"
    mode = "--score-mode" if options.score_mode is not None else f"configs/models/{model.name}.toml"
    if calibration is not None:
        plan = calibration.plan
        if options.split_layer is None:
            options, split = dataclasses.replace(options, split_layer=plan.split_layer), calibration.name
        if given is None and plan.budgets is not None:
            options, budgets = dataclasses.replace(options, keep=plan.budgets), calibration.name
        if options.score_mode is None and plan.score_mode is not None:
            options, mode = dataclasses.replace(options, score_mode=plan.score_mode), calibration.name
        if options.auto_keep is None and {split, budgets, mode} == {calibration.name}:  # the threshold was calibrated for these alone
            options = dataclasses.replace(options, auto_keep=plan.auto_keep)
    if options.split_layer is None:
        options = dataclasses.replace(options, split_layer=model.split_layer)
    return options, Origins(split, budgets, mode)


def choose_budgets(options: BuildOptions, model: ModelConfig, spec: ModelSpec, split: int) -> tuple[int, ...]:
    count, layers = spec.vision.visual_tokens, spec.decoder.layers
    given = [name for name in BUDGET_OPTIONS if getattr(options, name) is not None]
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


def choose_context(options: BuildOptions, model: ModelConfig, spec: ModelSpec) -> int:
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
    return Path("bundles") / f"{options.model}-{options.target.replace(',', '-').replace(' ', '')}"
