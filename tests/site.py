"""A place to run command lines in: a checkpoint, an earlier bundle and an image, and a look at what they leave behind."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

FAILED = 2


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: contents of files, None for directories."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def changes(before: dict[str, bytes | None], after: dict[str, bytes | None]) -> list[str]:
    """Names of what is new, gone or different."""
    return sorted(name for name in before.keys() | after.keys() if (name in before, before.get(name)) != (name in after, after.get(name)))


def cut(path: Path, size: int) -> None:
    """Makes a file `size` bytes long, or shorter by as many where it is negative."""
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


@dataclass(frozen=True, slots=True)
class Site:
    """A folder with a checkpoint of its own (to be damaged), an earlier bundle, and an image."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, checkpoint: Path, bundle: Path) -> Site:
        site = cls(folder)
        folder.mkdir()
        shutil.copytree(checkpoint, site.checkpoint)
        shutil.copytree(bundle, site.bundle)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)).save(site.image)
        return site

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def image(self) -> Path:
        return self.folder / "scene.png"

    def build(self, *more: str, output: str = "bundle") -> list[str]:
        """Arguments of export.build."""
        return ["--model", "llava15", "--checkpoint", str(self.checkpoint), "--output", str(self.folder / output), *more]

    def ask(self, *more: str) -> list[str]:
        """Arguments of runtime.generate."""
        return ["--bundle", str(self.bundle), "--prompt", "what is at row 2 column 3?", "--max-new-tokens", "4", *more]

    def configure(self, section: str | None, **entries: Any) -> None:
        """Changes entries of the checkpoint's config.json."""
        path = self.checkpoint / "config.json"
        config = json.loads(path.read_text())
        (config[section] if section else config).update(entries)
        path.write_text(json.dumps(config))

    def write(self, name: str, text: str) -> None:
        """Replaces one of the checkpoint's files."""
        (self.checkpoint / name).write_text(text)

    def remove(self, name: str) -> None:
        """Removes one of the checkpoint's files."""
        (self.checkpoint / name).unlink()

    def weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        """Changes the checkpoint's tensors."""
        path = self.checkpoint / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    def tensor(self, name: str, value: torch.Tensor) -> None:
        """Adds or replaces one of the checkpoint's tensors."""
        self.weights(lambda tensors: tensors.update({name: value}))


class Told(NamedTuple):
    """What a command that failed has printed on stderr: the error, and the lines before it."""

    error: str
    before: list[str]


def said(stderr: str, program: str) -> Told:
    """Checks that there is one error line, at the end, that begins with the program's name."""
    lines = stderr.splitlines()
    assert lines, "nothing on stderr"
    assert lines[-1].startswith(f"{program}: error: "), stderr
    assert "Traceback" not in stderr
    assert all(line.startswith("  ") for line in lines[:-1]), stderr  # the plan's rows, printed before a build begins
    error = lines[-1].removeprefix(f"{program}: error: ")
    assert len(error) > 20, "too short to say what to do"
    return Told(error, lines[:-1])


@dataclass(frozen=True, slots=True)
class Refused:
    """`refused(module, argv, message)` runs a command that must fail as every command fails, and leave everything as it was."""

    site: Site
    capture: pytest.CaptureFixture[str]

    def __call__(self, module: Any, argv: list[str], message: str) -> Told:
        before = tree(self.site.folder)
        self.capture.readouterr()
        assert module.main(argv) == FAILED
        told = said(self.capture.readouterr().err, f"python -m {module.__name__}")
        assert re.search(message, told.error), told.error
        assert changes(before, tree(self.site.folder)) == []
        return told
