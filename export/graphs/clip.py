"""The `vision` graph of LLaVA: a CLIP vision tower cut at its feature layer, and the two-layer projector.

| | tensor | shape | dtype |
|---|---|---|---|
| input | `pixel_values` | [images, 3, image_size, image_size] | float32 |
| output | `image_embeds` | [images * N, d] | float |

Patches are cut by reshaping and multiplied as a matrix: the same numbers as the convolution, and no kernel to look for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from export.graphs.builder import GraphBuilder
from export.graphs.decoder import ReadWeight
from export.spec import ClipVisionSpec
from export.weights import WeightFile
from runtime import names


def build_clip_vision(spec: ClipVisionSpec, read: ReadWeight, weights: WeightFile, dtype: str = "float32") -> GraphBuilder:
    """Builds the graph; weights go to `weights` as they are met (canonical names `vision.*`, `projector.*`)."""
    return _Clip(spec, read, weights, dtype).build()


class _Clip:
    def __init__(self, spec: ClipVisionSpec, read: ReadWeight, weights: WeightFile, dtype: str) -> None:
        self.spec, self._read, self._weights, self._dtype = spec, read, weights, dtype
        self.b = GraphBuilder(names.VISION)
        self.op = self.b.op
        self._activations: dict[str, Callable[[ir.Value], ir.Value]] = {"quick_gelu": self._quick_gelu, "gelu": self._gelu}

    def build(self) -> GraphBuilder:
        spec, op, b = self.spec, self.op, self.b
        pixels = b.input(names.PIXEL_VALUES, "float32", ("images", 3, spec.image_size, spec.image_size))
        hidden = self._layer_norm(self._embed(b.cast(pixels, self._dtype)), "vision.pre_layrnorm")
        for i in range(spec.layers):
            at = f"vision.encoder.layers.{i}."
            hidden = op.Add(hidden, self._attention(self._layer_norm(hidden, at + "layer_norm1"), at + "self_attn."))
            grown = self._linear(self._layer_norm(hidden, at + "layer_norm2"), at + "mlp.fc1")
            hidden = op.Add(hidden, self._linear(self._activations[spec.activation](grown), at + "mlp.fc2"))
        if spec.drop_class_token:
            hidden = b.slice(hidden, 1, np.iinfo(np.int32).max, 1)
        rows = b.reshape(hidden, (-1, spec.hidden_size))
        grown = self._activations[spec.projector_activation](self._linear(rows, "projector.linear_1", bias=spec.projector_bias))
        embeds = self._linear(grown, "projector.linear_2", bias=spec.projector_bias)
        b.output(embeds, names.IMAGE_EMBEDS, self._dtype, ("visual_tokens", spec.output_size))
        return b

    def _embed(self, pixels: ir.Value) -> ir.Value:
        """[images, 3, side, side] -> [images, 1 + grid^2, width]: class token, patches, positions."""
        spec, op, b, p = self.spec, self.op, self.b, self.spec.patch_size
        cut = b.reshape(pixels, (-1, 3, spec.grid, p, spec.grid, p))
        patches = b.reshape(op.Transpose(cut, perm=[0, 2, 4, 1, 3, 5]), (-1, spec.grid**2, 3 * p * p))
        kernel = self._read("vision.embeddings.patch_embedding.weight").reshape(spec.hidden_size, -1)
        rows = op.MatMul(patches, self._stored("vision.embeddings.patch_embedding.weight", kernel.T))
        token = self._stored("vision.embeddings.class_embedding", self._read("vision.embeddings.class_embedding").reshape(1, 1, -1))
        shape = op.Concat(b.size(rows, 0), b.constant([1, spec.hidden_size]), axis=0)
        both = op.Concat(op.Expand(token, shape), rows, axis=1)
        return op.Add(both, self._weight("vision.embeddings.position_embedding.weight"))

    def _attention(self, x: ir.Value, at: str) -> ir.Value:
        spec, op, b = self.spec, self.op, self.b
        head = spec.hidden_size // spec.heads
        queries, keys, values = (b.reshape(self._linear(x, f"{at}{p}_proj"), (0, 0, spec.heads, head)) for p in "qkv")
        queries = op.Mul(op.Transpose(queries, perm=[0, 2, 1, 3]), b.cast(b.constant(1 / math.sqrt(head)), self._dtype))
        scores = b.cast(op.MatMul(queries, op.Transpose(keys, perm=[0, 2, 3, 1])), "float32")
        weights = b.cast(op.Softmax(scores, axis=-1), self._dtype) if self._dtype != "float32" else op.Softmax(scores, axis=-1)
        out = op.Transpose(op.MatMul(weights, op.Transpose(values, perm=[0, 2, 1, 3])), perm=[0, 2, 1, 3])
        return self._linear(b.reshape(out, (0, 0, spec.hidden_size)), at + "out_proj")

    def _layer_norm(self, x: ir.Value, name: str) -> ir.Value:
        return self.op.LayerNormalization(
            x, self._weight(name + ".weight"), self._weight(name + ".bias"), axis=-1, epsilon=self.spec.layer_norm_eps
        )

    def _linear(self, x: ir.Value, name: str, *, bias: bool = True) -> ir.Value:
        y = self.op.MatMul(x, self._stored(name + ".weight", self._read(name + ".weight").T))
        return self.op.Add(y, self._weight(name + ".bias")) if bias else y

    def _weight(self, name: str) -> ir.Value:
        return self._stored(name, self._read(name))

    def _stored(self, name: str, array: np.ndarray) -> ir.Value:
        return self.b.weight(self._weights.add(name, array.astype(self._dtype)))

    def _quick_gelu(self, x: ir.Value) -> ir.Value:
        return self.op.Mul(x, self.op.Sigmoid(self.op.Mul(x, self.b.cast(self.b.constant(1.702), self._dtype))))

    def _gelu(self, x: ir.Value) -> ir.Value:
        return self.op.Gelu(x)
