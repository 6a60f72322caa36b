"""Every error this project raises on purpose.

One tree, so that callers catch `EntropyPruneError`; each leaf also subclasses the matching builtin. Messages say what was
got, what was expected and how to fix it. Command lines turn them into one line on stderr and exit code 2.
"""

from __future__ import annotations

import reprlib


class EntropyPruneError(Exception):
    """Base of all errors raised on purpose."""


class UsageError(EntropyPruneError, ValueError):
    """An option or argument is unknown, out of range or in conflict with another."""


class CheckpointError(EntropyPruneError, ValueError):
    """A Hugging Face checkpoint is missing, incomplete, or of an architecture that is not implemented."""


class BundleError(EntropyPruneError, ValueError):
    """A bundle is missing, altered, truncated, or made by a newer version."""


class BundleExistsError(EntropyPruneError, FileExistsError):
    """The output directory holds something that is not a bundle, or another build is writing it."""


class StorageError(EntropyPruneError, OSError):
    """A file could not be written or read: no space left, no permission, a medium's error."""


class InputError(EntropyPruneError, ValueError):
    """An image, prompt or message given to the runtime cannot be used."""


class ContextLengthError(InputError):
    """The prompt, or the prompt and the tokens asked for, exceed the bundle's maximum context."""


class EngineError(EntropyPruneError, RuntimeError):
    """An engine library is missing, or refused a graph or a run."""


def shown(value: object) -> str:
    """What was got, for a message: one short line, whatever it is (nested too deeply, a number of a thousand digits)."""
    try:
        return " ".join(reprlib.repr(value).split())[:80]
    except (ValueError, RecursionError):  # integers beyond Python's limit of digits
        return f"a value of type {type(value).__name__}"
