"""FLOPs counted from the exported graphs themselves, at given sizes; a multiply-add counts as 2.

Matrix products (MatMul, Gemm, Conv) are the figure that papers compare; element-wise arithmetic is counted apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
from onnx import shape_inference

from runtime.names import PAST, PRESENT

_ELEMENTWISE = {
    "Add", "Sub", "Mul", "Div", "Sqrt", "Exp", "Log", "Sigmoid", "Softmax", "Gelu", "ReduceMean", "ReduceSum", "LayerNormalization",
    "Pow", "Neg", "Max", "Min", "Abs", "Reciprocal", "ReduceSumSquare", "ReduceMax", "ReduceMin",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Flops:
    """`matmul`: 2 m k n over all matrix products; `elementwise`: one per element that arithmetic produces."""

    matmul: int
    elementwise: int


def count_flops(graph: Path, sizes: Mapping[str, int]) -> Flops:
    """Counts one run of a graph file.

    Args:
        sizes: a number for each symbolic dimension of the graph's inputs; "capacity" is that of the caches also where the graph fixes it.
    """
    model = onnx.load(graph, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith((PAST, PRESENT)) and not value.type.tensor_type.shape.dim[2].dim_param:  # a fixed capacity
            value.type.tensor_type.shape.dim[2].dim_param = "capacity"
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
            elif dim.dim_param and value in model.graph.input:
                raise ValueError(f"{graph.name} has a dimension {dim.dim_param} that no size was given for")
    inferred = shape_inference.infer_shapes(model, data_prop=True)
    shapes = {i.name: tuple(i.dims) for i in inferred.graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    matmul = elementwise = 0
    for node in inferred.graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            left, out = shapes[node.input[0]], shapes[node.output[0]]
            if not prod(out) or not prod(left):
                raise ValueError(f"the shape of {node.op_type} {node.name} is not known in {graph.name}: {left} -> {out}")
            turned = any(a.name == "transA" and a.i for a in node.attribute)
            inner = prod(shapes[node.input[1]][1:]) if node.op_type == "Conv" else left[0] if turned else left[-1]
            matmul += 2 * prod(out) * inner
        elif node.op_type in _ELEMENTWISE:
            elementwise += prod(shapes.get(node.output[0], (0,)))
    return Flops(matmul, elementwise)


def decoder_flops(tokens: float, *, hidden: int, kv_width: int, intermediate: int) -> float:
    """One decoder layer over `tokens` tokens, by the authors' formula extended to grouped-query heads (three MLP matrices)."""
    return 4 * tokens * hidden**2 + 4 * tokens * hidden * kv_width + 4 * tokens**2 * hidden + 6 * tokens * hidden * intermediate
