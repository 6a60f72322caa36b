"""What a checkpoint's own forward pass computes, layer by layer, reduced to numbers while it runs.

Hooks on transformers' decoder layers and their projections see each activation once, reduce it to one entropy and one largest absolute
value, and let it go: no activation outlives its layer.

    tensor   index l is                                                             from
    hidden   the input of layer l, 0..L-1; l = L is what leaves the last layer      hooks on the layers (the final norm is not run through)
    query    what the query projection of layer l gives, bias included, no rotary   self_attn.q_proj
    key      the same of the key projection                                         self_attn.k_proj
    value    the same of the value projection                                       self_attn.v_proj

A family whose decoder has these names needs nothing here; its loader stands in `LOADERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from calibration.matrix_entropy import EntropyDefinition, check_heads, head_entropies, layer_entropy
from calibration.questions import process
from export.eager import load_llava
from runtime.errors import CheckpointError, InputError, UsageError

__all__ = ["AUDITED", "Measurement", "Probe", "VisionLanguageReader", "load_reader"]

TensorName = Literal["hidden", "query", "key", "value"]
MatrixName = Literal["tokens", "heads"]
TENSORS: tuple[TensorName, ...] = ("hidden", "query", "key", "value")
PROJECTIONS: Mapping[str, str] = MappingProxyType({"query": "q_proj", "key": "k_proj", "value": "v_proj"})
AUDITED = ("hidden", "query", "key", "value", "mlp")  # mlp: the input of down_proj, the widest and usually largest
LOADERS: Mapping[str, Callable[[Path, str, torch.dtype], Any]] = MappingProxyType({"llava15": load_llava})


@dataclass(frozen=True, slots=True)
class Probe:
    """What is measured: of which tensor, and of which matrix.

    Attributes:
        tensor: see the module's table.
        matrix: `tokens`: one matrix [N, width] for each layer, its rows the visual tokens. `heads`: one [H, d_h] for each visual token, as
            the score reads it; the layer's value is the mean over the tokens.
        entropy: what is done to the rows.
    """

    tensor: TensorName = "hidden"
    matrix: MatrixName = "tokens"
    entropy: EntropyDefinition = field(default_factory=EntropyDefinition)

    def __post_init__(self) -> None:
        if self.matrix == "heads" and self.tensor == "hidden":
            raise UsageError("hidden states have no heads: take --tensor query, key or value with --matrix heads, or --matrix tokens")

    def heads(self, query_heads: int, kv_heads: int) -> int:
        """How many heads the tensor has; hidden states, which have none, are not asked."""
        return query_heads if self.tensor == "query" else kv_heads

    def check(self, query_heads: int, kv_heads: int) -> None:
        """Raises UsageError where the entropy over heads would be 0 whatever the tokens; over tokens any number of heads will do."""
        if self.matrix == "heads":
            check_heads(self.heads(query_heads, kv_heads), self.entropy)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Of one image: `curve` holds S for each index l; `largest` for each audited tensor the largest absolute value for each index l,
    over all rows of the prompt; `visual_tokens` is N.
    """

    visual_tokens: int
    curve: tuple[float, ...]
    largest: dict[str, tuple[float, ...]]


class VisionLanguageReader:
    """A loaded model and its processor, run one image at a time.

    Args:
        model: transformers' model, on its device, in its type.
        processor: the checkpoint's Hugging Face processor.

    Raises:
        CheckpointError: the model has no image token, or its decoder's layers do not have the names that hooks need.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor
        self.image_token_id = getattr(model.config, "image_token_id", None)
        if self.image_token_id is None:
            raise CheckpointError(f"{type(model).__name__} has no image token: calibration needs a vision-language model")
        self.decoder = model.get_decoder()
        names = dict(self.decoder.layers[0].named_modules())
        missing = [part for part in (*(f"self_attn.{p}" for p in PROJECTIONS.values()), "mlp.down_proj") if part not in names]
        if missing:
            raise CheckpointError(f"layers of {type(self.decoder).__name__} have no {missing[0]}: this decoder cannot be read yet")

    @torch.inference_mode()
    def measure(self, image: Image.Image, prompt: str, probe: Probe) -> Measurement:
        """Runs one image with a question through the model.

        Raises:
            InputError: the prompt has no visual tokens, or an activation is not finite (layer and tensor are named).
            UsageError: too few heads for the probe, or too little memory on the device.
        """
        heads = self.decoder.config.num_attention_heads, self.decoder.config.num_key_value_heads
        probe.check(*heads)
        inputs = self._encode(image, prompt)
        rows = (inputs["input_ids"][0] == self.image_token_id).nonzero()[:, 0]
        if not len(rows):
            raise InputError("the prompt has no visual tokens: the checkpoint's chat template or processor places no image")
        taps = _Taps(probe, rows, probe.heads(*heads), len(self.decoder.layers))
        try:
            with taps.on(self.decoder.layers):
                self.model.model(**inputs, use_cache=False)
        except torch.OutOfMemoryError as error:
            raise UsageError("the device's memory is full: take --dtype bfloat16, or --device cpu") from error
        return taps.result()

    def _encode(self, image: Image.Image, prompt: str) -> dict[str, Any]:
        """The processor's tensors, on the model's device; floating-point ones in the model's type."""
        parts = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        encoded = process(self.processor, text, image, prompt)
        dtype, device = self.model.dtype, self.model.device
        return {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in encoded.items()}


