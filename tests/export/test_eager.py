"""The eager reference against plain transformers, against a masked forward pass, and its parts against other formulas."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from export.eager import EagerPrunedLlava, Prefill, load_llava
from export.exact_dpp import dpp_order
from export.exact_score import select_tokens, token_scores
from runtime.errors import CheckpointError, InputError, UsageError
from runtime.names import SCORE_MODES
from tests.models import tiny_llava_checkpoint
from tiny_llava.model import build_model, build_processor, build_tokenizer

LAYERS, HIDDEN, HEADS, HEAD_DIM, VISUAL = 5, 36, 6, 10, 9
IMAGE_ID, VOCAB = 4, 411
TOLERANCE = 1e-5  # relative to the largest value, fp32; measured 2.2e-6 at most
DIFFERENT = 2e-3  # what every negative control has to exceed; measured 5e-3 at least
Tiny = Callable[..., LlavaForConditionalGeneration]


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Checkpoints of odd sizes with biases in the attention, each written once."""

    @functools.cache
    def write(**options: Any) -> Path:
        sizes = {
            "layers": LAYERS,
            "hidden": HIDDEN,
            "intermediate": 50,
            "heads": HEADS,
            "kv_heads": 2,
            "head_dim": HEAD_DIM,
            "vocab": VOCAB,
        }
        vision = {"image_size": 12, "patch": 4, "vision_hidden": 24, "vision_layers": 2, "vision_heads": 2}
        return tiny_llava_checkpoint(tmp_path_factory.mktemp("tiny"), attention_bias=True, **{**sizes, **vision, **options})

    return write


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Callable[..., Path]) -> Tiny:
    """Models of `tiny_checkpoint`, shared between tests: not to be altered."""
    return functools.cache(lambda **options: load_llava(tiny_checkpoint(**options)))


def prompt(images: int, *, tail: int = 5) -> tuple[Tensor, Tensor | None]:
    """`images` images with words before, between and after: input_ids [1, S] and pixel_values [images, 3, 12, 12]."""
    random = torch.Generator().manual_seed(0)
    ids = [1]
    for image in range(images):
        ids += [*torch.randint(IMAGE_ID + 1, VOCAB, (2 + image,), generator=random).tolist(), *[IMAGE_ID] * VISUAL]
    ids += torch.randint(IMAGE_ID + 1, VOCAB, (tail,), generator=random).tolist()
    pixels = torch.randn(images, 3, 12, 12, generator=random) if images else None
    return torch.tensor([ids]), pixels


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of `b`."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def plain_cache(model: LlavaForConditionalGeneration, ids: Tensor, pixels: Tensor | None) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels, use_cache=True)
    return out.logits[0], [(layer.keys[0], layer.values[0]) for layer in out.past_key_values.layers]


