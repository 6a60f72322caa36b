"""Tiny LLaVAs whose visual tokens lose almost all directions at a known layer, and images for them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

LOUDNESS = 300.0  # times what the residual stream holds before: only the new directions are left to see


def collapsing_checkpoint(source: Path, target: Path, layer: int, rank: int = 2) -> Path:
    """Copies a checkpoint and makes the MLP of `layer` write into `rank` directions alone, and loudly: S falls from index `layer` to
    `layer + 1`.
    """
    shutil.copytree(source, target)
    path = target / "model.safetensors"
    tensors = load_file(path)
    (name,) = (n for n in tensors if n.endswith(f"layers.{layer}.mlp.down_proj.weight") and "vision" not in n)
    generator = torch.Generator().manual_seed(layer)
    hidden, width = tensors[name].shape
    directions = torch.linalg.qr(torch.randn(hidden, rank, generator=generator))[0]
    tensors[name] = (LOUDNESS * directions @ torch.randn(rank, width, generator=generator) / width**0.5).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return target


def write_images(folder: Path, count: int, seed: int = 0, side: int = 56) -> Path:
    """PNG files of smooth noise: 00.png, 01.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        cells = int(rng.integers(2, 9))
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        noise.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{index:02}.png")
    return folder
