"""The support table is what the code says, and the documentation holds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from export import support
from export.configs import load_target_config


def test_the_documentation_holds_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert support.main([]) == 0
    printed = capsys.readouterr().out
    page = (Path(support.__file__).parents[1] / "docs" / "support.md").read_text(encoding="utf-8")
    assert page.endswith(printed), "print it again: python -m export.support"


@pytest.mark.parametrize(
    ("target", "precision", "expected"),
    [
        ("rtx", "fp16", "built here"),
        ("jetson-agx-orin-64gb", "bf16", "parsed here, built on device"),
        ("cpu", "fp32", "runs as exported"),
        ("rtx", "fp8", "refused: the target has no fp8"),
        ("rtx", "int4", "refused: int4 is not implemented yet"),
    ],
)
def test_each_kind_of_cell(target: str, precision: str, expected: str) -> None:
    assert support.cell(load_target_config(target), precision) == expected