@contextmanager
def hidden_from_layers(model: LlavaForConditionalGeneration, split: int, dropped: Tensor) -> Iterator[None]:
    """Lets no row of layers `split` and later attend to the `dropped` rows (bool [S])."""

    def mask_columns(_module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        blocked = torch.ones(len(dropped), len(dropped), dtype=torch.bool).triu(1) | dropped[None, :]
        blocked.fill_diagonal_(False)  # a dropped row sees itself, so that its softmax is defined; nobody reads it
        kwargs["attention_mask"] = torch.zeros(blocked.shape).masked_fill(blocked, -1e30)[None, None]
        return args, kwargs

    hooks = [layer.register_forward_pre_hook(mask_columns, with_kwargs=True) for layer in model.model.language_model.layers[split:]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def second_half(model: LlavaForConditionalGeneration, prefill: Prefill, rows: Tensor, positions: Tensor) -> Tensor:
    """Logits [rows, vocab] of the second half over chosen rows of `hidden_states`, at chosen positions, causal in the order given."""
    decoder = model.model.language_model
    hidden = prefill.hidden_states[rows][None]
    rotary = decoder.rotary_emb(hidden, position_ids=positions[None])
    mask = torch.full((1, 1, len(rows), len(rows)), -1e30).triu(1)
    for layer in decoder.layers[prefill.split_layer :]:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return model.lm_head(decoder.norm(hidden))[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_keeping_everything_is_the_plain_model(images: int, kv_heads: int, attention: Any, tiny: Tiny) -> None:
    model = tiny(kv_heads=kv_heads)
    model.set_attn_implementation(attention)
    ids, pixels = prompt(images)
    logits, cache = plain_cache(model, ids, pixels)
    for keep in (None, images * VISUAL or 1, images * VISUAL + 4):
        result = EagerPrunedLlava(model, 2, keep, attention=attention).prefill(ids, pixels)
        assert result.selection is None
        assert result.position_ids.tolist() == list(range(ids.shape[1]))
        assert difference(result.logits, logits) < TOLERANCE
        for (key, value), k, v in zip(cache, result.keys, result.values, strict=True):
            assert difference(key, k) < TOLERANCE
            assert difference(value, v) < TOLERANCE
    if images:  # the control: one token less is another model
        pruned = EagerPrunedLlava(model, 2, images * VISUAL - 1, attention=attention).prefill(ids, pixels)
        assert difference(pruned.logits[-1], logits[-1]) > DIFFERENT


@pytest.mark.parametrize("images", [0, 1, 2])
def test_keeping_everything_generates_the_plain_models_tokens(images: int, tiny: Tiny) -> None:
    model = tiny(seed=3)
    ids, pixels = prompt(images)
    generator: Any = copy.deepcopy(model)
    generator.generation_config.eos_token_id = None
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | ({} if pixels is None else {"pixel_values": pixels})
    expected = generator.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert EagerPrunedLlava(model, 3, None).generate(ids, pixels, 64) == expected
    assert len(set(expected)) > 3
    if images:
        assert EagerPrunedLlava(model, 1, 1).generate(ids, pixels, 64) != expected


def test_generation_stops_at_an_end_token_and_returns_it(tiny: Tiny) -> None:
    model = tiny(seed=3)
    ids, pixels = prompt(1)
    reference = EagerPrunedLlava(model, 3, 4)
    free = reference.generate(ids, pixels, 20)
    end = free[5]
    assert reference.generate(ids, pixels, 20, {end}) == free[: free.index(end) + 1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 6, 10), (6, 2, 10), (9, 1, 8), (4, 4, 48)])
@pytest.mark.parametrize(("split", "keep", "images"), [(1, 1, 1), (2, 4, 1), (4, 3, 1), (2, 1, 2), (3, 11, 2), (1, 17, 2)])
def test_pruning_is_hiding_the_dropped_tokens_from_later_layers(
    split: int, keep: int, images: int, heads: int, kv_heads: int, head_dim: int, attention: Any, tiny: Tiny
) -> None:
    model = tiny(seed=7, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    ids, pixels = prompt(images)
    result = EagerPrunedLlava(model, split, keep, attention=attention).prefill(ids, pixels)
    assert result.selection is not None
    assert result.selection.kept_indices.shape == (keep,)
    visual = (ids[0] == IMAGE_ID).nonzero()[:, 0]
    dropped = torch.zeros(ids.shape[1], dtype=torch.bool)
    dropped[visual] = True
    dropped[visual[torch.from_numpy(result.selection.kept_indices)]] = False
    assert torch.equal(result.position_ids, (~dropped).nonzero()[:, 0])

    with hidden_from_layers(model, split, dropped):
        logits, cache = plain_cache(model, ids, pixels)
    assert difference(result.logits, logits[~dropped]) < TOLERANCE
    for i, (key, value) in enumerate(cache):
        rows = slice(None) if i < split else ~dropped
        assert difference(result.keys[i], key[:, rows]) < TOLERANCE
        assert difference(result.values[i], value[:, rows]) < TOLERANCE

    with hidden_from_layers(model, split + 1 if split < LAYERS - 1 else split - 1, dropped):
        wrong_split, _ = plain_cache(model, ids, pixels)
    assert difference(result.logits[-1], wrong_split[~dropped][-1]) > DIFFERENT
    dropped[visual[torch.from_numpy(result.selection.kept_indices)[0]]] = True
    with hidden_from_layers(model, split, dropped):
        one_token_less, _ = plain_cache(model, ids, pixels)
    assert difference(result.logits[-1], one_token_less[-1]) > DIFFERENT


def test_a_prompt_without_images_is_never_pruned(tiny: Tiny) -> None:
    model = tiny()
    ids, _ = prompt(0)
    for kept in (None, np.zeros(0, np.int64)):
        result = EagerPrunedLlava(model, 2, 1).prefill(ids, kept_indices=kept)
        assert result.selection is None
        assert difference(result.logits, plain_cache(model, ids, None)[0]) < TOLERANCE
    with pytest.raises(UsageError, match="2 kept_indices were given for a prompt without visual tokens"):
        EagerPrunedLlava(model, 2, 1).prefill(ids, kept_indices=np.array([0, 1]))


def test_pre_and_post_states_are_the_layers_own_outputs(tiny: Tiny) -> None:
    model = tiny()
    ids, pixels = prompt(1)
    with torch.no_grad():
        states = model(input_ids=ids, pixel_values=pixels, output_hidden_states=True).hidden_states
    result = EagerPrunedLlava(model, 2, 4).prefill(ids, pixels)
    assert difference(result.inputs_embeds, states[0][0]) < TOLERANCE
    assert difference(result.hidden_states, states[2][0]) < TOLERANCE
    assert result.hidden_states.shape == (ids.shape[1], HIDDEN)
    assert result.post_hidden_states.shape == (ids.shape[1] - VISUAL + 4, HIDDEN)
    normed = model.lm_head(model.model.language_model.norm(result.post_hidden_states))
    assert difference(normed, result.logits) < TOLERANCE


@pytest.mark.parametrize(("split", "keep", "images"), [(1, 1, 1), (2, 4, 2), (4, 5, 1)])
def test_prefill_and_decode_are_one_forward_pass(split: int, keep: int, images: int, tiny: Tiny) -> None:
    model = tiny(seed=5, kv_heads=3)
    ids, pixels = prompt(images)
    reference, whole = EagerPrunedLlava(model, split, keep), EagerPrunedLlava(model, split, keep)
    first = reference.prefill(ids, pixels)
    following = [11, 42, 7, 7, 60, 3]
    decoded = torch.stack([reference.decode(token) for token in following])
    extended = whole.prefill(torch.cat([ids, torch.tensor([following])], dim=1), pixels)
    assert first.selection is not None
    assert extended.selection is not None
    assert first.selection.kept_indices.tolist() == extended.selection.kept_indices.tolist()
    assert difference(decoded, extended.logits[-len(following) :]) < TOLERANCE
    keys, values = reference.cached()
    for i in range(LAYERS):
        assert keys[i].shape[1] == ids.shape[1] + len(following) - (VISUAL * images - keep if i >= split else 0)
        assert difference(keys[i], extended.keys[i]) < TOLERANCE
        assert difference(values[i], extended.values[i]) < TOLERANCE
    assert first.keys[-1].shape[1] == ids.shape[1] - VISUAL * images + keep  # what prefill returned does not grow

    reference.prefill(ids, pixels)  # the control: going on from the pruned length is wrong
    reference._next_position = len(first.logits)
    assert difference(reference.decode(following[0]), decoded[0]) > DIFFERENT


def test_kept_tokens_keep_their_positions_and_order(tiny: Tiny) -> None:
    model = tiny(seed=5)
    ids, pixels = prompt(1)
    result = EagerPrunedLlava(model, 2, 4).prefill(ids, pixels)
    rows = result.position_ids
    assert difference(second_half(model, result, rows, rows), result.logits) < TOLERANCE
    renumbered = second_half(model, result, rows, torch.arange(len(rows)))
    assert difference(renumbered[-1], result.logits[-1]) > DIFFERENT
    unsorted = rows.clone()
    unsorted[3:7] = rows[3:7].flip(0)
    shuffled = second_half(model, result, unsorted, unsorted)
    assert difference(shuffled[-1], result.logits[-1]) > DIFFERENT  # a kept token now sees later ones


def test_the_order_of_kept_tokens_cannot_matter_to_the_text_where_only_one_layer_follows(tiny: Tiny) -> None:
    model = tiny(seed=5)
    ids, pixels = prompt(1)
    result = EagerPrunedLlava(model, LAYERS - 1, 4).prefill(ids, pixels)
    unsorted = result.position_ids.clone()
    unsorted[3:7] = result.position_ids[3:7].flip(0)
    shuffled = second_half(model, result, unsorted, unsorted)
    assert difference(shuffled[7:], result.logits[7:]) < TOLERANCE
    assert difference(shuffled[3:7], result.logits[3:7].flip(0)) > DIFFERENT


def test_the_choice_does_not_depend_on_the_question(tiny: Tiny) -> None:
    model = tiny(seed=2)
    reference = EagerPrunedLlava(model, 2, 3)
    ids, pixels = prompt(1, tail=2)
    other = torch.cat([ids, torch.tensor([[9, 8, 7, 6]])], dim=1)
    short, long = reference.prefill(ids, pixels).selection, reference.prefill(other, pixels).selection
    assert short is not None
    assert long is not None
    assert short.kept_indices.tolist() == long.kept_indices.tolist()
    np.testing.assert_allclose(short.scores, long.scores, atol=1e-6)


def test_score_states_are_the_projected_queries_before_rotary_with_their_bias(tiny: Tiny) -> None:
    model = tiny()
    ids, pixels = prompt(1)
    split = 3
    result = EagerPrunedLlava(model, split, 4).prefill(ids, pixels)
    layer = model.model.language_model.layers[split - 1]
    normed = layer.input_layernorm(result.layer_states[split - 2])
    projection = layer.self_attn.q_proj
    expected = normed @ projection.weight.T + projection.bias
    assert result.score_states.shape == (ids.shape[1], HEADS * HEAD_DIM)
    assert difference(result.score_states, expected) < TOLERANCE
    assert difference(result.score_states, normed @ projection.weight.T) > DIFFERENT
    visual = ids[0] == IMAGE_ID
    assert result.selection is not None
    np.testing.assert_array_equal(token_scores(result.score_states[visual].view(VISUAL, HEADS, HEAD_DIM), "trace"), result.selection.scores)
    np.testing.assert_array_equal(select_tokens(result.selection.scores, 4), result.selection.kept_indices)


@pytest.mark.parametrize("mode", ["trace", "row", "raw", "energy-high", "energy-low"])
@pytest.mark.parametrize("shape", [(20, 6, 10), (20, 9, 4), (20, 32, 128)])
def test_scores_follow_from_singular_values_of_either_gram(mode: str, shape: tuple[int, int, int]) -> None:
    queries = torch.from_numpy(np.random.default_rng(0).normal(size=shape) * np.linspace(0.1, 3, shape[0])[:, None, None])
    z = queries.numpy() - queries.numpy().mean(1, keepdims=True)
    t = (z**2).sum((1, 2)) / shape[1]
    if mode == "row":
        z = z / np.linalg.norm(z, axis=2, keepdims=True)
    p = np.linalg.svd(z, compute_uv=False) ** 2
    p = np.maximum(p / p.sum(1, keepdims=True), 1e-300)
    entropy = -(p * np.log(p)).sum(1)
    logs = np.log(shape[1])
    expected = {
        "trace": entropy / logs, "row": entropy / logs, "raw": t * (entropy - np.log(t)) / logs, "energy-high": t, "energy-low": -t,
    }[mode]  # fmt: skip
    np.testing.assert_allclose(token_scores(queries, mode), expected, atol=1e-7)


def test_modes_rank_tokens_differently() -> None:
    queries = torch.from_numpy(np.random.default_rng(1).normal(size=(40, 8, 16)) * np.linspace(0.05, 1, 40)[:, None, None])
    choices = {
        mode: tuple(select_tokens(token_scores(queries, mode), 10)) for mode in SCORE_MODES if mode not in ("random", "uniform", "dpp")
    }
    assert len(set(choices.values())) == len(choices)
    assert np.mean(choices["energy-high"]) > 33
    assert 10 < np.mean(choices["raw"]) < 30  # energies near e^(S - 1), where the raw entropy is largest
    assert np.mean(choices["energy-low"]) < 6


def test_rotary_embedding_leaves_scores_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(12, 8, 16, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(12, 16, 16, generator=generator, dtype=torch.float64)).Q
    for mode in ("trace", "row", "raw", "energy-high"):
        np.testing.assert_allclose(token_scores(queries @ rotation, mode), token_scores(queries, mode), atol=1e-12)
    scaled = token_scores(queries / 4, "raw")
    assert np.abs(scaled - token_scores(queries, "raw")).min() > 0.01  # why raw scores need the query unscaled


def test_mode_dpp_chooses_by_the_hidden_states_that_enter_the_split_layer(tiny: Tiny) -> None:
    ids, pixels = prompt(1)
    reference = EagerPrunedLlava(tiny(), 2, 4, "dpp")
    result = reference.prefill(ids, pixels)
    visual = (ids[0] == IMAGE_ID).numpy()
    order, variances = dpp_order(result.hidden_states.numpy()[visual], 4, reference.grid_width)
    assert result.selection is not None
    np.testing.assert_array_equal(result.selection.kept_indices, np.sort(order))
    np.testing.assert_array_equal(result.selection.scores, variances)
    for wrong in (result.layer_states[0], result.inputs_embeds, result.score_states):
        assert np.abs(dpp_order(wrong.numpy()[visual], 4, reference.grid_width)[1] - variances).max() > 0.01


@pytest.mark.parametrize("mode", ["trace", "row", "raw"])
def test_a_token_whose_heads_agree_scores_zero(mode: str) -> None:
    queries = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))
    queries[1] = queries[1, :1]
    scores = token_scores(queries, mode)
    assert scores[1] == 0
    assert scores[0] != 0


