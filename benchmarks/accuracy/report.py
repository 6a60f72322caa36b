"""What the evaluation found, as tables in Markdown: accuracy by setting, at equal cost, by question type, and at the paper's saving."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.accuracy.evaluation import UNPRUNED, Outcomes
from benchmarks.accuracy.settings import AVERAGE_SHARES, Setting, average_keeps, equal_cost, keeps
from benchmarks.accuracy.statistics import ImageBootstrap, Share
from calibration import cost
from calibration.selection import TENSORS
from export.exact_score import ENTROPY_MODES
from export.spec import DecoderSpec

MAIN = ("trace", "row", "raw", "dpp", "energy-high", "energy-low", "uniform", "random")
CONTROLS = ("energy-high", "energy-low", "uniform", "random")
ROUNDING = 1e-9  # a difference of 0 is 0 only up to rounding
GOAL_SAVED, GOAL_RETAINED = 0.682, 0.96  # EntropyPrune's abstract: 68.2 % fewer FLOPs at 96.0 % of the accuracy


@dataclass(frozen=True, eq=False)
class Evidence:
    """Outcomes with what is needed to put costs and intervals beside them; `neighbour_split` is where FastV prunes."""

    outcomes: Outcomes
    decoder: DecoderSpec
    visual_tokens: int
    neighbour_split: int
    extra_keeps: tuple[int, ...]

    @functools.cached_property
    def bootstrap(self) -> ImageBootstrap:
        return ImageBootstrap(self.outcomes.images)

    def right(self, method: str, split: int, keep: int) -> np.ndarray:
        """bool [seeds, questions]."""
        found = [s for s in self.outcomes.settings if (s.method, s.split_layer, s.keep) == (method, split, keep)]
        return np.stack([self.outcomes.of(s) for s in found])

    def accuracy(self, method: str, split: int, keep: int) -> Share:
        return self.bootstrap.share(self.right(method, split, keep))

    def retained(self, method: str, split: int, keep: int) -> Share:
        """Accuracy over the unpruned accuracy, paired."""
        return self.bootstrap.ratio(self.right(method, split, keep), self.outcomes.of(UNPRUNED))

    def flops_share(self, split: int, keep: int, text_tokens: int = 0) -> float:
        return cost.flops_share(self.decoder, visual_tokens=self.visual_tokens, keep=keep, split_layer=split, text_tokens=text_tokens)

    def budgets(self, split: int) -> tuple[int, ...]:
        return tuple(sorted({s.keep for s in self.outcomes.settings if s.split_layer == split and s.method == "trace"}, reverse=True))


def markdown(evidence: Evidence) -> str:
    """All tables."""
    out = evidence.outcomes
    unpruned = evidence.bootstrap.share(out.of(UNPRUNED))
    images = len(set(out.images.tolist()))
    parts = [
        f"{len(out.images)} held-out questions about {images} images; unpruned {unpruned.percent()} % right. Exact answers in percent; "
        f"intervals at 95 % by bootstrap over images; `random` is the mean of its seeds. K: the split layer. Keep: visual tokens of "
        f"{evidence.visual_tokens} kept after it.",
        *_goal(evidence), *_beside_controls(evidence), *_by_split(evidence),
        *_tensors(evidence), *_averages(evidence), *_neighbours(evidence), *_kinds(evidence),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _goal(e: Evidence) -> Iterator[str]:
    yield f"## At {GOAL_SAVED:.1%} fewer FLOPs"
    text = round(e.outcomes.text_tokens)
    rows = []
    for split in e.outcomes.splits:
        fitting = [k for k in e.budgets(split) if e.flops_share(split, k) <= 1 - GOAL_SAVED]
        if not fitting:
            rows.append([f"K = {split}", "-", "not feasible", "", *("-" for _ in MAIN)])
            continue
        keep = max(fitting)
        saved = [f"{1 - e.flops_share(split, keep, t):.1%}" for t in (0, text)]
        rows.append([f"K = {split}", str(keep), *saved, *(f"{100 * e.retained(m, split, keep).mean:.1f}" for m in MAIN)])
    yield table(["", "keep", "fewer FLOPs, visual tokens", f"with {text} text tokens", *MAIN], rows)
    fitting_all = [(s, k) for s in e.outcomes.splits for k in e.budgets(s) if e.flops_share(s, k) <= 1 - GOAL_SAVED]
    if not fitting_all:
        yield "No split that was tried can save as much."
        return
    best = max(((e.retained(m, s, k), m, s, k) for m in MAIN for s, k in fitting_all), key=lambda row: row[0].mean)
    share, method, split, keep = best
    verdict = "reaches" if share.mean >= GOAL_RETAINED else "does not reach"
    yield (
        f"Accuracy retained, percent of the unpruned accuracy; decoder prefill alone, vision tower and head left out as the paper counts. "
        f"Best: `{method}` at K = {split}, keep {keep}: {share.percent()} %, which {verdict} the paper's {GOAL_RETAINED:.0%}."
    )


def _beside_controls(e: Evidence) -> Iterator[str]:
    yield "## Beside the controls"
    settings = [(split, keep) for split in e.outcomes.splits for keep in e.budgets(split)]
    entropies = [mode if tensor == "query" else f"{mode} of {tensor}s" for mode in ENTROPY_MODES for tensor in TENSORS]
    rows = []
    for method in ("dpp", *entropies, *CONTROLS[:-1]):
        cells = []
        for control in CONTROLS:
            found = [e.bootstrap.difference(e.right(method, *s), e.right(control, *s)) for s in settings]
            above, below = sum(d.low > ROUNDING for d in found), sum(d.high < -ROUNDING for d in found)
            cells.append("" if method == control else f"{above} / {below}")
        rows.append([f"`{method}`", *cells])
    yield table(["", *(f"`{c}`: above / below" for c in CONTROLS)], rows)
    yield f"At how many of {len(settings)} splits and budgets the whole 95 % interval of the paired difference lies above or below 0."


def _by_split(e: Evidence) -> Iterator[str]:
    yield "## By split and budget"
    wanted = keeps(e.visual_tokens)
    for split in e.outcomes.splits:
        header = [f"K = {split}", *(f"keep {k} ({1 - e.flops_share(split, k):.0%} fewer FLOPs)" for k in wanted)]
        yield table(header, [[f"`{m}`", *(e.accuracy(m, split, k).percent() for k in wanted)] for m in MAIN])


def _tensors(e: Evidence) -> Iterator[str]:
    yield "## Entropy of queries, keys, values, hidden states"
    wanted = [k for k in keeps(e.visual_tokens) if k >= e.visual_tokens * 0.1][1:]
    header = ["mode, tensor", *(f"K = {s}, keep {k}" for s in e.outcomes.splits for k in wanted)]
    rows = []
    for mode in ENTROPY_MODES:
        for tensor in TENSORS:
            name = mode if tensor == "query" else f"{mode} of {tensor}s"
            cells = [f"{100 * e.right(name, s, k).mean():.1f}" for s in e.outcomes.splits for k in wanted]
            rows.append([f"`{mode}`, {tensor}", *cells])
    for control in ("random", "dpp"):
        rows.append([f"`{control}`", *(f"{100 * e.right(control, s, k).mean():.1f}" for s in e.outcomes.splits for k in wanted)])
    yield table(header, rows)


def _averages(e: Evidence) -> Iterator[str]:
    yield "## The paper's averages over layers"
    rows = []
    for split in e.outcomes.splits:
        counts = average_keeps(e.visual_tokens, e.decoder.layers, split)
        for method in ("trace", "dpp", "random"):
            cells = ["-" if k is None else f"{e.accuracy(method, split, k).percent()}; keep {k}" for k in counts]
            rows.append([f"K = {split}, `{method}`", *cells])
    yield table(["", *(f"average {share:.1%} of N" for share in AVERAGE_SHARES)], rows)
    yield "A dash: an average share a needs more than K / a layers."


def _neighbours(e: Evidence) -> Iterator[str]:
    split = e.neighbour_split
    yield f"## Neighbours at equal decoder FLOPs (visual tokens; the others' K = {split})"
    pairs = list(equal_cost(e.visual_tokens, e.decoder.layers, split, e.extra_keeps))
    rows = []
    for method in ("trace", "row", "dpp", "random", "fastv"):
        rows.append([f"`{method}`, K = {split}", *(e.accuracy(method, split, keep).percent() for keep, _ in pairs)])
    for method in ("divprune", "cdpruner"):
        rows.append([f"`{method}`, before layer 0", *(f"{e.accuracy(method, 0, early).percent()}; keep {early}" for _, early in pairs)])
    yield table(["", *(f"keep {keep}" for keep, _ in pairs)], rows)


def _kinds(e: Evidence) -> Iterator[str]:
    split, keep = e.neighbour_split, keeps(e.visual_tokens)[2]
    yield f"## By type of question (K = {split}, keep {keep})"
    kinds = np.array(e.outcomes.kinds)
    early = dict(equal_cost(e.visual_tokens, e.decoder.layers, split, e.extra_keeps))[keep]
    columns = [(m, split, keep) for m in (*MAIN, "fastv")] + [("divprune", 0, early), ("cdpruner", 0, early)]
    rows = []
    for kind in dict.fromkeys(e.outcomes.kinds):
        mine = kinds == kind
        bootstrap = ImageBootstrap(e.outcomes.images[mine])
        unpruned = bootstrap.share(e.outcomes.of(UNPRUNED)[mine])
        rows.append([kind, str(int(mine.sum())), unpruned.percent(), *(bootstrap.share(e.right(*c)[:, mine]).percent() for c in columns)])
    yield table(["type", "questions", "unpruned", *(f"`{m}`" for m, _, _ in columns)], rows)


def as_data(e: Evidence) -> list[dict[str, object]]:
    """One object a setting: accuracy and share of the FLOPs, for JSON."""
    rows: list[dict[str, object]] = []
    text = round(e.outcomes.text_tokens)
    for setting in dict.fromkeys(Setting(s.method, s.split_layer, s.keep) for s in e.outcomes.settings):
        keep = setting.keep or e.visual_tokens
        share = e.bootstrap.share(e.right(setting.method, setting.split_layer, setting.keep))
        rows.append({
            "method": setting.method, "split_layer": setting.split_layer, "keep": keep, "accuracy": round(share.mean, 5),
            "low": round(share.low, 5), "high": round(share.high, 5),
            "flops_share_visual": round(e.flops_share(setting.split_layer, keep), 5),
            "flops_share_with_text": round(e.flops_share(setting.split_layer, keep, text), 5),
        })  # fmt: skip
    return rows
