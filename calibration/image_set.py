"""The images and prompts of a calibration: which files, in which order, and a name for each that depends on its contents alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.errors import InputError, UsageError
from runtime.images import load_image
from runtime.manifest import sha256_of

__all__ = ["DEFAULT_PROMPT", "CalibrationImage", "find_images", "open_image", "prompt_for", "read_prompts"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
DEFAULT_PROMPT = "Describe this image."
MAX_ASPECT = 200  # processors scale the shorter side to a few hundred pixels: beyond this the longer one takes gigabytes


@dataclass(frozen=True, slots=True)
class CalibrationImage:
    """`name` is the path within the directory that was given, with forward slashes."""

    path: Path
    name: str

    def sha256(self) -> str:
        """SHA-256 of the file's bytes; StorageError where it cannot be read."""
        return sha256_of(self.path)


def find_images(location: Path, seed: int | None = None, *, leave_out: Path | None = None) -> list[CalibrationImage]:
    """The image files of a directory and those below it, or one file.

    Args:
        seed: shuffles them, so that the first few are a sample; None gives them in their names' order.
        leave_out: a file that is none of them, wherever it lies: the picture that an earlier run has drawn.

    Raises:
        UsageError: there are none.
    """
    if location.is_file():
        return [CalibrationImage(location, location.name)]
    if not location.is_dir():
        raise UsageError(f"there is no directory {location}: name one that holds images with --images")
    paths = [path for path in location.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    if leave_out is not None:
        paths = [path for path in paths if path.resolve() != leave_out.resolve()]
    images = sorted((CalibrationImage(path, path.relative_to(location).as_posix()) for path in paths), key=lambda image: image.name)
    if not images:
        raise UsageError(f"{location} holds no images ({', '.join(SUFFIXES)}): name a directory that does with --images")
    if seed is None:
        return images
    return [images[index] for index in np.random.default_rng(seed).permutation(len(images))]


def open_image(image: CalibrationImage) -> Image.Image:
    """The image as RGB.

    Raises:
        InputError: it is unreadable, or too narrow for an image processor; the message says why.
    """
    loaded = load_image(image.path)
    if max(loaded.size) > MAX_ASPECT * min(loaded.size):
        raise InputError(f"{image.name} is too narrow ({loaded.width} x {loaded.height}): crop it first")
    return loaded


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """The prompts of a text file, one a line, empty lines left out; without a file, the default one alone.

    Raises:
        UsageError: the file is missing, unreadable, not UTF-8, or holds none.
    """
    if path is None:
        return (DEFAULT_PROMPT,)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts {path} is not UTF-8 text: save it as UTF-8, one prompt a line") from error
    except OSError as error:
        raise UsageError(f"--prompts {path} cannot be read ({error.strerror}): name a text file with one prompt a line") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UsageError(f"--prompts {path} holds no prompt: write one a line")
    return prompts


def prompt_for(image_sha256: str, prompts: Sequence[str]) -> str:
    """The prompt of an image: drawn by its contents, so that neither names nor order change it."""
    return prompts[int(image_sha256[:8], 16) % len(prompts)]


def example_key(image_sha256: str, prompt: str) -> str:
    """SHA-256 of image and prompt together."""
    return hashlib.sha256(f"{image_sha256}\n{prompt}".encode()).hexdigest()
