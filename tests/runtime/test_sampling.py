"""Generation options and the distribution that tokens are drawn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import BundleError, EngineError, UsageError
from runtime.sampling import GenerationConfig, Sampler

TOLERANCE = 1e-6  # of probabilities; measured: 2.6e-7, transformers' softmax is float32, this one float64
OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 0},
    {"top_k": 7},
    {"top_k": 10_000},
    {"temperature": 0.3},
    {"temperature": 2.5, "top_k": 0, "top_p": 0.9},
    {"top_p": 0.5},
    {"top_p": 0.01},
    {"top_p": 1e-17},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "top_k": 0},
    {"temperature": 1e-6, "repetition_penalty": 1.05},
]


def transformers_probabilities(logits: np.ndarray, previous: np.ndarray, options: dict[str, Any], swap: bool = False) -> np.ndarray:
    """What transformers' own processors leave, in the order in which its generate builds them (`swap`: top_p before top_k)."""
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    options = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, **options}
    chain: list[Any] = []
    if options["temperature"] != 1:
        chain.append(process.TemperatureLogitsWarper(options["temperature"]))
    if options["top_k"]:
        chain.append(process.TopKLogitsWarper(options["top_k"]))
    if options["top_p"] < 1:
        chain.append(process.TopPLogitsWarper(options["top_p"]))
    if swap:
        chain.reverse()
    if options["repetition_penalty"] != 1:
        chain.insert(0, process.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    ids, scores = torch.tensor(previous)[None], torch.tensor(logits)[None]
    for step in chain:
        scores = step(ids, scores)
    return scores.softmax(-1)[0].numpy()


def cases(vocab: int) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(vocab)
    return [
        ((random.standard_normal(vocab) * scale).astype(np.float32), random.integers(0, vocab + 2, 30))  # some ids beyond the head
        for scale in (0.5, 2, 8)
        for _ in range(4)
    ]


@pytest.mark.parametrize("vocab", [33, 513, 32_000])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_distribution_is_that_of_transformers(vocab: int, options: dict[str, Any]) -> None:
    sampler = Sampler(GenerationConfig(do_sample=True, **options))
    worst = 0.0
    for logits, previous in cases(vocab):
        expected, got = transformers_probabilities(logits, previous, options), sampler.probabilities(logits, previous)
        visible = expected > 1e-30  # float32 underflows earlier
        assert np.array_equal(got > 1e-30, visible)
        worst = max(worst, float(np.abs(got - expected).max()))
    print(f"max abs error of probabilities: {worst:.1e}")
    assert worst <= TOLERANCE


def test_negative_control_another_order_gives_another_distribution() -> None:
    options: dict[str, Any] = {"temperature": 2.5, "top_k": 20, "top_p": 0.6}
    sampler = Sampler(GenerationConfig(do_sample=True, **options))
    errors = [
        np.abs(sampler.probabilities(logits, ids) - transformers_probabilities(logits, ids, options, swap=True)).max()
        for logits, ids in cases(513)
    ]
    assert max(errors) > 1000 * TOLERANCE


def test_draws_follow_the_distribution() -> None:
    config = GenerationConfig(do_sample=True, top_k=5, seed=1)
    sampler = Sampler(config)
    logits = np.random.default_rng(0).standard_normal(40).astype(np.float32)
    drawn = np.bincount([sampler.next(logits, []) for _ in range(20_000)], minlength=40) / 20_000
    expected = sampler.probabilities(logits, [])
    assert np.abs(drawn - expected).max() < 0.02
    assert drawn[expected == 0].sum() == 0


def test_the_same_seed_draws_the_same_tokens_and_others_differ() -> None:
    logits = np.zeros(1000, np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(GenerationConfig(do_sample=True, top_k=0, seed=seed))
        return [sampler.next(logits, []) for _ in range(20)]

    assert draw(3) == draw(3)
    assert len({tuple(draw(seed)) for seed in (1, 2, 3, None, None)}) == 5


def test_greedy_takes_the_largest_and_leaves_the_logits_alone() -> None:
    logits = np.array([1.0, 5.0, 4.9, -1.0], np.float32)
    kept = logits.copy()
    assert Sampler(GenerationConfig(temperature=0.1, top_k=1)).next(logits, [0]) == 1
    assert Sampler(GenerationConfig(repetition_penalty=1.1)).next(logits, [1, 1, 1]) == 2
    assert Sampler(GenerationConfig(repetition_penalty=1.01)).next(logits, np.array([1, 1, 1])) == 1  # once, however often it was seen
    assert np.array_equal(logits, kept)


def test_extreme_temperatures_do_not_overflow() -> None:
    logits = np.array([1.0, 80.0, 79.0], np.float32)
    assert Sampler(GenerationConfig(do_sample=True, temperature=1e-300)).next(logits, []) == 1
    hot = Sampler(GenerationConfig(do_sample=True, temperature=1e30)).probabilities(logits, [])
    assert hot.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_that_are_not_numbers_are_an_error(bad: float, do_sample: bool) -> None:
    logits = np.array([1.0, bad, 2.0], np.float32)
    with pytest.raises(EngineError, match="logits that are not numbers"):
        Sampler(GenerationConfig(do_sample=do_sample)).next(logits, [])
    with pytest.raises(EngineError, match="logits that are not numbers"):
        Sampler(GenerationConfig(do_sample=do_sample)).next(np.full(3, -np.inf, np.float32), [])


def test_the_real_generation_configs_are_honoured(model_configs: Path) -> None:
    def read(name: str) -> GenerationConfig:
        return GenerationConfig.from_json(json.loads((model_configs / name / "generation_config.json").read_text()))

    assert read("llava-1.5-7b-hf") == GenerationConfig(eos_token_ids=(2,))
    assert read("Qwen2.5-VL-7B-Instruct") == GenerationConfig(
        do_sample=True, temperature=1e-6, repetition_penalty=1.05, eos_token_ids=(151645, 151643)
    )


def test_entries_of_a_generation_config_are_read() -> None:
    config = GenerationConfig.from_json(
        {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "max_new_tokens": 9, "max_length": 4096, "eos_token_id": [5, 6],
         "top_k": None, "stop_strings": "END",
         "num_beams": 1, "use_cache": True}
    )  # fmt: skip
    assert config == GenerationConfig(max_new_tokens=9, temperature=0.9, top_p=0.6, eos_token_ids=(5, 6), stop_strings=("END",))
    assert GenerationConfig.from_json({}) == GenerationConfig()
    assert GenerationConfig.from_json({"temperature": 0}) == GenerationConfig()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_beams": 4}, "num_beams = 4, which is not implemented: remove it"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size = 3"),
        ({"min_p": 0.1}, "min_p = 0.1"),
        ({"suppress_tokens": [1]}, r"suppress_tokens = \[1\]"),
        ({"temperature": "hot"}, "generation_config.json: temperature must be a number above 0.*got 'hot'"),
        ({"eos_token_id": "x"}, "eos_token_ids must be an integer of 0 or more: got 'x'"),
        ({"top_p": 0.0}, "top_p must be a number above 0 up to 1"),
        ([], "must hold a JSON object, not list"),
    ],
)
def test_generation_configs_that_cannot_be_honoured_are_refused(config: Any, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        GenerationConfig.from_json(config)


def test_overrides_keep_what_is_not_given() -> None:
    base = GenerationConfig(max_new_tokens=5, eos_token_ids=(2,))
    assert base.override() == base.override(max_new_tokens=None, seed=None) == base
    changed = base.override(do_sample=True, temperature=0.5, seed=4, stop_strings=["a", "b"], eos_token_ids=7)
    assert changed == GenerationConfig(5, do_sample=True, temperature=0.5, seed=4, stop_strings=("a", "b"), eos_token_ids=(7,))
    assert base.override(stop_strings="ab").stop_strings == ("ab",)
    assert GenerationConfig(do_sample=True).override(temperature=2).temperature == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temprature": 0.5}, "unknown option temprature: expected some of max_new_tokens, do_sample, temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of 1 or more: got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer"),
        ({"do_sample": "yes"}, "do_sample must be true or false, got 'yes'"),
        ({"do_sample": True, "temperature": 0}, "temperature must be a number above 0; .* leave do_sample off: got 0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be a number above 0"),
        ({"do_sample": True, "temperature": float("inf")}, "temperature must be a number above 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be a number above 0 up to 1.*got 1.5"),
        ({"do_sample": True, "top_p": 0}, "top_p must be a number above 0 up to 1"),
        ({"do_sample": True, "top_k": -1}, "top_k must be an integer of 0 or more; 0 keeps every token: got -1"),
        ({"do_sample": True, "top_k": True}, "top_k must be an integer"),
        ({"do_sample": True, "seed": -1}, "seed must be an integer of 0 or more"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0; 1 changes nothing"),
        ({"stop_strings": ""}, "stop_strings must be texts that are not empty"),
        ({"stop_strings": [3]}, "stop_strings must be texts"),
        ({"eos_token_ids": -1}, "eos_token_ids must be an integer of 0 or more"),
    ],
)
def test_overrides_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        GenerationConfig().override(**options)


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"top_p": 0.5}, {"top_k": 5}, {"seed": 1}, {"seed": 0}], ids=str)
def test_sampling_options_without_sampling_are_refused(options: dict[str, Any]) -> None:
    name = next(iter(options))
    for config, extra in ((GenerationConfig(), {}), (GenerationConfig(do_sample=True), {"do_sample": False})):
        with pytest.raises(UsageError, match=f"{name} would have no effect without sampling: pass do_sample=True"):
            config.override(**options, **extra)
    assert GenerationConfig().override(do_sample=True, **options).do_sample