def test_tokens_without_a_finite_score_are_kept_last_and_counted(tiny: Tiny) -> None:
    model = tiny()
    ids, pixels = prompt(1)
    projection = model.model.language_model.layers[1].self_attn.q_proj
    reference = EagerPrunedLlava(model, 2, VISUAL - 2)

    def break_two(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, 3:5, 0] = torch.tensor([torch.nan, torch.inf])  # the first two visual rows
        return output

    with projection.register_forward_hook(break_two):
        selection = reference.prefill(ids, pixels).selection
    assert selection is not None
    assert selection.kept_indices.tolist() == list(range(2, VISUAL))
    assert selection.nonfinite_scores == 2


def test_the_lower_index_wins_a_tie() -> None:
    assert select_tokens(np.array([1.0, 2.0, 2.0, np.nan, 2.0, np.inf]), 2).tolist() == [1, 2]
    assert select_tokens(np.array([np.nan, np.nan, -5.0]), 2).tolist() == [0, 2]


@pytest.mark.parametrize("mode", ["random", "uniform", "trace", "dpp"])
def test_given_indices_replace_the_choice(mode: str, tiny: Tiny) -> None:
    model = tiny()
    ids, pixels = prompt(1)
    given = np.array([0, 3, 8])
    result = EagerPrunedLlava(model, 2, 3, mode).prefill(ids, pixels, kept_indices=given)
    assert result.selection is not None
    assert result.selection.kept_indices.tolist() == [0, 3, 8]
    assert np.isfinite(result.selection.scores).all() == (mode in ("trace", "dpp"))
    assert result.position_ids.tolist() == [0, 1, 2, 3, 6, 11, *range(12, 17)]
    other = EagerPrunedLlava(model, 2, None).prefill(ids, pixels, kept_indices=np.array([0, 4, 8]))
    assert difference(result.logits[-1], other.logits[-1]) > DIFFERENT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_layer": 0}, r"split_layer is 0, expected 1\.\.4"),
        ({"split_layer": LAYERS}, r"split_layer is 5, expected 1\.\.4"),
        ({"keep": 0}, "keep is 0, expected at least 1"),
        ({"score_mode": "entropy"}, "unknown score mode 'entropy', expected one of trace, row"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str, tiny: Tiny) -> None:
    with pytest.raises(UsageError, match=message):
        EagerPrunedLlava(tiny(), **{"split_layer": 2, "keep": 3, **options})


