"""LLaVA-1.5: a CLIP vision tower, a two-layer projector, and a Llama decoder (`LlavaForConditionalGeneration`).

Entries that a config.json leaves out have the defaults of Hugging Face's configuration classes; published checkpoints list
little more than what differs from them.
"""

from __future__ import annotations

from typing import Any

from export.families import HEAD, ConfigEntries
from export.spec import ClipVisionSpec, DecoderSpec, ModelSpec
from runtime.errors import CheckpointError

MODEL_TYPE = "llava"
ARCHITECTURE = "LlavaForConditionalGeneration"
ACTIVATIONS = ("quick_gelu", "gelu")

# Stored prefix -> canonical prefix; the first that fits. Three generations of names are in the wild: the hub's
# (language_model.model.*), newer files without vision_model, and the module tree's own (model.language_model.*).
PREFIXES = (
    ("language_model.model.", ""),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", ""),
    ("lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "vision."),
    ("vision_tower.", "vision."),
    ("model.vision_tower.vision_model.", "vision."),
    ("model.vision_tower.", "vision."),
    ("multi_modal_projector.", "projector."),
    ("model.multi_modal_projector.", "projector."),
)

# Entries of the decoder's config that would change its arithmetic, and the values that do not. Some belong to relatives of
# Llama and are read by no Llama; a checkpoint that sets them was not made for a plain Llama decoder.
PLAIN_LLAMA: dict[str, tuple[object, ...]] = {
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "norm_type": ("rms", "rmsnorm", "rms_norm", "RMSNorm"),
    "layer_norm_eps": (),
    "layer_norm_epsilon": (),
    "norm_bias": (False,),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "num_local_experts": (),
    "num_experts": (),
}
# CLIPVisionConfig's defaults, and those of the tower that LlavaConfig assumes when there is no vision_config at all.
CLIP_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "layers": 12, "heads": 12, "image_size": 224, "patch_size": 32}
LLAVA_CLIP_DEFAULTS = {"hidden_size": 1024, "intermediate_size": 4096, "layers": 24, "heads": 16, "image_size": 336, "patch_size": 14}


class Llava15:
    """The adapter."""

    name = "llava15"

    def matches(self, config: dict[str, Any]) -> bool:
        listed = config.get("architectures") or [ARCHITECTURE]
        return config.get("model_type") == MODEL_TYPE and isinstance(listed, list) and ARCHITECTURE in listed

    def describe(self, config: dict[str, Any]) -> ModelSpec:
        """Reads a config.json.

        Raises:
            CheckpointError: names the entry that is malformed or not implemented.
        """
        if not self.matches(config):
            raise CheckpointError(f"config.json is not of a {ARCHITECTURE}: model_type is {config.get('model_type')!r}")
        top = ConfigEntries(config)
        decoder = _decoder(top, top.section("text_config"))
        image_token = "image_token_id" if config.get("image_token_id") is not None else "image_token_index"
        return ModelSpec(self.name, decoder, _vision(top, decoder.hidden_size), top.count(image_token, 32000, minimum=0))

    def canonical(self, stored: str) -> str | None:
        for prefix, canonical in PREFIXES:
            if stored.startswith(prefix):
                return canonical + stored.removeprefix(prefix)
        return None

    def shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        return {**_decoder_shapes(spec.decoder), **_vision_shapes(spec.vision), **_projector_shapes(spec.vision)}

    def is_unused(self, name: str, spec: ModelSpec) -> bool:
        """The tower's layers after the feature layer, and its last norm, which only the pooled output passes."""
        parts = name.split(".")
        if parts[:3] == ["vision", "encoder", "layers"] and len(parts) > 3 and parts[3].isdigit():
            return int(parts[3]) >= spec.vision.layers
        return parts[:2] == ["vision", "post_layernorm"]

    def only_if_zero(self, name: str) -> bool:
        """With `attention_bias`, Llama's output projection has a bias too: zero where the weights come from a model without."""
        return name.startswith("layers.") and name.endswith(".self_attn.o_proj.bias")


FAMILY = Llava15()


# ---------------------------------------------------------------- config.json


