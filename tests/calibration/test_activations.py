"""What the hooks read: the right tensors, visual rows alone, and nothing that stays in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from calibration.activations import AUDITED, Measurement, Probe, VisionLanguageReader, load_reader
from calibration.audit import PrecisionAudit
from calibration.image_set import DEFAULT_PROMPT
from calibration.matrix_entropy import EntropyDefinition, layer_entropy
from export.eager import EagerPrunedLlava, encode_question
from runtime.errors import CheckpointError, InputError, UsageError


@pytest.fixture(scope="module")
def reader(plain: Path) -> VisionLanguageReader:
    return load_reader(plain, "llava15", "cpu", "float32")


@pytest.fixture(scope="module")
def picture(images: Path) -> Image.Image:
    return Image.open(images / "00.png").convert("RGB")


def by_hand(plain: Path, picture: Image.Image, split: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """From the reference of the exporter: what enters each layer, the queries of layer split-1, and which rows are visual."""
    eager = EagerPrunedLlava(plain, split, None)
    ids, pixels = encode_question(load_reader(plain, "llava15", "cpu", "float32").processor, DEFAULT_PROMPT, picture)
    prefill = eager.prefill(ids, pixels)
    return [prefill.inputs_embeds, *prefill.layer_states], prefill.score_states, ids[0] == eager.model.config.image_token_id


def test_hidden_states_are_what_enters_each_layer_and_what_leaves_the_last(
    reader: VisionLanguageReader, plain: Path, picture: Image.Image
) -> None:
    states, _, visual = by_hand(plain, picture, 1)
    found = reader.measure(picture, DEFAULT_PROMPT, Probe())
    assert found.visual_tokens == 16
    assert found.curve == pytest.approx([layer_entropy(s[visual], EntropyDefinition()) for s in states], abs=1e-5)
    assert found.largest["hidden"] == pytest.approx([float(s.abs().max()) for s in states], rel=1e-4)
    with_text = [layer_entropy(s, EntropyDefinition()) for s in states]
    assert found.curve != pytest.approx(with_text, abs=1e-3)


@pytest.mark.parametrize("layer", [0, 3, 6])
def test_queries_are_the_projections_of_their_layer(reader: VisionLanguageReader, plain: Path, picture: Image.Image, layer: int) -> None:
    _, queries, visual = by_hand(plain, picture, layer + 1)
    found = reader.measure(picture, DEFAULT_PROMPT, Probe("query"))
    assert len(found.curve) == 8
    assert found.curve[layer] == pytest.approx(layer_entropy(queries[visual], EntropyDefinition()), abs=1e-5)


def test_keys_values_and_heads_have_curves_of_their_own(reader: VisionLanguageReader, picture: Image.Image) -> None:
    probes = [Probe("query"), Probe("key"), Probe("value"), Probe("query", "heads")]
    curves = [reader.measure(picture, DEFAULT_PROMPT, probe).curve for probe in probes]
    assert len(set(curves)) == 4
    assert all(len(curve) == 8 and min(curve) > 0 and max(curve) < 1 for curve in curves)


def test_a_question_after_the_image_changes_no_entropy(reader: VisionLanguageReader, picture: Image.Image) -> None:
    one, other = (reader.measure(picture, prompt, Probe()).curve for prompt in ("what is this?", "read row 2 and count the digits."))
    assert one == pytest.approx(other, abs=1e-5)


def test_two_key_heads_are_refused_per_token_and_taken_over_tokens(reader: VisionLanguageReader, picture: Image.Image) -> None:
    with pytest.raises(UsageError, match=r"is 0 for every token with 2 head\(s\)"):
        reader.measure(picture, DEFAULT_PROMPT, Probe("key", "heads"))
    assert reader.measure(picture, DEFAULT_PROMPT, Probe("key", "tokens")).curve
    with pytest.raises(UsageError, match="hidden states have no heads"):
        Probe("hidden", "heads")


def live_tensor_bytes() -> int:
    gc.collect()
    return sum(t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is Tensor)


def test_no_activation_outlives_its_image(reader: VisionLanguageReader, picture: Image.Image) -> None:
    kept: list[Measurement] = [reader.measure(picture, DEFAULT_PROMPT, Probe())]
    before = live_tensor_bytes()
    kept += [reader.measure(picture, DEFAULT_PROMPT, Probe()) for _ in range(5)]
    assert live_tensor_bytes() == before
    states = torch.zeros(16, 64)  # one layer's states would be seen
    assert live_tensor_bytes() == before + states.untyped_storage().nbytes()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in reader.decoder.layers.modules())


def poison(reader: VisionLanguageReader, name: str, value: float) -> Callable[[], None]:
    """Sets one weight; returns what puts it back."""
    weight = dict(reader.decoder.named_parameters())[name].data
    before = weight[0, 0].item()
    weight[0, 0] = value

    def restore() -> None:
        weight[0, 0] = before

    return restore


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.2.mlp.down_proj.weight", float("nan"), "layer 3: hidden states hold NaN or infinity in float32: check the checkpoint's"),
        ("layers.4.self_attn.v_proj.weight", float("inf"), "layer 4: values hold NaN or infinity"),
        ("layers.5.mlp.gate_proj.weight", float("nan"), "layer 5: MLP intermediates hold NaN or infinity"),
        ("layers.7.mlp.down_proj.weight", float("nan"), "layer 8: hidden states hold NaN or infinity"),
    ],
)
def test_an_activation_that_is_not_finite_names_layer_and_tensor(
    reader: VisionLanguageReader, picture: Image.Image, name: str, value: float, message: str
) -> None:
    restore = poison(reader, name, value)
    try:
        with pytest.raises(InputError, match=message):
            reader.measure(picture, DEFAULT_PROMPT, Probe())
    finally:
        restore()
    reader.measure(picture, DEFAULT_PROMPT, Probe())


def test_half_precision_gives_nearly_the_same_curve(plain: Path, reader: VisionLanguageReader, picture: Image.Image) -> None:
    half = load_reader(plain, "llava15", "cpu", "bfloat16")
    assert half.model.dtype == torch.bfloat16
    expected = reader.measure(picture, DEFAULT_PROMPT, Probe()).curve
    assert half.measure(picture, DEFAULT_PROMPT, Probe()).curve == pytest.approx(expected, abs=0.02)


def test_a_model_without_vision_is_refused() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    with pytest.raises(CheckpointError, match="LlamaForCausalLM has no image token: calibration needs a vision-language model"):
        VisionLanguageReader(LlamaForCausalLM(config), None)


def test_devices_and_families_that_are_not_there_are_refused(plain: Path) -> None:
    with pytest.raises(UsageError, match="models of family qwen25vl cannot be calibrated yet: those of llava15 can"):
        load_reader(plain, "qwen25vl", "cpu", "float32")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--device cuda: torch sees no CUDA device here"):
            load_reader(plain, "llava15", "cuda", "float32")


# ---------------------------------------------------------------- the audit


def audit(**largest: float) -> PrecisionAudit:
    return PrecisionAudit.over([{name: (0.5, largest.get(name, 0.5)) for name in AUDITED}, dict.fromkeys(AUDITED, (1.0, 1.0))])


def test_the_audit_takes_the_largest_of_all_images_and_names_it() -> None:
    found = audit(mlp=100.0, query=99.0)
    assert (found.tensor, found.layer, found.value, found.largest["key"]) == ("mlp", 1, 100.0, (1.0, 1.0))
    assert found.fits_fp16
    assert found.describe() == (
        "fp16 is safe: the largest absolute activation is 100 (MLP intermediate of layer 1), 1/655 of fp16's 65504; "
        "a headroom of 4 is asked for"
    )


def test_values_near_or_beyond_fp16_need_bf16() -> None:
    near, beyond = audit(hidden=16377.0), audit(value=70000.0)
    assert not near.fits_fp16
    assert near.describe().startswith("bf16 is needed: the largest absolute activation is 16377 (output of the last layer, 0), 1/4 of")
    assert (
        beyond.describe()
        == "bf16 is needed: the largest absolute activation is 70000 (value of layer 1), beyond fp16's largest number, 65504"
    )
    assert audit(hidden=16376.0).fits_fp16
