"""Whether a device's TensorRT knows what a graph asks for: opset, operators and their types, by a table (`configs/operators`).

A table says what a parser lists, not what a builder makes of it: restrictions of attributes and shapes are not in it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import onnx

import configs
from runtime.errors import EngineError
from runtime.manifest import Manifest

MAX_OPSET = 21  # int4 needs it; whether TensorRT 10.3 takes more was not found
_TYPES = {
    "FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "INT32": "int32", "INT64": "int64", "INT8": "int8", "UINT8": "uint8",
    "BOOL": "bool", "FLOAT8E4M3FN": "fp8", "INT4": "int4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OperatorTable:
    """The operators of one library, and the types of each."""

    library: str
    operators: Mapping[str, frozenset[str]]

    @classmethod
    def load(cls, name: str = "tensorrt-10.1") -> OperatorTable:
        """Reads `configs/operators/NAME.toml`."""
        raw = tomllib.loads((resources.files(configs) / "operators" / f"{name}.toml").read_text(encoding="utf-8"))
        return cls(raw["library"], {operator: frozenset(types.split()) for operator, types in raw["operators"].items()})

    def refusals(self, path: Path, name: str) -> Iterator[str]:
        """Why the library would refuse a graph, a line for each reason; each names graph, node and operator."""
        model = onnx.load(path, load_external_data=False)
        for opset in model.opset_import:
            if opset.domain not in ("", "ai.onnx"):
                yield f"{name} uses operators of {opset.domain}, which {self.library} does not have"
            elif opset.version > MAX_OPSET:
                yield f"{name} has opset {opset.version}, and up to {MAX_OPSET} is taken to be known to {self.library}"
        types = _value_types(model)
        for index, node in enumerate(model.graph.node):
            which = f"the operator {node.op_type} of node {index} ({node.name or 'without a name'}) in {name}"
            known = self.operators.get(node.op_type)
            if known is None or node.domain not in ("", "ai.onnx"):
                yield f"{which} is not one of {self.library}'s"
                continue
            unknown = sorted({types[value] for value in _typed_values(node) if value in types} - known)
            if unknown:
                yield f"{which} works on {', '.join(unknown)}, and {self.library} lists {', '.join(sorted(known))} for it"


def check_operators(directory: Path, manifest: Manifest, table: OperatorTable) -> None:
    """Checks all graphs of a bundle's first target.

    Raises:
        EngineError: the library would refuse one; the message names graph, node and operator.
    """
    for name, graph in manifest.graphs.items():
        for reason in table.refusals(directory / graph.file, name):
            raise EngineError(f"target {manifest.target} could not be compiled on the device: {reason}; nothing was written")


def _value_types(model: onnx.ModelProto) -> dict[str, str]:
    """The type of every value of a graph, as the table calls it."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    words = {name: onnx.TensorProto.DataType.Name(number) for name, number in types.items() if number}
    return {name: _TYPES.get(word, word.lower()) for name, word in words.items()}


def _typed_values(node: onnx.NodeProto) -> list[str]:
    """Those of a node's inputs and outputs that its table entry is about: what is of its main type, not indices, shapes or conditions.

    The main type is that of the first output where an input shares it (Where's values, not its condition), else the first input's
    (LessOrEqual's numbers, not its answer).
    """
    if node.op_type == "Cast":
        return [*node.input, *node.output]
    schema = onnx.defs.get_schema(node.op_type)
    formal = [schema.inputs[min(i, len(schema.inputs) - 1)].type_str for i in range(len(node.input))]
    main = next((o.type_str for o in schema.outputs if o.type_str in formal), formal[0] if formal else "")
    return [name for name, kind in zip(node.input, formal, strict=True) if kind == main and name]
