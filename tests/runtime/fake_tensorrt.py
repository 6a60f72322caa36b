"""A TensorRT library without TensorRT: what the builder calls, limited to the names that the real bindings have.

An attribute that the recorded bindings lack raises AttributeError, as it would there; so does setting one, since their objects take no new
attributes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

Names = Mapping[str, Sequence[str]]
ENGINE = b"an engine, in pieces"
INPUTS = {"hidden": (1, -1, 8), "past_length": (1,)}
OUTPUTS = {"logits": (1, 16)}
WEIGHTS, ACTIVATIONS = 123456, 7890


def recorded() -> dict[str, Names]:
    """Class -> names of each binding, by "library version"."""
    raw = json.loads(Path(__file__).with_name("tensorrt_names.json").read_text(encoding="utf-8"))
    return {key: value for key, value in raw.items() if key != "about"}


def fake_library(key: str, names: Names, more: Mapping[str, type] | None = None) -> ModuleType:
    """The module that `key` ("library version") would be; `more` has further classes' behaviour."""
    name, version = key.split()
    module = ModuleType(name)
    behaviour = {**_BEHAVIOUR, **(more or {})}
    classes = {cls: _limited(cls, names[cls], module, behaviour) for cls in names}
    module.__dict__.update({"__version__": version, **classes})
    return module


def _limited(name: str, allowed: Sequence[str], module: ModuleType, behaviour: Mapping[str, type]) -> type:
    """The class of that name with no more attributes than the recorded ones."""

    def set_attribute(self: Any, attribute: str, value: Any) -> None:
        if not attribute.startswith("_") and attribute not in allowed:
            raise AttributeError(f"{name} of {module.__name__} {module.__dict__['__version__']} has no {attribute}")
        object.__setattr__(self, attribute, value)

    base = behaviour.get(name, object)
    missing = {a: _Missing(name) for a in dir(base) if not a.startswith("_") and a not in allowed}
    enumerators = {} if name in behaviour else {a: i for i, a in enumerate(allowed)}
    own = {} if name == "IHostMemory" else {"__setattr__": set_attribute}
    return type(name, (base,), {**enumerators, **missing, **own, "_module": module})


class _Missing:
    """An attribute that is not there."""

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        raise AttributeError(f"{self._owner} has no {self._name}")


class _Tensor:
    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape


class _Network:
    """Has the inputs and outputs of the ONNX file that was parsed, or INPUTS and OUTPUTS where there is no such file."""

    _module: ModuleType
    _tables: tuple[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]] = (INPUTS, OUTPUTS)

    @property
    def num_inputs(self) -> int:
        return len(self._tables[0])

    @property
    def num_outputs(self) -> int:
        return len(self._tables[1])

    def get_input(self, index: int) -> Any:
        return self._module.__dict__["ITensor"](*list(self._tables[0].items())[index])

    def get_output(self, index: int) -> Any:
        return self._module.__dict__["ITensor"](*list(self._tables[1].items())[index])


class _Config:
    num_compute_capabilities = 0
    profiling_verbosity: Any = None

    def __init__(self) -> None:
        self._capabilities: dict[int, Any] = {}
        self._profiles: list[Any] = []
        self._cleared: list[Any] = []

    def set_compute_capability(self, capability: Any, index: int) -> None:
        self._capabilities[index] = capability

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def clear_flag(self, flag: Any) -> None:
        self._cleared.append(flag)


class _OptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, tuple[Any, ...]] = {}

    def set_shape(self, name: str, minimum: Any, optimum: Any, maximum: Any) -> None:
        self._shapes[name] = (minimum, optimum, maximum)


class _Builder:
    _module: ModuleType

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> Any:
        assert flags == 1 << self._module.__dict__["NetworkDefinitionCreationFlag"].STRONGLY_TYPED
        return self._module.__dict__["INetworkDefinition"]()

    def create_builder_config(self) -> Any:
        return self._module.__dict__["IBuilderConfig"]()

    def create_optimization_profile(self) -> Any:
        return self._module.__dict__["IOptimizationProfile"]()

    def build_serialized_network_to_stream(self, network: Any, config: Any, writer: Any) -> bool:
        self._log(config)
        return all(writer.write(piece) == len(piece) for piece in (ENGINE[:7], ENGINE[7:]))

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        self._log(config)
        return self._module.__dict__["IHostMemory"](ENGINE)

    def _log(self, config: Any) -> None:
        activations = [f"Total Activation Memory: {ACTIVATIONS} bytes" for _ in config._profiles]
        for message in (*activations, f"Total Weights Memory: {WEIGHTS} bytes"):
            self._logger.log(3, message)


class _HostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class _Parser:
    _module: ModuleType

    def __init__(self, network: Any, logger: Any) -> None:
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        if Path(path).is_file():
            self._network._tables = _tables(path)
        return "refused" not in path

    @property
    def num_errors(self) -> int:
        return 1

    def get_error(self, index: int) -> Any:
        return self._module.__dict__["ParserError"]()


def _tables(path: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Names and shapes (-1: any size) of an ONNX file's inputs and outputs."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    inputs, outputs = (
        {v.name: tuple(d.dim_value or -1 for d in v.type.tensor_type.shape.dim) for v in side} for side in (graph.input, graph.output)
    )
    return inputs, outputs


class _ParserError:
    def desc(self) -> str:
        return "Assertion failed: no such thing"

    def node(self) -> int:
        return 3

    def node_name(self) -> str:
        return "find"

    def node_operator(self) -> str:
        return "NonZero"


class _Logger:
    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class _Writer:
    def write(self, data: Any) -> int:
        raise NotImplementedError


_BEHAVIOUR: dict[str, type] = {
    "Builder": _Builder, "IBuilderConfig": _Config, "IHostMemory": _HostMemory, "ILogger": _Logger, "INetworkDefinition": _Network,
    "IOptimizationProfile": _OptimizationProfile, "IStreamWriter": _Writer, "ITensor": _Tensor, "OnnxParser": _Parser,
    "ParserError": _ParserError,
}  # fmt: skip
