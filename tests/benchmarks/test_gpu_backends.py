"""On a machine with a GPU: every backend that runs there keeps, computes and says what the CPU chain does, on the shipped model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import bundles, environment, parity
from benchmarks.gpu.settings import GPU_BACKENDS, Settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("gpu")
    return Settings(folder, folder / "work", folder)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_backend_agrees_with_the_cpu_chain(backend: str, precision: str, settings: Settings) -> None:
    tried = environment.try_backend(settings, backend)
    if not tried["runs"]:
        pytest.skip(f"{backend} does not run here: {tried['reason']}")
    bundle: Path = bundles.tiny_bundle(settings, precision)
    if backend.startswith("tensorrt"):
        bundles.compile_engines(settings, bundle, backend)
    found = parity.compare(bundle, backend, settings.device_index, parity.heldout_images(8))
    assert found["mean_overlap"] >= found["least_overlap"]
    assert found["largest_logits_error"] <= found["tolerance"]
    assert found["same_answers"] == found["comparable_answers"] > 0
