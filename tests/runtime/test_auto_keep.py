"""keep="auto" from build to answer: the chosen budget gives what asking for it gives, in states, caches, turns and on command lines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export import build
from runtime import explain, generate, kv_cache, pipeline, profile
from runtime.budgets import choose_budget, kept_mass
from runtime.conversation import ImageGroup, ImageSpan
from runtime.errors import UsageError
from runtime.generation import Generation
from runtime.host_executor import HostExecutor, HostRows
from runtime.manifest import read_manifest
from runtime.pipeline import VisionLanguageModel, load

N, BUDGETS = 16, (4, 2, 8)
QUESTION = "what is at row 2 column 3?"
IMAGE_ONLY: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}]}]


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)


def turn(role: str, text: str, images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


def answer(result: Generation) -> tuple[Any, ...]:
    return result.token_ids, result.kept_indices, result.prompt_tokens


def ask(model: VisionLanguageModel, *seeds: int, keep: int | str = "auto", **options: Any) -> Generation:
    return model.generate(QUESTION, [picture(seed) for seed in seeds], keep=keep, max_new_tokens=8, **options)


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Budgets 4, 2 and 8, and a threshold that makes use of each."""
    folder = tmp_path_factory.mktemp("auto")
    probe = ["--model", "llava15", "--checkpoint", str(tiny_checkpoint), "--keep", "4,2,8", "--max-context", "512"]
    assert build.main([*probe, "--output", str(folder / "probe"), "--auto-keep", "0.5"]) == 0
    model = load(folder / "probe")
    masses = [float(kept_mass(np.asarray(ask(model, seed, keep=8).token_entropy))[3]) for seed in range(12)]
    assert build.main([*probe, "--output", str(folder / "bundle"), "--auto-keep", str(np.median(masses))]) == 0
    return folder / "bundle"


@pytest.fixture(scope="module")
def model(bundle: Path) -> VisionLanguageModel:
    return load(bundle)


@pytest.fixture(scope="module")
def chosen(model: VisionLanguageModel) -> dict[int, int]:
    """The budget that each picture should get, from its scores by the definition; at least two differ."""
    threshold = model.manifest.auto_keep
    assert threshold is not None
    budgets = {}
    for seed in range(12):
        scores = np.asarray(ask(model, seed, keep=8).token_entropy, np.float64)
        above = np.sort(scores - scores.min())[::-1]
        reached = [budget for budget in sorted(BUDGETS) if above[:budget].sum() >= threshold * above.sum()]
        budgets[seed] = reached[0] if reached else max(BUDGETS)
    assert len(set(budgets.values())) >= 2
    return budgets


def at(model: VisionLanguageModel, threshold: float) -> VisionLanguageModel:
    """The same bundle with another threshold."""
    return VisionLanguageModel(model.bundle, dataclasses.replace(model.manifest, auto_keep=threshold))


# ---------------------------------------------------------------- the choice


def test_each_image_gets_its_budget_and_what_asking_for_it_gives(model: VisionLanguageModel, chosen: dict[int, int]) -> None:
    for seed, budget in chosen.items():
        auto, asked = ask(model, seed), ask(model, seed, keep=budget)
        assert auto.auto_budgets == (budget,)
        assert auto.kept_tokens == budget
        assert answer(auto) == answer(asked)
        assert asked.auto_budgets == ()
        assert auto.token_entropy is not None
        assert np.array_equal(auto.token_entropy, np.asarray(asked.token_entropy))
        assert auto.to_dict()["auto_budgets"] == [budget]


