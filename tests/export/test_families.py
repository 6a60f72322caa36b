"""A LLaVA-1.5 checkpoint is described as Hugging Face understands it, its tensors found under any generation of names."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from export.checkpoint import Checkpoint
from export.families import IGNORED_SUFFIXES, FamilyWeights, adapter_for, families
from export.families.llava15 import FAMILY
from runtime.errors import CheckpointError, UsageError
from tests.models import tiny_llava_checkpoint

# From the names that save_pretrained writes to the two other generations.
GENERATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "as saved": (),
    "the hub's": ((r"^vision_tower\.", "vision_tower.vision_model."),),
    "module tree": (
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^vision_tower\.", "model.vision_tower."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ),
    "module tree with vision_model": (
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^vision_tower\.", "model.vision_tower.vision_model."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ),
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava_checkpoint(tmp_path_factory.mktemp("tiny"), kv_heads=2, head_dim=48, vocab=413)


@pytest.fixture(scope="module")
def config(tiny: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((tiny / "config.json").read_text())
    return loaded


def open_weights(directory: Path) -> FamilyWeights:
    checkpoint = Checkpoint.open(directory)
    adapter = adapter_for(checkpoint.config, "llava15")
    return FamilyWeights(checkpoint, adapter, adapter.describe(checkpoint.config))


def altered(source: Path, directory: Path, change: Callable[[Tensors], object], **entries: Any) -> Path:
    """A copy of a checkpoint with its tensors changed in place, and entries of its config."""
    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    changed = json.loads((directory / "config.json").read_text()) | entries
    (directory / "config.json").write_text(json.dumps(changed))
    return directory


def rename(tensors: Tensors, rules: tuple[tuple[str, str], ...]) -> None:
    for name in list(tensors):
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        tensors[new] = tensors.pop(name)


# ---------------------------------------------------------------- names


def test_canonical_names_read_the_parameters_that_transformers_loads(tiny: Path) -> None:
    weights = open_weights(tiny)
    weights.validate()
    model = LlavaForConditionalGeneration.from_pretrained(tiny).eval()
    parts = {"": model.model.language_model, "vision.": model.model.vision_tower, "projector.": model.model.multi_modal_projector}
    expected = {prefix + name: p.detach().numpy() for prefix, part in parts.items() for name, p in part.named_parameters()}
    expected["lm_head.weight"] = model.lm_head.weight.detach().numpy()
    unused = {name for name in expected if name.startswith(("vision.encoder.layers.2.", "vision.post_layernorm."))}
    assert set(weights.names()) == set(expected) - unused
    for name in weights.names():
        assert np.array_equal(weights.read(name), expected[name]), name
        assert weights.shape(name) == expected[name].shape


@pytest.mark.parametrize("generation", GENERATIONS)
def test_all_generations_of_names_give_equal_tensors(tiny: Path, tmp_path: Path, generation: str) -> None:
    weights, original = open_weights(altered(tiny, tmp_path / "x", lambda t: rename(t, GENERATIONS[generation]))), open_weights(tiny)
    weights.validate()
    assert weights.names() == original.names()
    for name in weights.names():
        assert np.array_equal(weights.read(name), original.read(name)), name


def test_old_buffers_are_ignored(tiny: Path, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(24)

    open_weights(altered(tiny, tmp_path / "x", add)).validate()


def test_the_published_7bs_names_are_all_known(model_configs: Path) -> None:
    folder = model_configs / "llava-1.5-7b-hf"
    spec = FAMILY.describe(json.loads((folder / "config.json").read_text()))
    stored = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = {FAMILY.canonical(name) for name in stored if not name.endswith(IGNORED_SUFFIXES)}
    needed = set(FAMILY.shapes(spec))
    assert needed <= names
    assert all(name is not None and FAMILY.is_unused(name, spec) for name in names - needed)
    assert len(names - needed) == 16 + 2  # the tower's last layer and last norm
    assert not any(FAMILY.is_unused(name, spec) for name in needed)


def test_a_tied_head_reads_as_the_embedding(tmp_path: Path) -> None:
    weights = open_weights(tiny_llava_checkpoint(tmp_path / "x", tied=True))
    weights.validate()
    assert "lm_head.weight" not in weights.names()
    assert np.array_equal(weights.read("lm_head.weight"), weights.read("embed_tokens.weight"))
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "x")
    assert np.array_equal(weights.read("lm_head.weight"), model.lm_head.weight.detach().numpy())
    values = sum(weights.read(name).size for name in weights.names())
    assert weights.bytes_to_write() == 4 * (values + weights.read("lm_head.weight").size)  # as a table and as the head's matrix


def test_biases_of_queries_keys_and_values_are_read(tmp_path: Path) -> None:
    weights = open_weights(tiny_llava_checkpoint(tmp_path / "x", attention_bias=True))
    weights.validate()  # the output projection's bias is zero
    assert weights.read("layers.3.self_attn.v_proj.bias").any()
    assert "layers.3.self_attn.o_proj.bias" not in weights.names()


# ---------------------------------------------------------------- tensors that do not fit


def head(tensors: Tensors) -> str:
    return next(name for name in tensors if name.endswith("lm_head.weight"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("language_model.model.norm.weight"), r"1 missing \(norm.weight\); use the checkpoint as published"),
        (lambda t: [t.pop(n) for n in list(t) if n.endswith("k_proj.weight")],
         r"6 missing \(layers.0.self_attn.k_proj.weight, layers.1.self_attn.k_proj.weight, layers.2.self_attn.k_proj.weight and 3 more\)"),
        (lambda t: t.update({"language_model.model.norm.bias": torch.ones(64)}), r"1 unexpected \(language_model.model.norm.bias\)"),
        (lambda t: t.update({"language_model.model.layers.9.norm": torch.ones(2)}), r"1 unexpected \(language_model.model.layers.9"),
        (lambda t: t.update({"image_newline": torch.ones(64)}), r"1 unexpected \(image_newline\)"),
        (lambda t: t.update({head(t): torch.ones(64, 413)}),
         r"1 of the wrong shape \(language_model.lm_head.weight \[64, 413\] \(expected \[413, 64\]\)\)"),
        (lambda t: t.update({"vision_tower.embeddings.position_embedding.weight": torch.ones(4, 48)}),
         r"position_embedding.weight \[4, 48\] \(expected \[5, 48\]\)"),
        (lambda t: t.update({head(t): torch.ones(413, 64, dtype=torch.int8)}),
         r"1 of a type that is not read \(language_model.lm_head.weight \(I8\)\)"),
        (lambda t: t.update({head(t) + "_scale": torch.ones(1)}), r"1 unexpected .*it looks already quantised: use the original"),
        (lambda t: [t.pop("language_model.model.norm.weight"), t.update({"extra": torch.ones(1)})],
         r"1 missing \(norm.weight\); 1 unexpected \(extra\)"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(tiny: Path, tmp_path: Path, change: Callable[[Tensors], object], message: str) -> None:
    weights = open_weights(altered(tiny, tmp_path / "x", change))
    with pytest.raises(CheckpointError, match=f"the tensors of .*/x do not fit its config.json: .*{message}"):
        weights.validate()


def test_a_config_of_another_size_is_noticed(tiny: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    text = config["text_config"] | {"num_hidden_layers": 3}
    with pytest.raises(CheckpointError, match=r"9 unexpected \(language_model.model.layers.3"):
        open_weights(altered(tiny, tmp_path / "x", lambda t: None, text_config=text)).validate()


def test_one_tensor_under_two_names_is_refused(tiny: Path, tmp_path: Path) -> None:
    changed = altered(tiny, tmp_path / "x", lambda t: t.update({"lm_head.weight": t[head(t)].clone()}))
    with pytest.raises(CheckpointError, match=r"holds (language_model\.)?lm_head.weight and .*lm_head.weight, which are the same tensor"):
        open_weights(changed)


def test_a_bias_that_is_not_implemented_must_be_zero(tmp_path: Path) -> None:
    name = "language_model.model.layers.1.self_attn.o_proj.bias"
    source = tiny_llava_checkpoint(tmp_path / "source", attention_bias=True)
    weights = open_weights(altered(source, tmp_path / "x", lambda t: t[name][3].fill_(1e-3)))
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.o_proj.bias is not zero, and such a term is not implemented"):
        weights.validate()


def test_a_head_that_is_tied_by_name_only_is_refused(tmp_path: Path) -> None:
    source = tiny_llava_checkpoint(tmp_path / "source", tied=True)
    table = "language_model.model.embed_tokens.weight"
    same = altered(source, tmp_path / "same", lambda t: t.update({"lm_head.weight": t[table].clone()}))
    open_weights(same).validate()
    other = altered(source, tmp_path / "other", lambda t: t.update({"lm_head.weight": t[table] + 1}))
    with pytest.raises(
        CheckpointError, match=r"says tie_word_embeddings, but lm_head.weight differs from the embedding: set the entry to false"
    ):
        open_weights(other).validate()


def test_a_tensor_that_is_asked_for_must_be_there(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor layers.99.mlp.up_proj.weight"):
        open_weights(tiny).read("layers.99.mlp.up_proj.weight")


# ---------------------------------------------------------------- config.json


def test_the_published_7b_is_described_rightly(model_configs: Path) -> None:
    spec = FAMILY.describe(json.loads((model_configs / "llava-1.5-7b-hf" / "config.json").read_text()))
    d, v = spec.decoder, spec.vision
    assert (d.layers, d.hidden_size, d.intermediate_size, d.query_heads, d.kv_heads, d.head_size) == (32, 4096, 11008, 32, 32, 128)
    assert (d.vocab_size, d.rms_norm_eps, d.rope_theta, d.max_positions, d.qkv_bias, d.tied_embeddings) == (
        32064,
        1e-5,
        1e4,
        4096,
        False,
        False,
    )
    assert (v.layers, v.hidden_size, v.heads, v.visual_tokens, v.activation, v.output_size) == (23, 1024, 16, 576, "quick_gelu", 4096)
    assert (v.projector_activation, v.projector_bias, v.drop_class_token, spec.image_token_id) == ("gelu", True, True, 32000)


SPARSE: list[dict[str, Any]] = [
    {},
    {"text_config": {}, "vision_config": {}},
    {"text_config": {"num_attention_heads": 64}, "image_token_id": 7},
    {"text_config": {"num_key_value_heads": 8, "head_dim": 96, "rope_theta": 5e5, "tie_word_embeddings": True}},
    {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "attention_bias": True, "rope_theta": 5.0}},
    {"text_config": {"rope_scaling": {"type": "default", "rope_theta": 33.0}, "hidden_size": 2048, "sliding_window": None}},
    {"vision_config": {"hidden_size": 96, "hidden_act": "gelu", "patch_size": 16}, "vision_feature_layer": -1, "tie_word_embeddings": True},
    {"vision_feature_layer": 5, "vision_feature_select_strategy": "full", "multimodal_projector_bias": False, "image_token_index": 9},
]


@pytest.mark.parametrize("sparse", SPARSE, ids=range(len(SPARSE)))
def test_absent_entries_have_hugging_faces_defaults(sparse: dict[str, Any]) -> None:
    given = {"model_type": "llava", **sparse}
    spec = FAMILY.describe(given)
    full: Any = LlavaConfig.from_dict(copy.deepcopy(given))
    text, vision, d, v = full.text_config, full.vision_config, spec.decoder, spec.vision
    assert (d.layers, d.hidden_size, d.intermediate_size) == (text.num_hidden_layers, text.hidden_size, text.intermediate_size)
    assert (d.query_heads, d.kv_heads, d.head_size) == (text.num_attention_heads, text.num_key_value_heads, text.head_dim)
    assert (d.vocab_size, d.rms_norm_eps, d.max_positions) == (text.vocab_size, text.rms_norm_eps, text.max_position_embeddings)
    assert (d.rope_theta, d.qkv_bias, d.tied_embeddings) == (
        text.rope_parameters["rope_theta"],
        text.attention_bias,
        full.tie_word_embeddings,
    )
    assert (v.image_size, v.patch_size, v.hidden_size, v.intermediate_size) == (
        vision.image_size, vision.patch_size, vision.hidden_size, vision.intermediate_size)  # fmt: skip
    assert (v.heads, v.layer_norm_eps, v.activation) == (vision.num_attention_heads, vision.layer_norm_eps, vision.hidden_act)
    assert v.layers == range(vision.num_hidden_layers + 1)[full.vision_feature_layer]
    assert (v.projector_activation, v.projector_bias) == (full.projector_hidden_act, full.multimodal_projector_bias)
    assert v.drop_class_token == (full.vision_feature_select_strategy == "default")
    assert spec.image_token_id == full.image_token_index


def test_describing_leaves_the_config_as_it_was(config: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    FAMILY.describe(config)
    assert config == before


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("text_config.model_type", "qwen2", "text_config.model_type = 'qwen2' is not implemented; expected 'llama'"),
        ("text_config.model_type", "mistral", "text_config.model_type = 'mistral'"),
        ("text_config.hidden_act", "gelu", "text_config.hidden_act = 'gelu' is not implemented; expected 'silu'"),
        ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}, "text_config.rope_scaling.type = 'linear' .*rope scaling is not"),
        ("text_config.rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, "text_config.rope_scaling.rope_type = 'dynamic'"),
        ("text_config.rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "text_config.rope_parameters.rope_type = 'yarn'"),
        ("text_config.rope_parameters", {"partial_rotary_factor": 0.5}, "text_config.rope_parameters.partial_rotary_factor = 0.5"),
        ("text_config.rope_parameters", {"full_attention": {"rope_theta": 1e4}}, "rope_parameters.full_attention = .* in every layer"),
        ("text_config.partial_rotary_factor", 0.5, "text_config.partial_rotary_factor = 0.5"),
        ("text_config.sliding_window", 4096, "text_config.sliding_window = 4096 is not implemented; expected no such entry"),
        ("text_config.mlp_bias", True, "text_config.mlp_bias = True is not implemented; expected False"),
        ("text_config.norm_type", "layernorm", "text_config.norm_type = 'layernorm' is not implemented"),
        ("text_config.layer_norm_eps", 1e-5, "text_config.layer_norm_eps = 1e-05 is not implemented"),
        ("text_config.num_local_experts", 8, "text_config.num_local_experts = 8 is not implemented"),
        ("text_config.hidden_size", "64", "text_config.hidden_size = '64' is not implemented; expected a whole number of at least 1"),
        ("text_config.num_hidden_layers", 1, "at least 2 decoder layers"),
        ("text_config.num_key_value_heads", 3, "4 query heads cannot share 3 key-value heads"),
        ("text_config.head_dim", 15, "even head size"),
        ("text_config.rms_norm_eps", 0, "text_config.rms_norm_eps = 0 is not implemented; expected a positive number"),
        ("text_config", [], r"text_config = \[\] is not implemented; expected an object"),
        ("vision_config.model_type", "siglip_vision_model", "vision_config.model_type = 'siglip_vision_model'"),
        ("vision_config.hidden_act", "gelu_pytorch_tanh", "vision_config.hidden_act = 'gelu_pytorch_tanh' .* 'quick_gelu' or 'gelu'"),
        ("vision_config.image_size", 30, "vision_config.image_size 30 is not a multiple of vision_config.patch_size 14"),
        ("vision_config.image_size", [28, 28], r"vision_config.image_size = \[28, 28\]"),
        ("vision_config.num_channels", 1, "vision_config.num_channels = 1 is not implemented; expected 3"),
        ("vision_config.num_attention_heads", 5, r"vision_config.num_attention_heads = 5 .*a divisor of hidden_size \(48\)"),
        ("projector_hidden_act", "relu", "projector_hidden_act = 'relu'"),
        ("multimodal_projector_bias", 1, "multimodal_projector_bias = 1 is not implemented; expected true or false"),
        ("vision_feature_layer", [-2, -5], r"vision_feature_layer = \[-2, -5\] is not implemented; expected one layer"),
        ("vision_feature_layer", -5, "vision_feature_layer = -5 .*from -4 to 3"),
        ("vision_feature_layer", 4, "vision_feature_layer = 4 .*from -4 to 3"),
        ("vision_feature_select_strategy", "cls", "vision_feature_select_strategy = 'cls'"),
        ("image_token_index", -1, "image_token_index = -1 .*at least 0"),
    ],
)  # fmt: skip
def test_an_entry_that_is_not_implemented_is_named(config: dict[str, Any], entry: str, value: object, message: str) -> None:
    changed = copy.deepcopy(config)
    *sections, last = entry.split(".")
    place = changed
    for section in sections:
        place = place[section]
    place[last] = value
    with pytest.raises(CheckpointError, match=message):
        FAMILY.describe(changed)


def test_a_hidden_size_that_heads_do_not_divide_needs_a_head_size(config: dict[str, Any]) -> None:
    text = {"hidden_size": 100, "num_attention_heads": 3}
    with pytest.raises(CheckpointError, match=r"text_config.hidden_size = 100 .*a multiple of num_attention_heads \(3\), or a head_dim"):
        FAMILY.describe(config | {"text_config": text})
    assert FAMILY.describe(config | {"text_config": text | {"head_dim": 32}}).decoder.head_size == 32


def test_a_sliding_window_that_is_switched_off_is_none(config: dict[str, Any]) -> None:
    text = config["text_config"] | {"sliding_window": 4096, "use_sliding_window": False}
    assert FAMILY.describe(config | {"text_config": text}) == FAMILY.describe(config)


@pytest.mark.parametrize(("layer", "runs"), [(-1, 3), (-2, 2), (-4, 0), (0, 0), (1, 1), (3, 3)])
def test_the_feature_layer_says_how_many_layers_run(config: dict[str, Any], layer: int, runs: int) -> None:
    spec = FAMILY.describe(config | {"vision_feature_layer": layer})
    assert spec.vision.layers == runs
    assert sum(name.endswith("mlp.fc1.weight") for name in FAMILY.shapes(spec)) == runs


# ---------------------------------------------------------------- which family


def test_the_family_is_found_by_name(config: dict[str, Any]) -> None:
    assert "llava15" in families()
    assert adapter_for(config, "llava15") is FAMILY
    with pytest.raises(UsageError, match=r"there is no model family 'llava': known are .*llava15"):
        adapter_for(config, "llava")


@pytest.mark.parametrize("folder", ["llava-v1.6-vicuna-7b-hf", "Qwen2.5-VL-7B-Instruct"])
def test_another_architecture_is_refused(model_configs: Path, folder: str) -> None:
    other = json.loads((model_configs / folder / "config.json").read_text())
    message = f"the checkpoint is not of family llava15: its config.json has model_type '{other['model_type']}' and architectures"
    with pytest.raises(CheckpointError, match=message):
        adapter_for(other, "llava15")
    with pytest.raises(CheckpointError, match=r"config.json is not of a LlavaForConditionalGeneration"):
        FAMILY.describe(other)


def test_an_unconverted_llava_checkpoint_is_refused() -> None:
    original = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
    with pytest.raises(CheckpointError, match=r"architectures \['LlavaLlamaForCausalLM'\]"):
        adapter_for(original, "llava15")


# ---------------------------------------------------------------- the factory of tiny checkpoints


def test_the_same_arguments_give_the_same_checkpoint(tiny: Path, tmp_path: Path) -> None:
    again = tiny_llava_checkpoint(tmp_path / "again", kv_heads=2, head_dim=48, vocab=413)
    other = tiny_llava_checkpoint(tmp_path / "other", kv_heads=2, head_dim=48, vocab=413, seed=1)
    revisions = [Checkpoint.open(directory).revision for directory in (tiny, again, other)]
    assert revisions[0] == revisions[1] != revisions[2]


@pytest.mark.parametrize(("size", "tokens"), [(14, 1), (28, 4), (42, 9), (56, 16)])
def test_odd_sizes_and_shards_can_be_made(tmp_path: Path, size: int, tokens: int) -> None:
    directory = tiny_llava_checkpoint(
        tmp_path / "x", image_size=size, vocab=413, hidden=96, heads=6, kv_heads=3, head_dim=48, dtype="bfloat16", shard_size="100KB"
    )
    checkpoint = Checkpoint.open(directory)
    assert len(checkpoint.weight_files) > 1
    assert {checkpoint.dtype(name) for name in checkpoint.names()} == {"bfloat16"}
    weights = open_weights(directory)
    weights.validate()
    assert weights.shape("layers.0.self_attn.k_proj.weight") == (144, 96)
    assert FAMILY.describe(checkpoint.config).vision.visual_tokens == tokens
    assert checkpoint.image_token(FAMILY.describe(checkpoint.config).image_token_id) == "<image>"
    assert {"tokenizer.json", "processor_config.json", "chat_template.jinja", "generation_config.json"} <= set(checkpoint.text_files())
