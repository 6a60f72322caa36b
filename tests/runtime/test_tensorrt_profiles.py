"""The shapes that engines are built for, from a manifest alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from runtime.engine_info import ShapeRange
from runtime.engines.tensorrt_profiles import ProfileOptions, profiles_of
from runtime.errors import BundleError, EngineError, UsageError
from runtime.manifest import Manifest, TensorInfo, read_manifest

N, CONTEXT = 16, 512  # tiny_bundle: 16 visual tokens, budgets 4 and 2, 4 heads of 16, a context of 512


@pytest.fixture
def manifest(tiny_bundle: Path) -> Manifest:
    return read_manifest(tiny_bundle)


def rows(manifest: Manifest, graph: str, options: ProfileOptions | None = None) -> dict[str, tuple[int, int, int]]:
    """Rows of the first input in each profile."""
    name = manifest.graphs[graph].inputs[0].name
    found = {profile.name: profile.shapes[name] for profile in profiles_of(manifest, graph, options or ProfileOptions())}
    return {key: (r.minimum[1], r.optimum[1], r.maximum[1]) for key, r in found.items()}


def test_halves_have_a_prefill_an_append_and_a_decode_profile(manifest: Manifest) -> None:
    assert rows(manifest, "pre_ecl") == {"prefill": (16, 80, 272), "append": (1, 64, 256), "decode": (1, 1, 8)}
    assert rows(manifest, "post_ecl") == {"prefill": (2, 68, 272), "append": (1, 64, 256), "decode": (1, 1, 8)}


@pytest.mark.parametrize("graph", ["pre_ecl", "post_ecl"])
def test_no_profile_is_fixed_at_one_token(manifest: Manifest, graph: str) -> None:
    assert all(least < most for least, _, most in rows(manifest, graph, ProfileOptions(text_tokens=1)).values() if least == 1 < most)
    assert rows(manifest, graph)["decode"][2] > 1


def test_caches_are_of_one_length_in_all_profiles(manifest: Manifest) -> None:
    for options, capacity in ((ProfileOptions(), 512), (ProfileOptions(capacity=300), 300)):
        for profile in profiles_of(manifest, "post_ecl", options):
            shape = profile.shapes["past_key_values.3.value"]
            assert shape == ShapeRange(*[(1, 4, capacity, 16)] * 3)
            assert "past_length" not in profile.shapes
            assert "last_index" not in profile.shapes


def test_vision_runs_one_image_and_the_score_those_of_a_message(manifest: Manifest) -> None:
    (vision,) = profiles_of(manifest, "vision", ProfileOptions(images=3))
    assert vision.shapes == {"pixel_values": ShapeRange(*[(1, 3, 56, 56)] * 3)}
    (score,) = profiles_of(manifest, "score.4", ProfileOptions(images=3))
    assert score.shapes["score_states"] == ShapeRange((4, 64), (16, 64), (48, 64))
    assert score.shapes["position_ids"] == ShapeRange((1, 4), (1, 16), (1, 48))


def test_nothing_exceeds_the_context(manifest: Manifest) -> None:
    small = dataclasses.replace(manifest, max_context=20)
    for graph in ("pre_ecl", "post_ecl"):
        for least, usual, most in rows(small, graph, ProfileOptions(text_tokens=4096, images=9)).values():
            assert 1 <= least <= usual <= most <= 20


def test_a_static_cache_is_left_out(manifest: Manifest) -> None:
    graph = manifest.graphs["pre_ecl"]
    inputs = tuple(dataclasses.replace(t, shape=tuple(64 if s == "capacity" else s for s in t.shape)) for t in graph.inputs)
    static = dataclasses.replace(manifest, graphs={**manifest.graphs, "pre_ecl": dataclasses.replace(graph, inputs=inputs)})
    assert set(profiles_of(static, "pre_ecl", ProfileOptions())[0].shapes) == {"inputs_embeds", "position_ids"}


def test_a_size_that_no_profile_knows_is_told(manifest: Manifest) -> None:
    graph = dataclasses.replace(manifest.graphs["vision"], inputs=(TensorInfo("patches", "float32", ("patches", 3)),))
    odd = dataclasses.replace(manifest, graphs={**manifest.graphs, "vision": graph})
    with pytest.raises(EngineError, match="vision's input patches has a size 'patches' that no profile knows"):
        profiles_of(odd, "vision", ProfileOptions())


def test_options_and_shapes_are_checked() -> None:
    with pytest.raises(UsageError, match="text tokens is 0, expected 1 or more"):
        ProfileOptions(text_tokens=0)
    for shapes in (((1,), (2,), (1,)), ((1,), (1, 1), (1,))):
        with pytest.raises(BundleError, match="expected them of one rank and none smaller than the one before"):
            ShapeRange(*shapes)
