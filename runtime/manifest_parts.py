"""What a manifest is made of: tensors, graphs, files, the decoder's numbers, and what differs from target to target.

Knows nothing about how they fit together: `runtime.manifest` checks that.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from runtime.engine_info import EngineInfo
from runtime.errors import BundleError
from runtime.memory_plan import MemoryPlan


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One graph input or output: numpy dtype name, and a shape of sizes and symbolic dimension names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class GraphInfo:
    """One engine graph: the ONNX file inside the bundle and its whole I/O table."""

    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of the bundle: its size and SHA-256 (hexadecimal)."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Geometry:
    """The decoder's numbers that the runtime needs; `visual_tokens` is what one image gives (N of one image)."""

    layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    head_size: int
    vocab_size: int
    position_rows: int
    visual_tokens: int

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            check_positive(entry.name, getattr(self, entry.name))

    def kv_bytes_per_token(self, layers: int, bytes_per_value: int = 4) -> int:
        """Bytes one token takes in the KV cache of `layers` layers."""
        return 2 * layers * self.kv_heads * self.head_size * bytes_per_value


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights came from: checkpoint directory's name, and the SHA-256 over its weight files' own hashes."""

    checkpoint: str
    revision: str


@dataclass(frozen=True, slots=True)
class Variant:
    """What one more target of a bundle has of its own; everything else in the manifest serves all targets.

    `engine` is what runs it, `kv_write` how its graphs write the cache (`Manifest`); `graphs` have the names of the manifest's.
    """

    engine: str
    precision: str
    kv_write: str
    graphs: dict[str, GraphInfo]
    memory: MemoryPlan | None = None
    engines: tuple[EngineInfo, ...] = ()


def check_positive(name: str, value: int) -> None:
    if value < 1:
        raise BundleError(f"{name} is {value}, expected 1 or more: export the bundle again")
