"""The parity ladder over small random checkpoints: eager transformers = exported chain, with controls that must fail."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.build import build_bundle
from export.eager import EagerPrunedLlava
from export.parity import Check, compare_prompt, compare_selection, negative_controls, relative_error, selection_quality
from export.plan import BuildOptions, make_plan
from export.tolerances import RELATIVE
from export.verify import _selection_checks, synthetic_images, verify
from runtime import names
from runtime.generation import Stopwatch
from runtime.host_executor import HostExecutor
from runtime.pipeline import VisionLanguageModel, load
from tests.models import tiny_llava_checkpoint


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint's shape, and how it is split."""

    name: str
    split_layer: int
    keep: tuple[int, ...]
    shape: dict[str, Any]
    mode: str = "trace"


CASES = (
    Case("multi-head, 16 visual tokens", 2, (6, 1), {"image_size": 56}),
    Case("grouped-query, vocabulary 413, head size 48", 1, (4,),
         {"hidden": 192, "heads": 4, "kv_heads": 2, "head_dim": 48, "vocab": 413, "image_size": 42}),
    Case("one key-value head, split before the last layer", 3, (2,), {"heads": 4, "kv_heads": 1, "image_size": 42}, "row"),
    Case("query bias, class token kept, all vision layers", 2, (3,),
         {"attention_bias": True, "strategy": "full", "feature_layer": -1, "image_size": 28}),
    Case("tied embeddings, other rotary base, no projector bias", 2, (5,),
         {"tied": True, "rope_theta": 5e5, "projector_bias": False, "image_size": 42}, "energy-high"),
    Case("kept by the greedy determinant", 2, (6, 1), {"image_size": 56}, "dpp"),
    Case("one visual token in all", 2, (1,), {"image_size": 14}),
)  # fmt: skip


def exported(folder: Path, case: Case) -> tuple[VisionLanguageModel, EagerPrunedLlava]:
    checkpoint = tiny_llava_checkpoint(folder / "checkpoint", seed=3, **case.shape)
    options = BuildOptions("llava15", checkpoint=str(checkpoint), keep=case.keep, split_layer=case.split_layer, score_mode=case.mode)
    build_bundle(make_plan(options), folder / "bundle")
    return load(folder / "bundle"), EagerPrunedLlava(checkpoint, case.split_layer, None, case.mode)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_chain_equals_eager_pruned_model(case: Case, tmp_path: Path) -> None:
    model, reference = exported(tmp_path, case)
    side = reference.model.config.vision_config.image_size
    report = verify(model, reference, synthetic_images(4, side), selection_images=4)
    assert [c["name"] for c in report["checks"] if not c["passed"]] == []
    if model.manifest.geometry.visual_tokens >= 4:
        assert sum(c["must_fail"] for c in report["checks"]) == (3 if case.split_layer < 3 else 2)


def test_mode_dpp_keeps_what_the_eager_model_keeps_and_says_the_same(tmp_path: Path) -> None:
    model, reference = exported(tmp_path, Case("", 2, (6,), {"image_size": 56}, "dpp"))
    pruned = EagerPrunedLlava(tmp_path / "checkpoint", 2, 6, "dpp")
    others = {mode: EagerPrunedLlava(tmp_path / "checkpoint", 2, 6, mode) for mode in ("trace", "energy-high")}
    for image in synthetic_images(8, 56):
        prompt = model.prompts.build("hello", [image])
        conversation, logits = model.chain.prefill(prompt.ids.input_ids, prompt.ids.visual_mask, prompt.pixel_values, keep=6)
        expected = pruned.prefill(_ids(prompt), _pixels(prompt))
        assert expected.selection is not None
        assert conversation.kept_indices.tolist() == expected.selection.kept_indices.tolist()
        assert relative_error(logits, expected.logits[-1]) < RELATIVE["logits", "fp32"]
        quality = compare_selection(model.chain, reference, prompt, 6)[0]
        assert (quality.overlap, quality.shortfall, quality.determinant_gap) == (1.0, 0.0, 0.0)
        assert quality.score_error < 1e-5  # measured 1.1e-6
        for other in others.values():
            choice = other.prefill(_ids(prompt), _pixels(prompt)).selection
            assert choice is not None
            assert choice.kept_indices.tolist() != conversation.kept_indices.tolist()


def test_a_chain_that_keeps_other_tokens_than_the_greedy_ones_fails_verification(tmp_path: Path) -> None:
    """The bundle says `dpp` and holds the graph of another mode."""
    model, reference = exported(tmp_path, Case("", 2, (6,), {"image_size": 56}, "trace"))
    reference.score_mode = "dpp"
    qualities = [compare_selection(model.chain, reference, model.prompts.build("hello", [i]), 6)[0] for i in synthetic_images(4, 56)]
    checks = list(_selection_checks("dpp", qualities))
    assert [c.passed for c in checks] == [False, False]
    assert [c.name for c in checks] == ["selection: variance forgone by a step", "selection: ln det from the exact set's, per kept token"]