@pytest.mark.parametrize(("mode", "heads"), [("trace", 2), ("row", 2), ("raw", 1), ("energy-high", 1), ("energy-low", 1)])
def test_modes_that_would_see_no_difference_are_refused(mode: str, heads: int, tiny: Tiny) -> None:
    with pytest.raises(
        UsageError, match=f"score mode '{mode}' is the same for all tokens with {heads} heads, it needs at least {heads + 1}"
    ):
        EagerPrunedLlava(tiny(heads=heads, kv_heads=1), 2, 3, mode)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([3, 1, 2], r"must ascend within 0\.\.8"),
        ([1, 1, 2], "without repeats"),
        ([1, 2, 9], r"must ascend within 0\.\.8"),
        ([-1, 2, 3], r"must ascend within 0\.\.8"),
        ([1, 2], "2 kept_indices were given, expected 3 for keep=3"),
        ([], "expected integers"),
        ([0.0, 1.0, 2.0], "kept_indices are float64"),
    ],
)
def test_unusable_indices_are_refused(kept: list[int], message: str, tiny: Tiny) -> None:
    ids, pixels = prompt(1)
    with pytest.raises(UsageError, match=message):
        EagerPrunedLlava(tiny(), 2, 3).prefill(ids, pixels, kept_indices=np.array(kept))


