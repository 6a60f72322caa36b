"""A thin layer over onnx-ir for writing graphs as code: values in, values out, weights by name.

Knows nothing about models. A graph is opset 20 unless it asks for another, and uses only operators that TensorRT's parser and ONNX
Runtime share.
Weights are not held: a graph records which slice of which external file an initializer is (see `export.weights`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from export.weights import StoredTensor
from runtime.manifest import TensorInfo

OPSET = 20
IR_VERSION = 10  # the newest that ONNX Runtime 1.23 (JetPack 6.2) reads is 11
NEW_IR_VERSION = 12  # what ONNX pairs with opset 24
DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "bool": ir.DataType.BOOL,
}
Dim = int | str


class _Ops:
    """`ops.MatMul(a, b)` adds a node to the tape and returns its output; `_outputs=2` returns two."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        def call(*inputs: ir.Value | None, _outputs: int = 1, **attributes: Any) -> Any:
            if _outputs == 1:
                return self._tape.op(op_type, inputs, attributes)
            return self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=_outputs)

        return call


class GraphBuilder:
    """Collects the nodes, inputs, outputs and initializers of one graph.

    `op` writes nodes: `b.op.Add(x, y)` returns the output value; attributes are keywords, `_outputs=2` asks for two outputs.
    """

    def __init__(self, name: str, opset: int = OPSET) -> None:
        self.name, self.opset = name, opset
        self._tape = Tape()
        self.op = _Ops(self._tape)
        self._inputs: list[tuple[ir.Value, TensorInfo]] = []
        self._outputs: list[tuple[ir.Value, TensorInfo]] = []
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: str, shape: Sequence[Dim]) -> ir.Value:
        """Declares a graph input."""
        value = ir.Value(name=name, type=ir.TensorType(DTYPES[dtype]), shape=ir.Shape(shape))
        self._inputs.append((value, TensorInfo(name, dtype, tuple(shape))))
        return value

    def output(self, value: ir.Value, name: str, dtype: str, shape: Sequence[Dim]) -> None:
        """Declares `value` as a graph output called `name` (through an Identity where it already has another name)."""
        if value in [v for v, _ in (*self._inputs, *self._outputs)] or value.producer() is None:
            value = self.op.Identity(value)
        value.name = name
        value.dtype, value.shape = DTYPES[dtype], ir.Shape(shape)
        self._outputs.append((value, TensorInfo(name, dtype, tuple(shape))))

    def constant(self, array: np.ndarray | Sequence[int] | int | float, name: str | None = None, dtype: str | None = None) -> ir.Value:
        """A small constant stored inside the graph; Python integers become int64, floats float32; equal ones are shared.

        `name` is the initializer's name; without it one is made from the content. `dtype` (numpy's name) overrides the type.
        """
        array = np.asarray(array)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        if dtype is not None:
            array = array.astype(dtype)
        name = (
            name or f"const_{array.dtype}_{'x'.join(map(str, array.shape)) or 'scalar'}_{hashlib.sha256(array.tobytes()).hexdigest()[:12]}"
        )
        return self._initializer(name, ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name))

    def weight(self, stored: StoredTensor) -> ir.Value:
        """A weight that lies in an external file beside the graph."""
        tensor = ir.ExternalTensor(
            location=stored.file, offset=stored.offset, length=stored.bytes, dtype=DTYPES[stored.dtype],
            shape=ir.Shape(stored.shape), name=stored.name, base_dir=str(stored.directory),
        )  # fmt: skip
        return self._initializer(stored.name, tensor)

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._initializers:
            shape = ir.Shape(tensor.shape.numpy())
            self._initializers[name] = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        return self._initializers[name]

    # ------------------------------------------------------------ a few words that every graph uses

    def cast(self, x: ir.Value, dtype: str) -> ir.Value:
        """Cast, left out where the type is already known to be that."""
        if x.dtype == DTYPES[dtype]:
            return x
        out = self.op.Cast(x, to=int(DTYPES[dtype]))
        out.dtype = DTYPES[dtype]
        return out

    def reshape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Reshape to constant sizes; 0 copies the input's size, one -1 is inferred."""
        return self.op.Reshape(x, self.constant(list(shape)))

    def slice(self, x: ir.Value, start: int, stop: int, axis: int) -> ir.Value:
        """`x[start:stop]` along one axis, with constant bounds."""
        return self.op.Slice(x, self.constant([start]), self.constant([stop]), self.constant([axis]))

    def size(self, x: ir.Value, axis: int) -> ir.Value:
        """The size of one axis as an int64 tensor of shape [1]."""
        return self.op.Shape(x, start=axis, end=axis + 1)

    def arange(self, count: ir.Value) -> ir.Value:
        """int64 [0, 1, ..., count - 1] for a `count` of shape [1]."""
        scalar = self.op.Squeeze(count)
        return self.op.Range(self.constant(0), scalar, self.constant(1))

    # ------------------------------------------------------------ finishing

    def model(self) -> ir.Model:
        """The finished model, initializers in the order of first use."""
        graph = ir.Graph(
            [v for v, _ in self._inputs], [v for v, _ in self._outputs], nodes=self._tape.nodes,
            initializers=list(self._initializers.values()), opset_imports={"": self.opset}, name=self.name,
        )  # fmt: skip
        return ir.Model(graph, ir_version=IR_VERSION if self.opset < 24 else NEW_IR_VERSION, producer_name="entropy-prune")

    def save(self, path: Path) -> None:
        """Writes the graph (not the weights, which are in their files already)."""
        model = self.model()
        ir.to_proto(model)  # fails early on a malformed graph
        path.write_bytes(ir.to_proto(model).SerializeToString())

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        return tuple(info for _, info in self._inputs)

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return tuple(info for _, info in self._outputs)
