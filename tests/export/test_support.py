"""The support table: what it refuses a build refuses, what it calls built a record holds, and the document is what the command prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from export import build, support
from export.configs import list_targets, load_target_config
from export.spec import GRAPH_DTYPES
from tests.conftest import ROOT

RECORD, DOCUMENT = ROOT / support.RECORD, ROOT / "docs" / "support.md"


def recorded() -> dict[str, Any]:
    return support.read_record(RECORD)


def test_the_document_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """After a change of what is refused: python -m export.support --build --output docs/support.md"""
    assert support.main(["--record", str(RECORD)]) == 0
    assert capsys.readouterr().out == DOCUMENT.read_text(encoding="utf-8")


def test_every_target_and_precision_has_a_row() -> None:
    targets = [load_target_config(name) for name in list_targets() if load_target_config(name).name == name]
    expected = {(target.name, precision) for target in targets for precision in target.precisions}
    assert {(row.target, row.precision) for row in support.rows(recorded())} == expected


def test_what_is_refused_is_what_a_build_refuses() -> None:
    for plan, row in zip(support.plans(), support.rows({}), strict=True):
        found = build.obstacles(plan)
        assert (row.reason is None) == (not found)
        assert row.reason is None or found[0].startswith(row.reason)
        assert (row.reason is None) == (row.precision in GRAPH_DTYPES)
        assert row.cells == (() if found else ("not tried yet",) * 4)


def test_nothing_is_called_built_that_the_record_does_not_hold() -> None:
    record = recorded()
    words = {row.target: row.cells for row in support.rows(record) if row.precision == "fp16" and row.reason is None}
    assert words["rtx"] == (support.BUILT,) * 4
    assert words["jetson-orin-nano-8gb"] == (support.PARSED,) * 4
    del record["built"]["rtx fp16"]["score"]
    record["built"]["rtx fp16"]["post_ecl"] = {"failed": "the operator Foo is not supported"}
    (row,) = [row for row in support.rows(record) if (row.target, row.precision) == ("rtx", "fp16")]
    assert row.cells == (support.BUILT, support.BUILT, "not tried yet", "failed: the operator Foo is not supported")


def test_one_target_is_built_and_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux and Windows on x86-64 only")
    wanted = {("cpu", "fp32"), ("rtx-40", "bf16"), ("rtx-40", "int4")}
    chosen = [plan for plan in support.plans() if (plan.target.name, plan.precision) in wanted]
    monkeypatch.setattr(support, "plans", lambda: iter(chosen))
    record, output = tmp_path / "record.json", tmp_path / "support.md"
    assert support.main(["--build", "--record", str(record), "--output", str(output)]) == 0
    found = json.loads(record.read_text(encoding="utf-8"))["built"]
    assert set(found) == {"cpu fp32", "rtx-40 bf16"}
    assert set(found["cpu fp32"]) == set(found["rtx-40 bf16"]) == set(support.GRAPHS)
    assert found["rtx-40 bf16"]["post_ecl"]["engine_bytes"] > 1e6
    assert found["rtx-40 bf16"]["post_ecl"]["attention_kernels"] == [10, 10, 10]
    text = output.read_text(encoding="utf-8")
    assert "| cpu | fp32 | exported here | exported here | exported here | exported here |" in text
    assert "| rtx-40 | bf16 | built here | built here | built here | built here |" in text
    assert "| rtx-40 | int4 | refused: building int4 is not implemented yet | | | |" in text
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["{", "[]", '{"built": 3}'])
def test_a_record_that_is_none_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    assert support.main(["--record", str(tmp_path / "r.json")]) == 2
    assert "r.json is not a record of builds" in capsys.readouterr().err
    assert support.main(["--record", str(tmp_path / "none.json")]) == 0
    assert "a record of no date" in capsys.readouterr().out
