"""Time to first token from profiles: measured where a setting was profiled, scaled by FLOPs elsewhere, refused for another model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibration.cost import layer_flops
from calibration.first_token import FirstToken, FirstTokens, read_profiles
from calibration.grid import Setting
from export.plan import BuildOptions, make_plan
from export.spec import ModelSpec
from runtime import profile
from runtime.errors import StorageError, UsageError

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def spec(tiny_checkpoint: Path) -> ModelSpec:
    return make_plan(BuildOptions("llava15", checkpoint=str(tiny_checkpoint), keep=(4,), split_layer=2)).spec


@pytest.fixture(scope="module")
def taken(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of the shared tiny bundle, as the command writes it: split 2, keep 4, mode trace."""
    folder = tmp_path_factory.mktemp("profile")
    argv = ["--bundle", str(tiny_bundle), "--runs", "3", "--warmup", "0", "--max-new-tokens", "2", "--output", str(folder)]
    assert profile.main(argv) == 0
    return folder / "profile.json"


def read(taken: Path, spec: ModelSpec, *more: Path) -> FirstTokens:
    found = read_profiles([taken, *more], "llava15", spec)
    assert found is not None
    return found


def changed(taken: Path, target: Path, change: Change) -> Path:
    raw = copy.deepcopy(json.loads(taken.read_text()))
    change(raw)
    target.write_text(json.dumps(raw))
    return target


def test_a_profiled_setting_is_as_measured_and_keeping_all_too(taken: Path, spec: ModelSpec) -> None:
    raw = json.loads(taken.read_text())
    times = read(taken, spec)
    assert times.of(Setting("trace", 2, 4)) == FirstToken(raw["pruned"]["first_token"]["median_ms"], True)
    assert times.of(Setting("row", 1, 16)) == FirstToken(raw["dense"]["first_token"]["median_ms"], True)


def test_other_settings_scale_the_two_halves_alone(taken: Path, spec: ModelSpec) -> None:
    raw = json.loads(taken.read_text())
    stages, first, text = raw["pruned"]["stages"], raw["pruned"]["first_token"]["median_ms"], raw["subject"]["text_tokens"]
    times, decoder = read(taken, spec), spec.decoder
    pre, post = stages["pre_ecl"]["median_ms"], stages["post_ecl"]["median_ms"]
    factor = layer_flops(decoder, 8 + text) / layer_flops(decoder, 4 + text)
    expected = {
        ("trace", 2, 8): first + post * (factor - 1), ("trace", 1, 4): first - pre / 2 + post / 2, ("random", 2, 4): first,
    }  # fmt: skip
    for setting, ms in expected.items():
        found = times.of(Setting(*setting))
        assert found.ms == pytest.approx(ms)
        assert not found.measured


def test_the_nearest_of_several_profiles_is_scaled(taken: Path, spec: ModelSpec, tmp_path: Path) -> None:
    def other(raw: dict[str, Any]) -> None:
        raw["subject"]["keep"] = 12
        raw["pruned"]["first_token"]["median_ms"] = 1000.0

    times = read(taken, spec, changed(taken, tmp_path / "other.json", other))
    assert times.of(Setting("trace", 2, 12)) == FirstToken(1000.0, True)
    assert times.of(Setting("trace", 2, 11)).ms > 900
    assert times.of(Setting("trace", 2, 5)).ms < 900


def test_what_the_command_prints_with_json_serves_as_well(taken: Path, spec: ModelSpec, tmp_path: Path) -> None:
    printed = tmp_path / "printed.txt"
    printed.write_text("a table\n\nmore\n" + json.dumps(json.loads(taken.read_text())) + "\n")
    assert read(printed, spec) == read(taken, spec)
    assert read_profiles([], "llava15", spec) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda raw: raw["subject"].update(model="other"),
            r"p\.json is a profile of other \(4 layers, 16 visual tokens\), this is llava15",
        ),
        (lambda raw: raw["subject"].update(layers=5), r"profile of llava15 \(5 layers, 16 visual tokens\), this is llava15 \(4 layers"),
        (lambda raw: raw["subject"].update(visual_tokens=64), r"64 visual tokens\), this is llava15 .*: profile a bundle of this model"),
        (lambda raw: raw["comparison"].update(flops_dense=1e9), r"a decoder of 1e\+09 FLOP unpruned, this one has \S+: profile a bundle"),
        (lambda raw: raw["subject"].update(split_layer=4), "is of trace, split 4, keep 4, which this model does not have"),
        (lambda raw: raw["pruned"]["stages"].pop("pre_ecl"), r"p\.json is not a profile \(KeyError\('pre_ecl'\)\): give a profile\.json"),
        (lambda raw: raw["pruned"]["first_token"].update(median_ms=0), "holds times of 0 ms or less"),
    ],
)
def test_a_profile_of_something_else_is_refused(taken: Path, spec: ModelSpec, tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(changed(taken, tmp_path / "p.json", change), spec)


def test_profiles_of_two_machines_or_prompts_are_not_mixed(taken: Path, spec: ModelSpec, tmp_path: Path) -> None:
    other = changed(taken, tmp_path / "b.json", lambda raw: raw["machine"].update(cpu="another"))
    with pytest.raises(UsageError, match=r"b\.json was taken with cpu fp32, .* threads on another, .*: give profiles of one machine"):
        read(taken, spec, other)


def test_files_that_are_no_profiles_are_told(spec: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read --profile .*none\.json: No such file"):
        read(tmp_path / "none.json", spec)
    for data, message in (
        (b"\xff\xfe", "is not text"),
        (b"a table", "holds no JSON"),
        (b"[1]", "is not a profile"),
        (b"", "holds no JSON"),
    ):
        (tmp_path / "x.json").write_bytes(data)
        with pytest.raises(UsageError, match=message):
            read(tmp_path / "x.json", spec)
