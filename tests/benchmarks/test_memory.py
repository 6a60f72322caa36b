"""The commands behind the memory plan's constants: what an export and a loaded bundle take, and what is said without TensorRT."""

from __future__ import annotations

import importlib
import sys

import pytest

from benchmarks import build_memory, engine_memory


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_an_exports_peak_and_a_loaded_bundle_are_measured() -> None:
    result = build_memory.measure(hidden=512, layers=3, vocab=4096)
    assert result["largest_tensor_bytes"] == 4 * 4096 * 512
    assert result["export_peak_bytes"] > result["export_process_bytes"] > 20e6
    assert 0 < result["export_factor"] < 20  # megabytes only: the process itself still grows
    assert result["loaded_private_bytes"] > result["weights_bytes"] / 2
    assert 20e6 < result["runtime_process_bytes"] < 128 << 20  # what the plan assumes a process to be


def test_without_tensorrt_the_command_says_what_to_install(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert engine_memory.main([]) == 2
    assert "TensorRT for RTX is not installed: pip install tensorrt-rtx-cu13==1.7.1.116" in capsys.readouterr().err