def test_debug_outputs_are_every_layers_hidden_states_and_every_rows_logits(tmp_path: Path) -> None:
    """Runs both halves over a pruned prompt by hand; a tap taken one layer too late must not agree."""
    checkpoint = tiny_llava_checkpoint(tmp_path / "checkpoint", seed=3, image_size=56)
    build_bundle(make_plan(BuildOptions("llava15", checkpoint=str(checkpoint), keep=(6,), split_layer=2, debug=True)), tmp_path / "bundle")
    chain, kept = load(tmp_path / "bundle").chain, np.array([0, 3, 4, 9, 12, 15])
    prompt = load(tmp_path / "bundle").prompts.build("hello", synthetic_images(1, 56))
    ids, rows = prompt.ids.input_ids, np.flatnonzero(prompt.ids.visual_mask)
    expected = EagerPrunedLlava(checkpoint, 2, None).prefill(_ids(prompt), _pixels(prompt), kept_indices=kept)
    conversation, positions = chain.new_conversation(len(ids), len(ids)), np.arange(len(ids))
    host = chain.executor
    assert isinstance(host, HostExecutor)
    embeds = host.embed(ids, rows, prompt.pixel_values, Stopwatch())
    taps = host.run_half(names.PRE_ECL, embeds, positions, conversation.pre, [names.tap(0), names.tap(1)])
    stays = np.setdiff1d(positions, np.delete(rows, kept))
    hidden = np.ascontiguousarray(taps[1][:, stays])
    taps += host.run_half(names.POST_ECL, hidden, positions[stays], conversation.post, [names.tap(2), names.tap(3), names.ALL_LOGITS])
    for layer in range(4):
        assert relative_error(taps[layer][0], expected.layer_states[layer]) <= RELATIVE["hidden_states", "fp32"]
    assert relative_error(taps[4][0], expected.logits) <= RELATIVE["logits", "fp32"]
    assert relative_error(taps[3][0], expected.layer_states[2]) > 1e-2


def test_ladder_sees_a_wrong_weight(tmp_path: Path) -> None:
    model, reference = exported(tmp_path, CASES[0])
    prompt = model.prompts.build("hello", synthetic_images(1, 56))
    kept = np.array([1, 4, 9])
    good = list(compare_prompt(model.chain, reference, prompt, kept, "pruned"))
    reference.model.model.language_model.layers[3].mlp.down_proj.weight.data *= 1.01
    bad = list(compare_prompt(model.chain, reference, prompt, kept, "pruned"))
    assert all(c.passed for c in good)
    assert not next(c for c in bad if c.name == "pruned: logits").passed


def test_ladder_sees_other_kept_tokens(tmp_path: Path) -> None:
    model, reference = exported(tmp_path, CASES[0])
    prompt = model.prompts.build("hello", synthetic_images(1, 56))
    expected = reference.prefill(_ids(prompt), _pixels(prompt), kept_indices=np.array([1, 4, 9])).logits[-1]
    ids = prompt.ids
    _, logits = model.chain.prefill(ids.input_ids, ids.visual_mask, prompt.pixel_values, keep=None, kept_indices=np.array([1, 4, 10]))
    assert relative_error(logits, expected) > 1e-3


def test_controls_fail_where_the_chain_is_right(tmp_path: Path) -> None:
    model, reference = exported(tmp_path, CASES[0])
    prompt = model.prompts.build("hello", synthetic_images(1, 56))
    controls = list(negative_controls(model.chain, reference, prompt, np.arange(1, 16, 2)))
    assert len(controls) == 3
    assert all(c.error > 10 * c.tolerance for c in controls)


def test_check_passes_and_fails_both_ways() -> None:
    assert Check("close", 1e-6, 1e-4).passed
    assert not Check("far", 1e-3, 1e-4).passed
    assert Check("control", 1e-3, 1e-4, must_fail=True).passed
    assert not Check("control", 1e-6, 1e-4, must_fail=True).passed
    assert not Check("broken", float("nan"), 1e-4, must_fail=True).passed


def test_selection_quality_measures_swaps() -> None:
    exact = np.array([0.1, 0.9, 0.8, 0.7999, 0.2])
    assert selection_quality(exact, np.array([1, 2])).overlap == 1.0
    swapped = selection_quality(exact, np.array([1, 3]))
    assert swapped.overlap == 0.5
    assert swapped.swap_distance == pytest.approx(1e-4)
    assert selection_quality(exact, np.array([0, 1])).swap_distance == pytest.approx(0.7)


def _ids(prompt: Any) -> Any:
    import torch

    return torch.from_numpy(prompt.ids.input_ids)[None]


def _pixels(prompt: Any) -> Any:
    import torch

    return torch.from_numpy(prompt.pixel_values)
