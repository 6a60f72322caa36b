"""`export.build --target` for devices with TensorRT: RTX engines are built here, a Jetson's bundle names the next command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export import build
from runtime.errors import EngineError
from runtime.inspection import MemoryNeed
from runtime.manifest import check_files, read_manifest
from runtime.names import REPORT_FILE
from tests.site import Site


def test_an_rtx_target_ends_with_engines_of_all_graphs_in_the_manifest(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux and Windows on x86-64 only")
    output = site.folder / "rtx"
    argv = ["--model", "llava15", "--checkpoint", str(site.checkpoint), "--target", "rtx-40", "--keep", "4", "--split-layer", "2"]
    assert build.main([*argv, "--max-context", "512", "--output", str(output)]) == 0
    manifest = read_manifest(output)
    check_files(output, manifest)
    assert (manifest.target, manifest.precision) == ("rtx-40", "fp16")
    assert {engine.graph for engine in manifest.engines} == set(manifest.graphs)
    assert {engine.capabilities for engine in manifest.engines} == {(89,)}
    report, g = json.loads((output / REPORT_FILE).read_text()), manifest.geometry
    assert report["kv_bytes_per_token"]["pre_ecl"] == 2 * 2 * g.kv_heads * g.head_size * 2, "two layers, keys and values, fp16"
    assert MemoryNeed.of(manifest, None).kv_pre_bytes == 512 * report["kv_bytes_per_token"]["pre_ecl"]
    assert "tensorrt_rtx 1." in capfd.readouterr().out


def test_a_jetson_target_ends_with_a_bundle_and_the_next_command(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    output = site.folder / "orin"
    argv = ["--model", "llava15", "--checkpoint", str(site.checkpoint), "--target", "jetson-orin", "--keep", "4", "--split-layer", "2"]
    assert build.main([*argv, "--max-context", "512", "--output", str(output)]) == 0
    assert read_manifest(output).precision == "fp16"
    assert not read_manifest(output).engines
    assert f"copy {output} there, then run\n  python3 -m runtime.compile orin\n" in capfd.readouterr().out


def test_without_the_library_nothing_is_written(site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> None:
        raise EngineError(f"{name} is not installed: pip install tensorrt-rtx-cu13")

    monkeypatch.setattr("runtime.engines.tensorrt_library.load_library", missing)
    output = site.folder / "rtx"
    argv = ["--model", "llava15", "--checkpoint", str(site.checkpoint), "--target", "rtx", "--keep", "4", "--split-layer", "2"]
    assert build.main([*argv, "--max-context", "512", "--output", str(output)]) == 2
    assert "tensorrt_rtx is not installed" in capfd.readouterr().err
    assert not Path(output).exists()


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [("rtx", "int4", "building int4 is not implemented yet: choose --precision fp32, fp16, bf16")],
)
def test_what_is_not_implemented_is_refused(
    target: str, precision: str, message: str, site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    import re

    output = site.folder / "refused"
    argv = ["--model", "llava15", "--checkpoint", str(site.checkpoint), "--target", target, "--precision", precision, "--keep", "4"]
    assert build.main([*argv, "--split-layer", "2", "--max-context", "512", "--output", str(output)]) == 2
    assert re.search(message, capfd.readouterr().err)
    assert not output.exists()
