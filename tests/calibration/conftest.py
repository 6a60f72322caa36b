"""A checkpoint of eight layers and its images, shared by the calibration's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.calibration.collapsing import collapsing_checkpoint, write_images
from tests.models import tiny_llava_checkpoint


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of 8 layers and 16 visual tokens, without a collapse. Copy it before changing it."""
    return tiny_llava_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint", layers=8, kv_heads=2, image_size=56)


@pytest.fixture(scope="session")
def collapsing(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, collapsing from index 2 to 3."""
    return collapsing_checkpoint(plain, tmp_path_factory.mktemp("collapsing") / "checkpoint", 2)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images. Copy the folder before changing it."""
    return write_images(tmp_path_factory.mktemp("images"), 6)
