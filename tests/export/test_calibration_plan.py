"""plan.json: read, written and refused; and what `export.build --plan` takes from it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export import build
from export.calibration_plan import CalibrationPlan, PlanGeometry
from export.checkpoint import Checkpoint
from runtime.errors import StorageError, UsageError
from runtime.manifest import Source, read_manifest, sha256_of
from runtime.names import REPORT_FILE
from tests.models import tiny_llava_checkpoint
from tests.site import Refused, Site

GEOMETRY = PlanGeometry(layers=4, hidden_size=64, query_heads=4, kv_heads=4, head_size=16, visual_tokens=16)


def plan_for(checkpoint: Path, **changes: Any) -> CalibrationPlan:
    source = Source(checkpoint.name, Checkpoint.open(checkpoint).revision)
    plan = CalibrationPlan(1, "0.1.0", "2026-01-01T00:00:00+00:00", "llava15", "llava15", source, GEOMETRY, split_layer=3)
    return dataclasses.replace(plan, **changes)


@pytest.fixture
def plan(site: Site) -> CalibrationPlan:
    return plan_for(site.checkpoint, budgets=(6, 3), score_mode="row", auto_keep=0.9, evidence={"collapse": {"mean": [0.5, 0.25]}})


def written(site: Site, plan: CalibrationPlan) -> str:
    plan.write(site.folder / "plan.json")
    return str(site.folder / "plan.json")


# ---------------------------------------------------------------- the file


def test_a_plan_reads_as_it_was_written(site: Site, plan: CalibrationPlan) -> None:
    bare = plan_for(site.checkpoint)
    for one in (plan, bare):
        assert CalibrationPlan.read(Path(written(site, one))) == one
    assert json.loads(bare.to_json())["budgets"] is None


def test_a_plan_that_cannot_be_written_leaves_the_earlier_one(site: Site, plan: CalibrationPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(written(site, plan))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"cannot write .*plan\.json: No space left on device"):
        plan_for(site.checkpoint).write(path)
    assert path.read_bytes() == before
    assert not list(site.folder.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split_layer": 4}, "--split-layer 4 is out of range: the decoder has 4 layers"),
        ({"budgets": (17,)}, "--keep 17 is out of range: an image has 16 visual tokens"),
        ({"budgets": ()}, "budgets are an empty list"),
        ({"score_mode": "entropy"}, "unknown score_mode 'entropy', expected one of trace, row, raw"),
        ({"auto_keep": 1.5}, "auto_keep is 1.5, expected a share above 0 and up to 1"),
        ({"geometry": dataclasses.replace(GEOMETRY, kv_heads=0)}, "the plan's geometry has an entry below 1"),
    ],
)
def test_decisions_that_fit_no_model_are_refused(plan: CalibrationPlan, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(plan, **changes)


def change(**entries: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | entries)


def without(name: str) -> Callable[[str], str]:
    return lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != name})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-40], r"plan\.json is not valid JSON .*: copy the plan again, or calibrate again"),
        (lambda _: "", "is not valid JSON"),
        (lambda _: "[" * 100_000, "is not valid JSON"),
        (lambda _: "[1]", r"is not a plan \(it is no JSON object with a schema_version\)"),
        (lambda _: '{"model": "x"}', "is not a plan"),
        (change(schema_version=2), "has schema 2, this version reads 1: calibrate again, with python -m calibration.ecl"),
        (change(schema_version="1"), "has schema '1'"),
        (change(schema_version=True), "schema_version = True has the wrong type"),
        (change(surprise=1), "unknown entry surprise"),
        (without("source"), "missing entry source"),
        (change(split_layer="3"), "split_layer = '3' has the wrong type; expected int"),
        (change(split_layer=9), r"plan\.json: --split-layer 9 is out of range"),
        (change(budgets=4), "budgets = 4 has the wrong type"),
        (change(budgets=[4.5]), "budgets = 4.5 has the wrong type"),
        (change(budgets=[0]), "--keep 0 is out of range"),
        (change(evidence=[1]), r"evidence is \[1\], expected an object"),
        (change(geometry={"layers": 4}), "geometry: missing entry hidden_size"),
        (change(auto_keep=float("nan")), "auto_keep is nan"),
    ],
)
def test_a_file_that_is_no_plan_of_this_version_is_refused(
    site: Site, plan: CalibrationPlan, refused: Refused, damage: Callable[[str], str], message: str
) -> None:
    path = Path(written(site, plan))
    path.write_text(damage(path.read_text()))
    told = refused(build, site.build("--plan", str(path)), message)
    assert told.before == []
    assert "plan.json" in told.error


def test_a_plan_that_is_missing_or_a_directory_is_told(site: Site, refused: Refused) -> None:
    refused(build, site.build("--plan", str(site.folder / "no.json")), r"there is no plan .*no\.json: check the path, or make one with")
    refused(build, site.build("--plan", str(site.folder)), "there is no plan ")


# ---------------------------------------------------------------- what it is for


def test_a_plan_for_another_model_geometry_or_weights_names_both(
    site: Site, plan: CalibrationPlan, refused: Refused, tmp_path: Path
) -> None:
    path = written(site, plan)
    assert build.main(site.build("--plan", path, "--dry-run")) == 0
    tiny = ["--model", "tiny-llava", "--checkpoint", str(site.checkpoint), "--plan", path]
    refused(build, tiny, r"the plan is for model llava15 \(family llava15\), this is tiny-llava \(family llava15\)")
    narrow = tiny_llava_checkpoint(tmp_path / "narrow", hidden=32, heads=4, image_size=56)
    message = (
        r"for 4 layers of 64, 4 query and 4 key-value heads of 16, 16 visual tokens; the checkpoint narrow has 4 layers of 32, 4 query"
    )
    refused(build, ["--model", "llava15", "--checkpoint", str(narrow), "--plan", path], message)
    other = tiny_llava_checkpoint(tmp_path / "other", seed=5, image_size=56)
    message = (
        r"the plan is for the weights of checkpoint \(revision [0-9a-f]{12}\), the checkpoint other has others \(revision [0-9a-f]{12}\)"
    )
    refused(build, ["--model", "llava15", "--checkpoint", str(other), "--plan", path], message)


# ---------------------------------------------------------------- what a build takes from it


def test_a_build_takes_layer_budgets_and_score_from_the_plan_and_records_it(site: Site, plan: CalibrationPlan) -> None:
    path = written(site, plan)
    assert build.main(site.build("--plan", path, output="planned")) == 0
    manifest = read_manifest(site.folder / "planned")
    assert (manifest.split_layer, manifest.budgets, manifest.score_mode) == (3, (6, 3), "row")
    report = json.loads((site.folder / "planned" / REPORT_FILE).read_text())
    assert report["plan"] == {"file": "plan.json", "sha256": sha256_of(Path(path))}
    assert "plan" not in json.loads((site.bundle / REPORT_FILE).read_text())


@pytest.mark.parametrize(
    ("more", "chosen_by", "split"),
    [
        ([], "split: plan.json; budgets: plan.json; score: plan.json", 3),
        (["--split-layer", "1"], "split: --split-layer; budgets: plan.json; score: plan.json", 1),
        (["--keep", "4"], "split: plan.json; budgets: --keep; score: plan.json", 3),
        (["--keep-percent", "50"], "split: plan.json; budgets: --keep-percent; score: plan.json", 3),
        (["--avg-keep", "14"], "split: plan.json; budgets: --avg-keep; score: plan.json", 3),
        (["--score-mode", "raw"], "split: plan.json; budgets: plan.json; score: --score-mode", 3),
    ],
)
def test_options_go_before_the_plan_and_a_dry_run_says_where_each_value_comes_from(
    site: Site, plan: CalibrationPlan, capfd: pytest.CaptureFixture[str], more: list[str], chosen_by: str, split: int
) -> None:
    assert build.main(site.build("--plan", written(site, plan), "--dry-run", *more)) == 0
    error = capfd.readouterr().err
    assert f"chosen by   {chosen_by}\n" in error
    assert f"layers 0..{split - 1} see every token" in error
    keep = {"--keep": "keep 4 of 16", "--keep-percent": "keep 8 of 16", "--avg-keep": "keep 8 of 16"}.get(
        more[0] if more else "", "keep 6 of"
    )
    assert keep in error
    assert ("score: raw" if "raw" in more else "score: row") in error


def test_a_plan_without_budgets_leaves_them_to_the_model(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    path = written(site, plan_for(site.checkpoint, split_layer=1))
    assert build.main(site.build("--plan", path, "--dry-run")) == 0
    assert (
        "chosen by   split: plan.json; budgets: configs/models/llava15.toml; score: configs/models/llava15.toml\n" in capfd.readouterr().err
    )
