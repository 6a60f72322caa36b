"""What the manifest says of a compiled engine: which library made it, for which chips and shapes, and what memory it needs.

An engine cannot be read without its GPU, so all of this is written when it is built. Knows nothing about engine libraries.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import BundleError


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """The smallest, the usual and the largest shape of one input."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    def __post_init__(self) -> None:
        shapes = (self.minimum, self.optimum, self.maximum)
        ordered = all(0 <= a <= b <= c for a, b, c in zip(*shapes, strict=False))
        if len({len(shape) for shape in shapes}) != 1 or not ordered:
            raise BundleError(
                f"a profile has the shapes {self.minimum}, {self.optimum}, {self.maximum}, expected them of one rank and none smaller "
                "than the one before: compile the bundle again"
            )


@dataclass(frozen=True, slots=True)
class Profile:
    """One optimisation profile: the shapes of the inputs whose sizes are not fixed, by input."""

    name: str
    shapes: dict[str, ShapeRange]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """One engine file of a bundle.

    Args:
        graph: the manifest's name of the graph it was compiled from.
        file: inside the bundle; its size and hash stand among the manifest's files.
        library, library_version: the Python module ("tensorrt" or "tensorrt_rtx") and its version.
        capabilities: compute capabilities (86 is 8.6) that it runs on; empty: those of the device it was built on.
        profiles: in the engine's order.
        inputs, outputs: tensor names in the engine's order.
        weights_bytes: weights in the engine, as the library logs them; None where it does not.
        activation_bytes: device memory that a run needs, for each profile; empty where the library does not log it.
        attention_kernels: fused attention kernels of each compiled subgraph (one for each profile, where the graph was compiled
            whole); empty where the library lists no layers.
        build_seconds, peak_rss_bytes: of the process that built it; None where the system does not count.
    """

    graph: str
    file: str
    library: str
    library_version: str
    capabilities: tuple[int, ...]
    profiles: tuple[Profile, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights_bytes: int | None
    activation_bytes: tuple[int, ...]
    attention_kernels: tuple[int, ...]
    build_seconds: float
    peak_rss_bytes: int | None
