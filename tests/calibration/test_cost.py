"""A setting's cost from the geometry equals what is counted in exported graphs."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.cost import average_keep, flops_share, keep_for_share, kv_bytes, prefill_flops
from export.build import build_bundle
from export.plan import BuildOptions, make_plan
from export.report import make_report
from runtime.errors import UsageError
from runtime.flops import COUNTED_TEXT_TOKENS, decoder_flops
from runtime.manifest import read_manifest
from tests.models import tiny_llava_checkpoint


def test_flops_are_those_of_the_shared_tiny_bundle(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    manifest, flops = read_manifest(tiny_bundle), read_manifest(tiny_bundle).flops
    spec = make_plan(BuildOptions("llava15", checkpoint=str(tiny_checkpoint), keep=(4, 2), split_layer=2)).spec.decoder
    for keep in (4, 2):
        counted = flops["pre_ecl"] + flops[f"post_ecl.{keep}"]
        assert prefill_flops(spec, visual_tokens=16, keep=keep, split_layer=2, text_tokens=COUNTED_TEXT_TOKENS) == counted
        for text in (0, 5, 60):
            rest = flops[f"score.{keep}"] + flops["head"]
            own = prefill_flops(spec, visual_tokens=16, keep=keep, split_layer=2, text_tokens=text)
            assert decoder_flops(manifest, keep, text) - rest == pytest.approx(own, rel=1e-12)
    assert prefill_flops(spec, visual_tokens=16, keep=16, split_layer=1, text_tokens=32) == flops["pre_ecl"] + flops["post_ecl"]


def test_flops_bytes_and_averages_of_grouped_heads_are_those_of_a_bundle(tmp_path: Path) -> None:
    checkpoint = tiny_llava_checkpoint(tmp_path / "c", hidden=64, heads=8, kv_heads=2, head_dim=12, intermediate=160, image_size=42)
    plan = make_plan(BuildOptions("llava15", checkpoint=str(checkpoint), keep=(4,), split_layer=1))
    manifest = build_bundle(plan, tmp_path / "b")
    (budget,) = make_report(plan, manifest)["budgets"]
    n, spec = plan.visual_tokens, plan.spec.decoder
    counted = manifest.flops["pre_ecl"] + manifest.flops["post_ecl.4"]
    assert prefill_flops(spec, visual_tokens=n, keep=4, split_layer=1, text_tokens=32) == counted
    assert flops_share(spec, visual_tokens=n, keep=4, split_layer=1, text_tokens=32) == counted / (
        manifest.flops["pre_ecl"] + manifest.flops["post_ecl"]
    )
    assert kv_bytes(spec, visual_tokens=n, keep=4, split_layer=1) == sum(budget["kv_bytes_of_one_image"].values())
    assert average_keep(spec, visual_tokens=n, keep=4, split_layer=1) == budget["average_keep"]


def test_a_share_of_the_flops_gives_the_largest_budget_within_it(tiny_checkpoint: Path) -> None:
    spec = make_plan(BuildOptions("llava15", checkpoint=str(tiny_checkpoint), keep=(4,), split_layer=2)).spec.decoder

    def share(keep: int) -> float:
        return flops_share(spec, visual_tokens=16, keep=keep, split_layer=2, text_tokens=8)

    for keep in (1, 7, 16):
        assert keep_for_share(spec, share(keep), visual_tokens=16, split_layer=2, text_tokens=8) == keep
    assert keep_for_share(spec, share(1) - 1e-9, visual_tokens=16, split_layer=2, text_tokens=8) is None
    with pytest.raises(UsageError, match=r"a share of the FLOPs is above 0 and at most 1, got 1\.5"):
        keep_for_share(spec, 1.5, visual_tokens=16, split_layer=2, text_tokens=8)
