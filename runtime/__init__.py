"""The runtime: chains a bundle's engines; runs with numpy, onnxruntime, tokenizers, Pillow and Jinja alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.generation import Generation
    from runtime.pipeline import AnswerStream, VisionLanguageModel, load

__all__ = ["AnswerStream", "Generation", "VisionLanguageModel", "load"]


def __getattr__(name: str) -> Any:
    """Loads the pipeline on first use, so that the command lines' `--help` stays instant."""
    if name == "Generation":
        from runtime.generation import Generation

        return Generation
    if name in __all__:
        from runtime import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