@pytest.mark.parametrize("mode", ["random", "uniform"])
def test_modes_without_a_score_need_indices(mode: str, tiny: Tiny) -> None:
    ids, pixels = prompt(1)
    reference = EagerPrunedLlava(tiny(), 2, 3, mode)
    with pytest.raises(UsageError, match=f"does not choose tokens by '{mode}': give kept_indices"):
        reference.prefill(ids, pixels)


def test_wrong_input_is_refused(tiny: Tiny) -> None:
    ids, pixels = prompt(1)
    reference = EagerPrunedLlava(tiny(), 2, 3)
    with pytest.raises(UsageError, match="call prefill first"):
        reference.decode(3)
    with pytest.raises(InputError, match="9 image placeholders, its images give 0 visual tokens"):
        reference.prefill(ids)
    with pytest.raises(InputError, match="8 image placeholders, its images give 9 visual tokens"):
        reference.prefill(torch.cat([ids[:, :3], ids[:, 4:]], dim=1), pixels)
    with pytest.raises(InputError, match=r"shape \[2, 17\], expected \[1, S\]"):
        reference.prefill(ids.repeat(2, 1), pixels)
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        reference.generate(ids, pixels, 0)
    with pytest.raises(UsageError, match=r"torch\.bfloat16, the reference runs in torch\.float32"):
        EagerPrunedLlava(copy.deepcopy(tiny()).bfloat16(), 2, 3)
    with pytest.raises(UsageError, match=r"rotary frequencies .* rounded: load it with dtype=torch\.float32"):
        EagerPrunedLlava(copy.deepcopy(tiny()).bfloat16().float(), 2, 3)