def load_reader(checkpoint: Path, family: str, device: str, dtype: str) -> VisionLanguageReader:
    """Loads a checkpoint's model and processor.

    Args:
        device: `cpu` or `cuda`.
        dtype: torch's name of the type it is run in.

    Raises:
        UsageError: there is no such device, or no loader for the family.
        CheckpointError: the checkpoint cannot be loaded.
    """
    if family not in LOADERS:
        raise UsageError(f"models of family {family} cannot be calibrated yet: those of {', '.join(LOADERS)} can")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; take --device cpu, or install a CUDA build of torch")
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(checkpoint, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the processor of {checkpoint} cannot be loaded ({error}): save the checkpoint's own there") from error
    try:
        return VisionLanguageReader(LOADERS[family](checkpoint, "sdpa", getattr(torch, dtype)).to(device), processor)
    except torch.OutOfMemoryError as error:
        raise UsageError(f"{checkpoint} does not fit the device: take --dtype bfloat16, or --device cpu") from error


class _Taps:
    """The hooks of one forward pass, and what they have reduced so far."""

    def __init__(self, probe: Probe, rows: Tensor, heads: int, layers: int) -> None:
        self.probe, self.rows, self.heads, self.layers = probe, rows, heads, layers
        self.curve: dict[int, float] = {}
        self.largest: dict[str, dict[int, float]] = {name: {} for name in AUDITED}

    @contextmanager
    def on(self, layers: Any) -> Iterator[None]:
        """Hooks every layer for the length of the block."""
        handles = []
        try:
            for index, layer in enumerate(layers):
                handles.append(layer.register_forward_pre_hook(self._incoming("hidden", index), with_kwargs=True))
                handles.append(layer.mlp.down_proj.register_forward_pre_hook(self._incoming("mlp", index), with_kwargs=True))
                for name, projection in PROJECTIONS.items():
                    handles.append(getattr(layer.self_attn, projection).register_forward_hook(self._outgoing(name, index)))
            handles.append(layers[-1].register_forward_hook(self._outgoing("hidden", len(layers))))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self) -> Measurement:
        curve = tuple(self.curve[index] for index in sorted(self.curve))
        return Measurement(len(self.rows), curve, {name: tuple(v[i] for i in sorted(v)) for name, v in self.largest.items()})

    def _incoming(self, name: str, index: int) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(name, index, args[0] if args else kwargs["hidden_states"])

        return hook

    def _outgoing(self, name: str, index: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            self._see(name, index, output[0] if isinstance(output, tuple) else output)

        return hook

    def _see(self, name: str, index: int, states: Tensor) -> None:
        """Reduces one activation [1, S, width]."""
        largest = float(states.abs().max())
        if not math.isfinite(largest):
            dtype = str(states.dtype).removeprefix("torch.")
            advice = "take --dtype bfloat16 or float32" if dtype == "float16" else "check the checkpoint's weights"
            raise InputError(f"layer {index}: {_WORDS[name]} hold NaN or infinity in {dtype}: {advice}")
        self.largest[name][index] = largest
        if name == self.probe.tensor:
            self.curve[index] = self._entropy(states[0, self.rows])

    def _entropy(self, visual: Tensor) -> float:
        if self.probe.matrix == "tokens":
            return layer_entropy(visual, self.probe.entropy)
        return float(head_entropies(visual.reshape(len(visual), self.heads, -1), self.probe.entropy).mean())


_WORDS = MappingProxyType({
    "hidden": "hidden states", "query": "queries", "key": "keys", "value": "values", "mlp": "MLP intermediates",
})  # fmt: skip
