"""How many bytes a weight takes in each precision: the one table that memory plans and target files are checked against.

Knows nothing about graphs or checkpoints. What is not a matrix of a decoder layer (norms, biases, the vision tower, the language-model
head) stays in the plain type, as do activations, caches and the token table; int8 and int4 quantise the decoder layers' matrices only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import UsageError


@dataclass(frozen=True, slots=True)
class Scheme:
    """One precision.

    `matrix_bits` is what a value of a decoder layer's matrix takes. A scale of `scale_bytes` (0: none) serves `block` consecutive
    inputs of one output, or all inputs where `block` is None. `plain_bytes` is what every other value takes.
    """

    name: str
    matrix_bits: int
    plain_bytes: int
    scale_bytes: int = 0
    block: int | None = None

    def matrix(self, shape: Sequence[int]) -> int:
        """Bytes of a decoder layer's matrix [out, in], scales included."""
        out, into = shape
        scales = out * (1 if self.block is None else math.ceil(into / self.block))
        return math.ceil(out * into * self.matrix_bits / 8) + scales * self.scale_bytes

    def plain(self, shape: Sequence[int]) -> int:
        """Bytes of any other tensor."""
        return math.prod(shape) * self.plain_bytes

    @property
    def words(self) -> str:
        """Bytes per weight, in words."""
        if not self.scale_bytes:
            return f"{self.plain_bytes} bytes a weight"
        if self.block is None:
            each = f"{self.matrix_bits // 8} byte a weight and {self.scale_bytes} for each output"
        else:
            total = self.matrix_bits / 8 + self.scale_bytes / self.block
            each = f"{total:g} bytes a weight ({self.matrix_bits} bits, and {self.scale_bytes} bytes for every {self.block})"
        return f"decoder layers' matrices {each}, the rest {self.plain_bytes}"


# int8: symmetric, one fp16 scale for each output. int4: symmetric blocks of 128 with fp16 scales, the form that TensorRT takes (opset 21).
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp32", 32, 4),
        Scheme("fp16", 16, 2),
        Scheme("bf16", 16, 2),
        Scheme("int8", 8, 2, scale_bytes=2),
        Scheme("fp8", 8, 2, scale_bytes=2),
        Scheme("int4", 4, 2, scale_bytes=2, block=128),
    )
}


def scheme_of(precision: str) -> Scheme:
    """The scheme of a precision's name.

    Raises:
        UsageError: there is no such precision; the message lists those there are.
    """
    if precision not in SCHEMES:
        raise UsageError(f"unknown precision {precision!r}: choose one of {', '.join(SCHEMES)}")
    return SCHEMES[precision]
