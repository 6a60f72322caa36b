"""The runtime: chains a bundle's engines; runs with numpy, onnxruntime, tokenizers, Pillow and Jinja alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.generation import Generation
    from runtime.pipeline import AnswerStream, VisionLanguageModel, load
    from runtime.state import PromptState

__all__ = ["AnswerStream", "Generation", "PromptState", "VisionLanguageModel", "load"]


def __getattr__(name: str) -> Any:
    """Loads the pipeline on first use, so that the command lines' `--help` stays instant."""
    if name in __all__:
        import importlib

        homes = {"Generation": "generation", "PromptState": "state"}
        return getattr(importlib.import_module(f"runtime.{homes.get(name, 'pipeline')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