@pytest.mark.parametrize("mode", ["row", "energy-low"])
def test_other_modes_choose_by_their_own_scores(mode: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ["--keep", "2,4,8", "--auto-keep", "0.6", "--score-mode", mode]
    assert build.main(["--model", "llava15", "--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "b"), *options]) == 0
    model = load(tmp_path / "b")
    for seed in range(4):
        auto = ask(model, seed)
        assert auto.auto_budgets == (choose_budget(np.asarray(auto.token_entropy), BUDGETS, 0.6),)
        assert answer(auto) == answer(ask(model, seed, keep=auto.auto_budgets[0]))


def test_thresholds_reach_from_the_smallest_budget_to_the_largest(model: VisionLanguageModel) -> None:
    kept = [ask(at(model, threshold), 1).kept_tokens for threshold in (1e-6, 0.3, 0.6, 0.9, 1.0)]
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (2, 8), "no budget holds all of the mass: the largest is the nearest"


def test_a_budget_of_all_tokens_is_the_unpruned_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ["--keep", "2,16", "--auto-keep", "1"]
    assert build.main(["--model", "llava15", "--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "b"), *options]) == 0
    model = load(tmp_path / "b")
    auto = ask(model, 1)
    assert (auto.auto_budgets, auto.kept_tokens) == ((16,), N)
    assert answer(auto) == answer(ask(model, 1, keep="all"))
    both = ask(model, 1, 2)
    assert both.kept_tokens == 16
    assert answer(both) == answer(ask(model, 1, 2, keep=16)), "of two images it prunes"


def test_a_group_between_two_budgets_is_scored_by_the_one_that_fits_in(model: VisionLanguageModel) -> None:
    states = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    group = ImageGroup((ImageSpan(3, 9, ""),), 0)
    for threshold, chosen, kept in ((1e-6, 2, 2), (1.0, 8, 6)):
        chain = at(model, threshold).chain
        assert isinstance(chain.executor, HostExecutor)
        new = HostRows(chain.executor, np.arange(3, 9), states[None], states[None])
        selection = chain._score(group, "auto", 6, lambda budget, new=new: new.score(budget, np.arange(6), 0, 0))  # type: ignore[misc]
        assert (selection.budget, selection.chosen, len(selection.kept_indices)) == ("auto", chosen, kept)
        assert selection.token_entropy is not None
        assert len(selection.token_entropy) == 6


def test_a_group_no_larger_than_the_smallest_budget_keeps_all_unscored(model: VisionLanguageModel) -> None:
    graphs = model.manifest.graphs
    other = at(model, 0.5)
    manifest = dataclasses.replace(
        model.manifest, budgets=(20, N), graphs={**graphs, f"score.{N}": graphs["score.4"], "score.20": graphs["score.4"]}
    )
    other.manifest = other.chain.manifest = manifest
    result = ask(other, 1)
    assert (result.auto_budgets, result.kept_tokens, result.token_entropy) == ((N,), N, None)
    assert "score" not in result.stages_ms
    assert answer(result) == answer(ask(model, 1, keep="all"))


def test_images_of_one_message_share_one_budget(model: VisionLanguageModel, chosen: dict[int, int]) -> None:
    threshold = model.manifest.auto_keep
    assert threshold is not None
    for seeds in ((0, 1), (2, 3, 4)):
        auto = ask(model, *seeds)
        assert auto.token_entropy is not None
        assert len(auto.token_entropy) == N * len(seeds)
        assert auto.auto_budgets == (choose_budget(auto.token_entropy, BUDGETS, threshold),)
        assert answer(auto) == answer(ask(model, *seeds, keep=auto.auto_budgets[0]))


def test_a_prompt_without_images_chooses_nothing(model: VisionLanguageModel) -> None:
    result = ask(model)
    assert (result.auto_budgets, result.kept_tokens) == ((), 0)
    assert result.token_ids == ask(model, keep=2).token_ids


def test_the_default_stays_the_first_budget(model: VisionLanguageModel) -> None:
    result = model.generate(QUESTION, [picture(1)], max_new_tokens=2)
    assert (result.kept_tokens, result.auto_budgets) == (4, ())


# ---------------------------------------------------------------- states, turns, the cache


def unlike(chosen: dict[int, int]) -> tuple[int, int]:
    """Two pictures of different budgets, the one with less first."""
    return min(chosen, key=lambda seed: chosen[seed]), max(chosen, key=lambda seed: chosen[seed])


def test_a_state_can_be_asked_again(model: VisionLanguageModel, chosen: dict[int, int]) -> None:
    for seed in unlike(chosen):
        state = model.prefill(IMAGE_ONLY, [picture(seed)], keep="auto")
        assert state.keep == "auto"
        assert len(state.kept_indices) == chosen[seed]
        for question in (QUESTION, "read row 1.", QUESTION):
            for asked_state, options in ((state, {}), (state.clone(), {"keep": "auto"})):
                asked = model.generate(question, state=asked_state, max_new_tokens=8, **options)
                fresh = model.generate(question, [picture(seed)], keep="auto", max_new_tokens=8)
                assert answer(asked) == answer(fresh)
                assert asked.reused_tokens >= N
                assert asked.auto_budgets == (chosen[seed],)


def test_what_auto_chose_is_another_budget_than_the_number(model: VisionLanguageModel, chosen: dict[int, int]) -> None:
    state = model.prefill(IMAGE_ONLY, [picture(1)], keep="auto")
    with pytest.raises(UsageError, match=f"the state was made with keep auto, not {chosen[1]}: leave keep out, or prefill again"):
        model.generate(QUESTION, state=state, keep=chosen[1])
    with pytest.raises(UsageError, match="made with keep auto, not all"):
        model.generate(QUESTION, state=state, keep="all")
    for keep, made in ((4, "4"), ("all", "all")):
        with pytest.raises(UsageError, match=f"the state was made with keep {made}, not auto: leave keep out, or prefill again"):
            model.generate(QUESTION, state=model.prefill(IMAGE_ONLY, [picture(1)], keep=keep), keep="auto")


def test_each_turns_images_get_a_budget_of_their_own(model: VisionLanguageModel, chosen: dict[int, int]) -> None:
    few, many = unlike(chosen)
    for first, second in ((few, many), (many, few)):
        messages = [turn("user", QUESTION, 1), turn("assistant", "7"), turn("user", "read row 1.", 1)]
        fresh = model.generate(messages, [picture(first), picture(second)], keep="auto", max_new_tokens=8)
        assert len(fresh.auto_budgets) == 2
        assert fresh.auto_budgets[0] == chosen[first], "what follows an image does not change its choice"
        assert fresh.kept_tokens == sum(fresh.auto_budgets)
        state = model.prefill(IMAGE_ONLY, [picture(first)], keep="auto")
        later = model.generate(messages, [picture(second)], state=state, max_new_tokens=8)
        assert answer(later) == answer(fresh)
        assert later.reused_tokens >= N
        assert later.auto_budgets == fresh.auto_budgets
        again = model.generate(QUESTION, state=state, max_new_tokens=8)
        assert answer(again) == answer(ask(model, first)), "the state still is what it was"
        assert again.auto_budgets == (chosen[first],)


def test_the_cache_keeps_auto_and_numbers_apart(bundle: Path, model: VisionLanguageModel, chosen: dict[int, int]) -> None:
    cached = load(bundle, cache_bytes=50_000_000)
    seed, _ = unlike(chosen)
    assert ask(cached, seed).reused_tokens == 0
    for keep in (chosen[seed], "all"):
        other = ask(cached, seed, keep=keep)
        assert other.reused_tokens < N, "another budget selects anew"
        assert other.auto_budgets == ()
        assert answer(other) == answer(ask(model, seed, keep=keep))
    again = cached.generate("read row 1.", [picture(seed)], keep="auto", max_new_tokens=8)
    assert again.reused_tokens >= N
    assert again.auto_budgets == (chosen[seed],)
    assert answer(again) == answer(model.generate("read row 1.", [picture(seed)], keep="auto", max_new_tokens=8))


def test_caches_have_room_for_the_largest_budget(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "ROUND_TO", 1)
    monkeypatch.setattr(pipeline, "MAX_RESERVE", 1)
    messages = [turn("user", QUESTION, 1), turn("assistant", "7"), turn("user", QUESTION, 1)]
    for threshold, budget in ((1.0, 8), (1e-6, 2)):
        state = at(model, threshold).prefill(messages, [picture(1), picture(2)], keep="auto")
        assert state.conversation.auto_budgets == (budget, budget)
        post, tokens = state.conversation.post, len(state.conversation.token_ids)
        assert post.length == tokens - 2 * (N - budget)
        assert post.capacity == tokens - 2 * (N - 8) + 1
        assert post.generation == 0, "the buffers did not grow"


# ---------------------------------------------------------------- bundles with and without


def test_a_threshold_is_written_and_makes_a_bundle_of_schema_2(bundle: Path, tiny_bundle: Path) -> None:
    raw = json.loads((bundle / "bundle.json").read_text())
    assert raw["schema_version"] == 2
    assert raw["auto_keep"] == read_manifest(bundle).auto_keep == json.loads((bundle / "report.json").read_text())["auto_keep"]
    old = json.loads((tiny_bundle / "bundle.json").read_text())
    assert "auto_keep" not in old


def test_a_bundle_without_a_threshold_refuses_auto_everywhere(tiny_bundle: Path) -> None:
    model = load(tiny_bundle)
    message = "this bundle has no threshold for keep auto: export it with several budgets and --auto-keep T, or keep 4, 2 and all"
    for call in (model.generate, model.stream, model.prefill):
        with pytest.raises(UsageError, match=message):
            call(QUESTION, [picture(1)], keep="auto")
    prompt = model.prompts.build(QUESTION, [picture(1)])
    with pytest.raises(UsageError, match=message):
        model.chain.prefill(prompt.ids.input_ids, prompt.ids.visual_mask, prompt.pixel_values, keep="auto")


def test_the_plan_tells_the_threshold(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--keep", "4,2", "--auto-keep", "0.9", "--dry-run"]
    assert build.main(["--model", "llava15", "--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "b"), *options]) == 0
    assert "; keep auto: the smallest that holds 90 % of an image's score mass\n" in capsys.readouterr().err


# ---------------------------------------------------------------- command lines


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(picture(1)).save(path)
    return path


def test_generate_tells_what_it_chose(bundle: Path, chosen: dict[int, int], scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--bundle", str(bundle), "--image", str(scene), "--prompt", QUESTION, "--max-new-tokens", "4", "--json"]
    assert generate.main([*argv, "--keep", "auto"]) == 0
    captured = capsys.readouterr()
    last = json.loads(captured.out.splitlines()[-1])
    assert (last["auto_budgets"], last["kept_tokens"]) == ([chosen[1]], chosen[1])
    assert f"{chosen[1]} of 16 visual tokens kept (budget chosen: {chosen[1]}); first token" in captured.err
    assert generate.main(argv) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["auto_budgets"] == []
    assert "4 of 16 visual tokens kept; first token" in captured.err


def test_explain_shows_the_chosen_budget(
    bundle: Path, model: VisionLanguageModel, chosen: dict[int, int], scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threshold = model.manifest.auto_keep
    assert threshold is not None
    words = f"budget {chosen[1]} of 2, 4, 8 chosen for {100 * threshold:g} % of the scores' mass"
    page = tmp_path / "a.html"
    argv = ["--bundle", str(bundle), "--image", str(scene), "--html", str(page), "--png", str(tmp_path / "a.png"), "--json"]
    for more in ([], ["--prompt", QUESTION]):
        assert explain.main([*argv, "--keep", "auto", *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"; {words}; score (trace)" in lines[0]
        assert json.loads(lines[-1])["auto_budgets"] == [chosen[1]]
        assert words.replace("'", "&#39;") in page.read_text(encoding="utf-8")
    assert explain.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "chosen" not in lines[0]
    assert json.loads(lines[-1])["auto_budgets"] == []


def test_profile_refuses_it_in_one_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile.main(["--bundle", str(bundle), "--keep", "auto", "--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].endswith("keeps another number for each image: profile its budgets one by one (4, 2, 8)")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_budget_is_told_beside_auto(bundle: Path, scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--bundle", str(bundle), "--image", str(scene), "--prompt", QUESTION, "--keep", "3"]) == 2
    assert "this bundle holds the budgets 4, 2, 8, auto and all, not 3: export it with --keep 3" in capsys.readouterr().err
