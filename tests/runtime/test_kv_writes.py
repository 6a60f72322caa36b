"""Bundles of every form of the cache's write run on ONNX Runtime: the same answers, and the same caches."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.build import build_bundle
from export.configs import load_target_config
from export.plan import BuildOptions, make_plan
from runtime.engines.tensorrt_profiles import ProfileOptions, profiles_of
from runtime.errors import BundleError, UsageError
from runtime.manifest import read_manifest
from runtime.names import APPEND, IN_PLACE, MANIFEST_FILE, PAST, TENSOR_SCATTER
from runtime.pipeline import VisionLanguageModel, load

TARGETS = {IN_PLACE: "cpu", TENSOR_SCATTER: "rtx", APPEND: "jetson-orin"}
CONTEXT = 120  # not a multiple of 64


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint exported in fp32 with each form."""
    folder = tmp_path_factory.mktemp("forms")
    plan = make_plan(BuildOptions("llava15", checkpoint=str(tiny_checkpoint), keep=(4, 2), split_layer=2, max_context=CONTEXT))
    for form, target in TARGETS.items():
        build_bundle(dataclasses.replace(plan, target=load_target_config(target), precision="fp32"), folder / form)
    return {form: folder / form for form in TARGETS}


def scene(model: VisionLanguageModel) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)


@pytest.mark.parametrize("form", [TENSOR_SCATTER, APPEND])
def test_a_form_gives_the_logits_and_caches_of_another(form: str, bundles: dict[str, Path]) -> None:
    """Prefill, five decoding steps, and a second prompt on what a truncated conversation still holds."""
    rows = []
    for model in (load(bundles[IN_PLACE]), load(bundles[form])):
        pixels = model.prompts.build([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}], [scene(model)])
        conversation, logits = model.chain.prefill(pixels.ids.input_ids, pixels.ids.visual_mask, pixels.pixel_values, keep=4)
        steps = [logits, *(model.chain.decode(conversation, token) for token in range(10, 15))]
        conversation.truncate(conversation.next_position - 3)
        steps.append(model.chain.decode(conversation, 30))
        caches = [array for group in (conversation.pre, conversation.post) for i in group.layers for array in group.layer(i)]
        rows.append((steps, caches))
    for expected, actual in zip(*(steps + caches for steps, caches in rows), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)  # measured: 5e-06


def test_graphs_of_a_fixed_length_get_caches_of_it_and_the_context_stays_the_limit(bundles: dict[str, Path]) -> None:
    manifest = read_manifest(bundles[TENSOR_SCATTER])
    assert (manifest.kv_write, manifest.engine, manifest.schema_version) == (TENSOR_SCATTER, "tensorrt_rtx", 3)
    assert {t.shape[2] for t in manifest.graphs["pre_ecl"].inputs if t.name.startswith(PAST)} == {128}
    conversation = load(bundles[TENSOR_SCATTER]).chain.new_conversation(3, 3)
    assert (conversation.pre.capacity, conversation.post.capacity, conversation.pre.limit) == (128, 128, CONTEXT)
    assert load(bundles[IN_PLACE]).chain.new_conversation(3, 3).pre.capacity == 64
    assert read_manifest(bundles[APPEND]).kv_write == APPEND
    assert read_manifest(bundles[IN_PLACE]).schema_version == 2, "what older runtimes can run they are not refused"


def test_flops_are_the_same_however_the_cache_is_written(bundles: dict[str, Path]) -> None:
    flops = [read_manifest(bundle).flops for bundle in bundles.values()]
    assert flops[0] == flops[1] == flops[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"max_context": 1000}, "pre_ecl's caches have the length 128, and kv_write tensor_scatter with a context of 1000 means 1024"),
     ({"kv_write": "in_place"}, "pre_ecl's caches have the length 128, and kv_write in_place with a context of 120 means any"),
     ({"kv_write": "sideways"}, "unknown engine 'tensorrt_rtx' or kv_write 'sideways': export the bundle again, or upgrade"),
     ({"schema_version": 2}, "engine, kv_write and variants are entries of schema 3, the bundle has 2")],
)  # fmt: skip
def test_a_manifest_that_says_another_form_is_refused(
    change: dict[str, Any], message: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(bundles[TENSOR_SCATTER], tmp_path / "bundle"))
    raw = {**json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8")), **change}
    (bundle / MANIFEST_FILE).write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        load(bundle)


def test_profiles_of_a_fixed_length_take_no_other(bundles: dict[str, Path]) -> None:
    manifest = read_manifest(bundles[TENSOR_SCATTER])
    prefill = profiles_of(manifest, "pre_ecl", ProfileOptions())[0]
    assert not [name for name in prefill.shapes if name.startswith(PAST)], "nothing is left open in the caches"
    assert profiles_of(manifest, "pre_ecl", ProfileOptions(capacity=128))
    with pytest.raises(UsageError, match="a capacity of 64 tokens does not go with graphs whose caches are fixed at 128: leave it out"):
        profiles_of(manifest, "pre_ecl", ProfileOptions(capacity=64))
