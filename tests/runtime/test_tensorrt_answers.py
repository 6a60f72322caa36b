"""Whole bundles on every TensorRT library's recorded names, on a GPU of host memory: the answers are the CPU's."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import build
from runtime.engine_files import CompileOptions, compile_bundle
from runtime.engines.tensorrt_builder import BuiltEngine, EngineSpec
from runtime.engines.tensorrt_profiles import ProfileOptions
from runtime.manifest import read_manifest
from runtime.pipeline import VisionLanguageModel, load
from tests.runtime import fake_tensorrt_runtime as fake
from tests.runtime.fake_cuda import FakeGpu
from tests.runtime.fake_tensorrt import recorded

IMAGE_AND_TEXT: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "read row 2."}]}]


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)


def answers(model: VisionLanguageModel) -> list[tuple[Any, ...]]:
    """Pruned and unpruned, the same again, a text alone, and a question about a state."""
    options: dict[str, Any] = {"max_new_tokens": 9, "eos_token_ids": ()}
    results = [model.generate(IMAGE_AND_TEXT, [picture(s)], keep=keep, **options) for s, keep in ((0, None), (1, "all"), (0, None))]
    results.append(model.generate("how many digits?", **options))
    state = model.prefill([{"role": "user", "content": [{"type": "image"}]}], [picture(2)])
    results += [model.generate(question, state=state, **options) for question in ("one?", "two, and a little longer?")]
    return [(r.token_ids, r.kept_indices) for r in results]


def compiled(source: Path, folder: Path, key: str) -> Path:
    """A copy of the bundle with engines of the library `key` ("library version")."""
    library, version = key.split()
    shutil.copytree(source, folder)

    def built(spec: EngineSpec) -> BuiltEngine:
        engine = fake.build(spec)
        return dataclasses.replace(engine, info=dataclasses.replace(engine.info, library_version=version))

    capabilities = () if library == "tensorrt" else (86, 89)
    compile_bundle(folder, CompileOptions(library, capabilities, ProfileOptions(text_tokens=12)), build=built)
    return folder


def compare(source: Path, bundle: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    library = key.split()[0]
    expected = answers(load(source, backend="cpu"))
    gpu = FakeGpu()
    gpu.install(monkeypatch)
    monkeypatch.setitem(sys.modules, library, fake.running_library(key, gpu))
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundle.parent / "cache"))
    model = load(bundle, backend=library)
    assert model.backend == library
    assert answers(model) == expected
    assert load(bundle).backend == library, "and it is what auto takes"
    model.close()
    del model
    gc.collect()
    return gpu


@pytest.mark.parametrize("key", recorded())
def test_a_bundle_answers_as_on_the_cpu(key: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = compare(tiny_bundle, compiled(tiny_bundle, tmp_path / "bundle", key), key, monkeypatch)
    launches = next(count for name, count in gpu.calls.items() if name == "cuGraphLaunch")
    assert launches > 30, "decode steps are replayed"


@pytest.mark.parametrize(("target", "form", "key"), [("jetson-orin", "append", "10.3"), ("rtx", "tensor_scatter", "tensorrt_rtx")])
def test_each_form_of_the_caches_write_answers_as_on_the_cpu(
    target: str, form: str, key: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = next(name for name in recorded() if key in name)
    monkeypatch.setattr(build, "compile_engines", lambda *_, **__: 0)  # real ones cannot run here
    argv = ["--model", "llava15", "--checkpoint", str(tiny_checkpoint), "--target", target, "--keep", "4", "--split-layer", "2"]
    source = tmp_path / "source"
    assert build.main([*argv, "--max-context", "256", "--precision", "fp16", "--output", str(source)]) == 0
    assert read_manifest(source).kv_write == form
    compare(source, compiled(source, tmp_path / "bundle", found), found, monkeypatch)
