"""Whether activations fit fp16: the largest absolute value of each layer and tensor against 65504, in numbers and in words.

Values are of all rows of the calibration prompts, text included. They bound what is stored between operations; sums within an
operation are the engine's own. Images that were not measured may give larger values, hence the headroom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FP16_LARGEST = 65504.0
HEADROOM = 4.0
_WORDS = {"hidden": "hidden state", "query": "query", "key": "key", "value": "value", "mlp": "MLP intermediate"}


@dataclass(frozen=True, slots=True)
class PrecisionAudit:
    """The largest absolute values found.

    Attributes:
        largest: for each tensor the maximum over all images, for each layer index (hidden states have one more: the last layer's output).
        tensor, layer, value: the largest of all, and where it is.
    """

    largest: dict[str, tuple[float, ...]]
    tensor: str
    layer: int
    value: float

    @classmethod
    def over(cls, images: Sequence[Mapping[str, Sequence[float]]]) -> PrecisionAudit:
        """The maximum over several images' values, at least one."""
        largest = {name: tuple(max(column) for column in zip(*(image[name] for image in images), strict=True)) for name in images[0]}
        value, tensor, layer = max(
            ((v, name, index) for name, values in largest.items() for index, v in enumerate(values)), key=lambda found: found[0]
        )
        return cls(largest, tensor, layer, value)

    @property
    def fits_fp16(self) -> bool:
        """Whether `HEADROOM` times the largest value is within fp16's range."""
        return self.value * HEADROOM <= FP16_LARGEST

    def describe(self) -> str:
        """One line: what to use, because of which layer and tensor."""
        where = f"{_WORDS[self.tensor]} of layer {self.layer}"
        if self.tensor == "hidden" and self.layer == len(self.largest["hidden"]) - 1:
            where = f"output of the last layer, {self.layer - 1}"
        found = f"the largest absolute activation is {self.value:.5g} ({where})"
        if self.value > FP16_LARGEST:
            return f"bf16 is needed: {found}, beyond fp16's largest number, 65504"
        ratio = f"1/{FP16_LARGEST / self.value:.3g} of fp16's 65504" if self.value > 0 else "nothing at all"
        if self.fits_fp16:
            return f"fp16 is safe: {found}, {ratio}; a headroom of {HEADROOM:g} is asked for"
        return f"bf16 is needed: {found}, {ratio}, which leaves less than the headroom of {HEADROOM:g} that is asked for"
