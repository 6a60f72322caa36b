"""What the graph builders need to know about a model, whatever its family: plain numbers, no Hugging Face types."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from runtime.errors import CheckpointError

GRAPH_DTYPES: Final = MappingProxyType({"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"})
"""The type of weights, activations and cache in the graphs of a precision."""


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A Llama-type decoder: RMSNorm, rotary embedding, grouped-query attention, gated SiLU MLP."""

    layers: int
    hidden_size: int
    intermediate_size: int
    query_heads: int
    kv_heads: int
    head_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    qkv_bias: bool = False
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.query_heads % self.kv_heads:
            raise CheckpointError(f"{self.query_heads} query heads cannot share {self.kv_heads} key-value heads evenly; check config.json")
        if self.head_size % 2:
            raise CheckpointError(f"rotary embedding needs an even head size, config.json gives {self.head_size}")
        if self.layers < 2:
            raise CheckpointError(f"a split needs at least 2 decoder layers, config.json gives {self.layers}")

    @property
    def query_width(self) -> int:
        return self.query_heads * self.head_size

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_size

    def kv_bytes_per_token(self, layers: int, bytes_per_value: int = 4) -> int:
        """Bytes one token takes in the KV cache of `layers` layers."""
        return 2 * layers * self.kv_width * bytes_per_value


@dataclass(frozen=True, slots=True)
class ClipVisionSpec:
    """A CLIP vision tower cut at its feature layer, and LLaVA's two-layer projector.

    `layers` counts the layers that run (feature layer -2 of a tower of 24 runs 23); `drop_class_token` is LLaVA's "default"
    selection; `activation` and `projector_activation` are "quick_gelu" or "gelu".
    """

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    layer_norm_eps: float
    activation: str
    projector_activation: str
    projector_bias: bool
    output_size: int
    drop_class_token: bool = True

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def visual_tokens(self) -> int:
        """Tokens that one image gives the decoder."""
        return self.grid**2 + (0 if self.drop_class_token else 1)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One checkpoint's decoder and vision tower. `family` names the adapter; `image_token_id` marks visual tokens in a prompt."""

    family: str
    decoder: DecoderSpec
    vision: ClipVisionSpec
    image_token_id: int


def head_widths(vocab_size: int, pieces: int) -> tuple[int, ...]:
    """Columns of the vocabulary in each piece of the head: multiples of 8 (but the last one), as equal as that allows."""
    width = -(-vocab_size // (8 * pieces)) * 8
    return tuple(min(width, vocab_size - start) for start in range(0, vocab_size, width))