def test_a_checkpoint_is_read_in_float32(tiny: Tiny, tiny_checkpoint: Callable[..., Path]) -> None:
    model = copy.deepcopy(tiny())
    model.load_state_dict({name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()})
    ids, pixels = prompt(1)
    expected = EagerPrunedLlava(model, 2, 3).prefill(ids, pixels)
    reference = EagerPrunedLlava(tiny_checkpoint(dtype="bfloat16"), 2, 3)
    assert reference.model.dtype == torch.float32
    assert difference(reference.prefill(ids, pixels).logits, expected.logits) == 0


def test_unusable_checkpoints_are_refused(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(CheckpointError, match="is not a directory: name a folder"):
        load_llava(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="cannot be loaded as a LLaVA checkpoint"):
        load_llava(tmp_path)
    model = tiny()
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layers.3.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(CheckpointError, match=r"lacks 1 weights, .*layers\.3\.mlp\.up_proj\.weight among them"):
        load_llava(tmp_path)


def test_answers_are_the_plain_models_words_when_nothing_is_pruned() -> None:
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    model = build_model(tokenizer, seed=1).eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8))
    question = "what is at row 1 column 2?"
    inputs = processor(text=f"USER: <image>\n{question} ASSISTANT:", images=image, return_tensors="pt")
    generator: Any = model
    plain = generator.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = str(tokenizer.decode(plain, skip_special_tokens=True)).strip()
    assert expected
    assert EagerPrunedLlava(model, 2, None).answer(question, image, processor) == expected
    assert EagerPrunedLlava(model, 2, 64).answer(question, image, processor) == expected
    assert EagerPrunedLlava(model, 2, 3).answer(question, image, processor) != expected
    assert EagerPrunedLlava(model, 2, None).answer(question, None, processor) != expected
    chosen = np.array([5, 20, 40])
    assert EagerPrunedLlava(model, 2, 3, "uniform").answer(question, image, processor, kept_indices=chosen)
