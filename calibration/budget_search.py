"""From a model, a questions file and a rule to budgets in a plan: what `python -m calibration.budget` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from calibration.agreement import GREEDY_TOKENS, AgreementReader
from calibration.agreement_collection import AgreementJournal, Collected, collect_agreement
from calibration.budget_picture import draw_budget
from calibration.budget_report import Decision, PerImage, describe_decision, describe_grid, make_evidence
from calibration.budget_tables import Results
from calibration.first_token import read_profiles
from calibration.grid import Grid, make_grid
from calibration.journal import fingerprint_of
from calibration.pareto import Measured, Rule, choose
from calibration.per_image import choose_threshold, evaluate_thresholds, usual_thresholds
from calibration.plan_files import BudgetFiles
from calibration.progress import resumable_progress
from calibration.questions import Question, read_questions
from calibration.resampling import Resampler
from calibration.subject import Subject, check_sample, now
from export import TOOL_VERSION
from export.calibration_plan import CalibrationPlan
from runtime.errors import UsageError
from runtime.files import write_file
from runtime.manifest import sha256_of

__all__ = ["BudgetSearch", "FoundBudget", "find_budget"]

JOURNAL_VERSION = 2  # raised with the definition of any mode: what was measured before it does not count


@dataclass(frozen=True, slots=True)
class BudgetSearch:
    """The command line's wishes; None means what is usual.

    Attributes:
        images: the folder that the questions' images are in; None for the questions file's own.
        plan: a plan.json to carry on.
        auto_budgets: keep counts for budgets per image.
        limit: how many images, drawn by `seed`.
    """

    model: str
    questions: Path
    checkpoint: str | None = None
    images: Path | None = None
    plan: Path | None = None
    splits: tuple[int, ...] | None = None
    keeps: tuple[int, ...] | None = None
    modes: tuple[str, ...] | None = None
    profiles: tuple[Path, ...] = ()
    rule: Rule | None = None
    auto_budgets: tuple[int, ...] = ()
    limit: int | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_sample(self.limit, self.seed)
        if self.rule is not None and self.rule.max_ttft_ms is not None and not self.profiles:
            raise UsageError("--max-ttft-ms needs --profile: a profile.json of python -m runtime.profile")
        if self.auto_budgets and len(set(self.auto_budgets)) < 2:
            raise UsageError(f"--auto-budgets holds {self.auto_budgets[0]} alone: give at least two keep counts to choose from")
        if self.auto_budgets and self.rule is None:
            raise UsageError("--auto-budgets needs a rule for mode and split: give --min-agreement, --max-ttft-ms or --avg-keep")
        if self.images is not None and not self.images.is_dir():
            raise UsageError(f"--images {self.images} is not a directory: name the folder that the questions' images are in")


@dataclass(frozen=True, slots=True)
class FoundBudget:
    """What was found. `error` is set where a rule was given and no setting meets it; `plan` only where one was written."""

    text: str
    evidence: dict[str, Any]
    plan: CalibrationPlan | None
    error: UsageError | None


def find_budget(search: BudgetSearch, files: BudgetFiles) -> FoundBudget:
    """Measures the images that are not in the journal yet; where a rule is given, chooses a setting and writes plan and picture.

    Raises:
        UsageError: an option is out of range, or does not fit the model.
        CheckpointError: the checkpoint cannot be used.
        InputError: the questions or all images cannot be used, or a number is not finite.
        StorageError: a file cannot be read or written, or another run is writing it.
        KeyboardInterrupt: with a message; what was measured is in the journal.
    """
    files.check()
    questions = read_questions(search.questions, search.images)
    questions_sha256 = sha256_of(search.questions)
    subject = Subject.open(search.model, search.checkpoint)
    old = None if search.plan is None else CalibrationPlan.read(search.plan)
    if old is not None:
        old.check(subject.model.name, subject.spec, subject.checkpoint)
    grid = _grid(search, subject, old)
    first_tokens = read_profiles(search.profiles, subject.model.name, subject.spec)
    with files.locked():
        collected = _collect(search, files, subject, grid, questions)
        results = Results(grid, collected.records, subject.spec, Resampler.of(len(collected.records), search.seed), first_tokens)
        rows = results.rows()
        error: UsageError | None = None
        decision: Decision | None = None
        if search.rule is not None:
            try:
                decision = _decide(results, rows, search.rule, search.auto_budgets)
            except UsageError as none_fits:
                error = none_fits
        evidence = make_evidence(results, rows, decision, collected, _settings(search, grid, questions_sha256))
        table = describe_grid(results, rows, None if decision is None else decision.chosen)
        if error is not None:
            return FoundBudget(table, evidence, None, error)
        text = f"{table}\n{describe_decision(results, decision, collected)}"
        if decision is None:
            return FoundBudget(text, evidence, None, None)
        plan = _plan(subject, old, decision, evidence)
        picture = _picture(subject, results, rows, decision)
        plan.write(files.plan)
        write_file(files.picture, picture)
    if old is not None and old.split_layer != plan.split_layer:
        text += f"\nthe plan's split was {old.split_layer}; it is {plan.split_layer} now"
    return FoundBudget(text, evidence, plan, None)


def _grid(search: BudgetSearch, subject: Subject, old: CalibrationPlan | None) -> Grid:
    usual = subject.model.split_layer
    splits: Sequence[int] = (usual - 1, usual, usual + 1) if old is None else (old.split_layer,)
    mode = subject.model.score_mode if old is None or old.score_mode is None else old.score_mode
    return make_grid(
        subject.spec, mode, splits, modes=search.modes, splits=search.splits, keeps=search.keeps, more_keeps=search.auto_budgets
    )


def _collect(search: BudgetSearch, files: BudgetFiles, subject: Subject, grid: Grid, questions: Sequence[Question]) -> Collected:
    fingerprint = fingerprint_of({
        "version": JOURNAL_VERSION, "revision": subject.checkpoint.revision, "device": search.device, "dtype": search.dtype,
        "grid": dataclasses.asdict(grid) | {"controls": None}, "greedy_tokens": GREEDY_TOKENS,
    })  # fmt: skip
    count = len({question.image for question in questions})
    total = count if search.limit is None else min(search.limit, count)
    with AgreementJournal(files.journal, fingerprint) as journal, resumable_progress(total, files.journal) as step:
        return collect_agreement(
            questions, search.images or search.questions.parent, grid, journal,
            lambda: AgreementReader(subject.load(search.device, search.dtype), subject.visual_tokens),
            limit=search.limit, seed=search.seed, progress=step,
        )  # fmt: skip


def _decide(results: Results, rows: Sequence[Measured], rule: Rule, auto_budgets: Sequence[int]) -> Decision:
    chosen = choose(rows, rule)
    if auto_budgets and chosen.setting.keep > max(auto_budgets):  # a bundle scores at its largest budget and chooses among all it holds
        raise UsageError(
            f"the rule chose keep {chosen.setting.keep}, --auto-budgets end at {max(auto_budgets)}: add {chosen.setting.keep} to them"
        )
    per_image = _per_image(results, rows, rule, chosen, auto_budgets) if auto_budgets else None
    return Decision(rule, chosen, tuple(results.compare(chosen.setting)), per_image)


def _per_image(results: Results, rows: Sequence[Measured], rule: Rule, chosen: Measured, keeps: Sequence[int]) -> PerImage:
    mode, split = chosen.setting.mode, chosen.setting.split_layer
    budgets = results.image_budgets(mode, split, sorted({*keeps, chosen.setting.keep}))
    thresholds = evaluate_thresholds(budgets, usual_thresholds(budgets), results.resampler)
    same = {row.setting.keep: row for row in rows if (row.setting.mode, row.setting.split_layer) == (mode, split)}
    ascending = [int(keep) for keep in budgets.keeps]
    picked = choose_threshold(thresholds, rule, chosen, [same[keep] for keep in ascending])
    return PerImage(tuple(ascending), tuple(thresholds), picked)


def _plan(subject: Subject, old: CalibrationPlan | None, decision: Decision, evidence: dict[str, Any]) -> CalibrationPlan:
    """The old plan carried on, or a new one; the chosen budget first."""
    setting, per_image = decision.chosen.setting, decision.per_image
    plan = old or subject.plan(setting.split_layer, {})
    others = () if per_image is None else tuple(keep for keep in reversed(per_image.budgets) if keep != setting.keep)
    auto_keep = None if per_image is None or per_image.chosen is None else per_image.chosen.threshold
    return dataclasses.replace(
        plan, tool_version=TOOL_VERSION, created=now(), split_layer=setting.split_layer, budgets=(setting.keep, *others),
        score_mode=setting.mode, auto_keep=auto_keep, evidence={**plan.evidence, "budget": evidence},
    )  # fmt: skip


def _picture(subject: Subject, results: Results, rows: Sequence[Measured], decision: Decision) -> bytes:
    unpruned = results.unpruned_accuracy
    title = f"{subject.model.name}: {len(results.records)} images, {results.questions} questions; {decision.rule.option}"
    return draw_budget(rows, decision.chosen, title, None if unpruned is None else unpruned.mean)


def _settings(search: BudgetSearch, grid: Grid, questions_sha256: str) -> dict[str, Any]:
    return {
        "questions": {"file": search.questions.name, "sha256": questions_sha256}, "grid": dataclasses.asdict(grid),
        "profiles": [{"file": path.name, "sha256": sha256_of(path)} for path in search.profiles],
        "auto_budgets": list(search.auto_budgets), "limit": search.limit, "seed": search.seed, "device": search.device,
        "dtype": search.dtype, "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
