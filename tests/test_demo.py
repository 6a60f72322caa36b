"""`make calibrate-demo` on two images: it ends with plan, pictures and bundle, and leaves what is not its own alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.manifest import read_manifest
from tiny_llava import calibrate_demo


def test_it_ends_with_a_bundle_built_by_its_own_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "planning-notes.txt").write_text("mine")
    assert calibrate_demo.main(["--output", str(tmp_path), "--limit", "2"]) == 0
    manifest = read_manifest(tmp_path / "bundle")
    out = capsys.readouterr().out
    assert f"{manifest.score_mode}, split {manifest.split_layer}, keep {manifest.budgets[0]}" in out
    assert {"plan.json", "plan.png", "plan.budget.png", "kept.png", "planning-notes.txt"} <= {path.name for path in tmp_path.iterdir()}


def test_an_output_that_is_a_file_and_no_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for argv, message in (
        (["--output", str(tmp_path / "file")], "is a file: name a directory"),
        (["--limit", "0"], "--limit is 0: give 1 or more"),
    ):
        assert calibrate_demo.main(argv) == 2
        assert message in capsys.readouterr().err
