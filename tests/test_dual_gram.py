"""`python -m benchmarks.dual_gram`: both forms agree, the theory is stated, and the last line is JSON."""

from __future__ import annotations

import json

import pytest

from benchmarks import dual_gram


def test_the_benchmark_measures_both_forms_and_ends_with_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert dual_gram.main(["--tokens", "6", "--token-runs", "3", "--layer-runs", "0"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["model"], row["shape"]) for row in rows] == [("LLaVA-1.5-7B", [6, 32, 128]), ("Qwen2.5-VL-7B", [6, 28, 128])]
    assert [round(row["theory"], 1) for row in rows] == [64.0, 95.5]
    for row in rows:
        assert row["largest_entropy_difference"] < 1e-12
        assert row["whole"]["pairs"] == 3
        assert row["seconds"]["direct"]["eigenvalues"]["median"] < row["seconds"]["direct"]["whole"]["median"]


def test_sizes_that_cannot_be_measured_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert dual_gram.main(["--tokens", "1"]) == 2
    assert "--tokens must be 2 or more" in capsys.readouterr().err
