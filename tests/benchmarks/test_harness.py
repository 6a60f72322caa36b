"""The command that runs lmms-eval for each budget: what it calls, what it makes of the results, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy.harness import PLUGIN, Scores, chosen_keeps, main, table
from tests.conftest import ROOT

# Stands in for `python -m lmms_eval`: notes how it was called, and writes results in the harness's form.
HARNESS = """
import json, os, pathlib, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
keep = dict(pair.split("=") for pair in arguments["--model_args"].split(","))["keep"]
folder = pathlib.Path(arguments["--output_path"])
folder.mkdir(parents=True, exist_ok=True)
call = {"argv": sys.argv[1:], "plugins": os.environ["LMMS_EVAL_PLUGINS"], "path": os.environ["PYTHONPATH"]}
(folder / "call.json").write_text(json.dumps(call))
print("harness output")
if arguments["--tasks"] != "broken":
    score = 0.8 if keep == "all" else 0.6
    results = {"pope": {"alias": "pope", "pope_accuracy,none": score, "pope_accuracy_stderr,none": 0.1, "submission,none": None}}
    throughput = {"avg_visual_tokens": 16.0, "avg_kept_tokens": 16.0 if keep == "all" else float(keep), "avg_ttft_ms_p50": 12.5}
    (folder / "20260101_results.json").write_text(json.dumps({"results": results, "throughput": throughput}))
"""


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a stand-in package `lmms_eval`, which both this process and its children find."""
    package = tmp_path / "site" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(HARNESS, encoding="utf-8")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return package.parent


def test_auto_is_run_where_the_bundle_offers_it_and_it_is_asked_for() -> None:
    assert chosen_keeps("all,auto,2", (4, 2), 16, auto=True) == ["all", "auto", "2"]
    assert chosen_keeps(None, (4, 2), 16, auto=True) == chosen_keeps(None, (4, 2), 16) == ["all", "4", "2"]


def run(bundle: Path, output: Path, *options: str, tasks: str = "pope") -> int:
    return main(["--bundle", str(bundle), "--tasks", tasks, "--output", str(output), *options])


def call(output: Path, keep: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / f"keep-{keep}" / "call.json").read_text(encoding="utf-8"))
    return found


def test_every_budget_is_run_and_compared_with_no_pruning(
    harness: Path, tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_bundle, tmp_path / "out", "--json") == 0
    out, err = capfd.readouterr()
    *lines, last = out.splitlines()
    assert [line.split() for line in lines] == [
        ["task", "metric", "keep", "all", "keep", "4", "keep", "2"],
        ["pope", "pope_accuracy", "0.8", "0.6", "(75.0", "%)", "0.6", "(75.0", "%)"],
        ["visual", "tokens", "16.0", "16.0", "16.0"],
        ["kept", "tokens", "16.0", "4.0", "2.0"],
        ["first", "token,", "ms,", "median", "12.5", "12.5", "12.5"],
    ]
    assert json.loads(last)["2"]["metrics"] == {"pope/pope_accuracy": 0.6}
    assert err.count("harness output") == 3, "the harness's own output belongs on stderr"


def test_the_call_names_the_plugin_the_model_arguments_and_the_users_options_last(harness: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    options = ("--keep", "2", "--style", "llava", "--cache-mb", "50", "--threads", "1", "--", "--limit", "8")
    assert run(tiny_bundle, tmp_path / "out", *options) == 0
    made = call(tmp_path / "out", "2")
    assert made["plugins"] == PLUGIN
    assert made["path"].split(os.pathsep) == [str(ROOT), str(harness)]
    assert made["argv"][:4] == [
        "--model", "entropy_prune", "--model_args", f"bundle={tiny_bundle},keep=2,style=llava,cache_mb=50,threads=1",
    ]  # fmt: skip
    assert made["argv"][-2:] == ["--limit", "8"]
    tasks = Path(made["argv"][made["argv"].index("--include_path") + 1])
    assert (tasks / "tiny_llava_heldout" / "tiny_llava_heldout.yaml").is_file()


def test_a_harness_that_ends_without_new_results_is_an_error(
    harness: Path, tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_bundle, tmp_path / "out", "--keep", "2") == 0
    assert run(tiny_bundle, tmp_path / "out", "--keep", "2", tasks="broken") == 2
    message = "lmms-eval ended without results for keep 2 (exit code 0): its last lines above say why"
    assert capfd.readouterr().err.splitlines()[-1].endswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep", "all,3"), "--keep: this bundle holds all, 4, 2, not 3: export it with that --keep"),
        (("--keep", "auto"), "--keep: this bundle holds all, 4, 2, not auto: export it with several budgets and --auto-keep"),
        (("--keep", "2,2"), "--keep is '2,2'; give each budget once"),
        (("--style", "vicuna"), "style is 'vicuna'; expected one of bundle, llava"),
        (("--cache-mb", "-1"), "cache_mb is -1; give a whole number from 0 on"),
    ],
)
def test_what_the_bundle_cannot_do_is_told_before_the_harness_starts(
    harness: Path, tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert run(tiny_bundle, tmp_path / "out", *options) == 2
    assert capfd.readouterr().err == f"python -m benchmarks.accuracy.harness: error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_is_missing_or_unspeakable_is_told(
    harness: Path, tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "nowhere is not a directory: name a bundle made by" in capfd.readouterr().err
    (tmp_path / "a,b").symlink_to(tiny_bundle)
    assert run(tmp_path / "a,b", tmp_path / "out") == 2
    assert "takes no path with a comma, quote or bracket: rename or link it" in capfd.readouterr().err


def test_without_lmms_eval_one_line_says_what_to_install(
    tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lmms_eval" else find_spec(name, *rest))
    assert run(tiny_bundle, tmp_path / "out") == 2
    assert "lmms-eval is not installed in this environment: pip install lmms-eval==" in capfd.readouterr().err


def test_the_table_leaves_gaps_where_a_run_has_no_such_metric() -> None:
    found = {"166": Scores({("mme", "score"): 1500.0}, {}), "29": Scores({("mme", "score,strict"): 0.0}, {"kept tokens": 29.0})}
    assert [line.split() for line in table(found).splitlines()] == [
        ["task", "metric", "keep", "166", "keep", "29"],
        ["mme", "score", "1500", "-"],
        ["mme", "score,strict", "-", "0"],
        ["kept", "tokens", "-", "29.0"],
    ]