def _decoder(top: ConfigEntries, text: ConfigEntries) -> DecoderSpec:
    text.choice("model_type", "llama", ("llama",))
    text.choice("hidden_act", "silu", ("silu", "swish"))
    for entry, accepted in PLAIN_LLAMA.items():
        text.require(entry, *accepted)
    if text.flag("use_sliding_window", True):
        text.require("sliding_window")
    hidden_size, query_heads = text.count("hidden_size", 4096), text.count("num_attention_heads", 32)
    if text.values.get("head_dim") is None and hidden_size % query_heads:
        raise text.error("hidden_size", f"a multiple of num_attention_heads ({query_heads}), or a head_dim")
    return DecoderSpec(
        layers=text.count("num_hidden_layers", 32),
        hidden_size=hidden_size,
        intermediate_size=text.count("intermediate_size", 11008),
        query_heads=query_heads,
        kv_heads=text.count("num_key_value_heads", query_heads),
        head_size=text.count("head_dim", hidden_size // query_heads),
        vocab_size=text.count("vocab_size", 32000),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(text),
        max_positions=text.count("max_position_embeddings", 2048),
        qkv_bias=text.flag("attention_bias", False),
        tied_embeddings=top.flag("tie_word_embeddings", False) or text.flag("tie_word_embeddings", False),
    )


def _rope_theta(text: ConfigEntries) -> float:
    """The base of the rotary angles: in `rope_parameters`, in the older `rope_scaling`, or beside them."""
    theta = text.number("rope_theta", 10000.0)
    for name in ("rope_parameters", "rope_scaling"):  # the later goes first, as in Hugging Face
        rope = text.section(name)
        for kind in ("rope_type", "type"):
            if rope.values.get(kind) not in (None, "default"):
                raise rope.error(kind, "'default' (rope scaling is not implemented)")
        for kind, value in rope.values.items():
            if isinstance(value, dict):  # one set per type of layer, as in models that mix full and sliding attention
                raise rope.error(kind, "the same rotary angles in every layer")
        rope.require("partial_rotary_factor", 1.0)
        theta = rope.number("rope_theta", theta)
    return theta


def _vision(top: ConfigEntries, output_size: int) -> ClipVisionSpec:
    vision = top.section("vision_config")
    default = CLIP_DEFAULTS if top.values.get("vision_config") is not None else LLAVA_CLIP_DEFAULTS
    vision.choice("model_type", "clip_vision_model", ("clip_vision_model",))
    vision.require("num_channels", 3)
    image_size, patch_size = vision.count("image_size", default["image_size"]), vision.count("patch_size", default["patch_size"])
    if image_size % patch_size:
        raise CheckpointError(
            f"config.json: vision_config.image_size {image_size} is not a multiple of vision_config.patch_size {patch_size}"
        )
    hidden_size, heads = vision.count("hidden_size", default["hidden_size"]), vision.count("num_attention_heads", default["heads"])
    if hidden_size % heads:
        raise vision.error("num_attention_heads", f"a divisor of hidden_size ({hidden_size})")
    return ClipVisionSpec(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        intermediate_size=vision.count("intermediate_size", default["intermediate_size"]),
        layers=_layers_that_run(top, vision.count("num_hidden_layers", default["layers"])),
        heads=heads,
        layer_norm_eps=vision.number("layer_norm_eps", 1e-5),
        activation=vision.choice("hidden_act", "quick_gelu", ACTIVATIONS),
        projector_activation=top.choice("projector_hidden_act", "gelu", ACTIVATIONS),
        projector_bias=top.flag("multimodal_projector_bias", True),
        output_size=output_size,
        drop_class_token=top.choice("vision_feature_select_strategy", "default", ("default", "full")) == "default",
    )


def _layers_that_run(top: ConfigEntries, layers: int) -> int:
    """`vision_feature_layer` counts hidden states: 0 is the first layer's input, -1 the last layer's output."""
    value = top.values.get("vision_feature_layer")
    value = -2 if value is None else value
    if isinstance(value, list):
        raise top.error("vision_feature_layer", "one layer (several are not concatenated)")
    if not isinstance(value, int) or isinstance(value, bool) or not -layers - 1 <= value <= layers:
        raise top.error("vision_feature_layer", f"a whole number from {-layers - 1} to {layers}")
    return value if value >= 0 else layers + 1 + value


# ---------------------------------------------------------------- tensors


def _decoder_shapes(d: DecoderSpec) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (d.vocab_size, d.hidden_size)}
    for i in range(d.layers):
        layer, attention = f"layers.{i}", f"layers.{i}.self_attn"
        shapes[f"{layer}.input_layernorm.weight"] = (d.hidden_size,)
        for name, width in (("q_proj", d.query_width), ("k_proj", d.kv_width), ("v_proj", d.kv_width)):
            shapes[f"{attention}.{name}.weight"] = (width, d.hidden_size)
            if d.qkv_bias:
                shapes[f"{attention}.{name}.bias"] = (width,)
        shapes[f"{attention}.o_proj.weight"] = (d.hidden_size, d.query_width)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (d.hidden_size,)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{layer}.mlp.{name}.weight"] = (d.intermediate_size, d.hidden_size)
        shapes[f"{layer}.mlp.down_proj.weight"] = (d.hidden_size, d.intermediate_size)
    shapes["norm.weight"] = (d.hidden_size,)
    if not d.tied_embeddings:
        shapes[HEAD] = (d.vocab_size, d.hidden_size)
    return shapes


def _vision_shapes(v: ClipVisionSpec) -> dict[str, tuple[int, ...]]:
    width = v.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "vision.embeddings.class_embedding": (width,),
        "vision.embeddings.patch_embedding.weight": (width, 3, v.patch_size, v.patch_size),
        "vision.embeddings.position_embedding.weight": (v.grid**2 + 1, width),
        "vision.pre_layrnorm.weight": (width,),
        "vision.pre_layrnorm.bias": (width,),
    }
    for i in range(v.layers):
        layer = f"vision.encoder.layers.{i}"
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{norm}.weight": (width,), f"{layer}.{norm}.bias": (width,)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}.self_attn.{name}.weight": (width, width), f"{layer}.self_attn.{name}.bias": (width,)}
        for name, out, into in (("fc1", v.intermediate_size, width), ("fc2", width, v.intermediate_size)):
            shapes |= {f"{layer}.mlp.{name}.weight": (out, into), f"{layer}.mlp.{name}.bias": (out,)}
    return shapes


def _projector_shapes(v: ClipVisionSpec) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, into in (("linear_1", v.hidden_size), ("linear_2", v.output_size)):
        shapes[f"projector.{name}.weight"] = (v.output_size, into)
        if v.projector_bias:
            shapes[f"projector.{name}.bias"] = (v.output_size,)
    return shapes
