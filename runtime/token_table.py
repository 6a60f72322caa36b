"""The token table of a bundle, mapped into memory: only the rows that are used are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runtime.errors import BundleError


class TokenTable:
    """Rows of a file of float32, [vocab, hidden], given in the decoder's type.

    Args:
        dtype: the manifest's name of that type; "bfloat16" gives its bits as uint16, which numpy has no type for.

    Raises:
        BundleError: the file has another size.
    """

    def __init__(self, path: Path, shape: tuple[int, int], dtype: str) -> None:
        expected = shape[0] * shape[1] * 4
        if path.stat().st_size != expected:
            raise BundleError(f"{path.name} has {path.stat().st_size} bytes, a table of {shape} needs {expected}: export the bundle again")
        self._table = np.memmap(path, np.float32, "r", shape=shape)
        self._dtype = dtype

    def rows(self, token_ids: np.ndarray) -> np.ndarray:
        """[n, hidden], C-contiguous, of token ids [n]."""
        rows = self._table[token_ids]
        return bfloat16_bits(rows) if self._dtype == "bfloat16" else np.array(rows, self._dtype)

    def row(self, token_id: int) -> np.ndarray:
        """[1, 1, hidden] of one token."""
        row = self._table[token_id][None, None]
        return bfloat16_bits(row) if self._dtype == "bfloat16" else np.array(row, self._dtype)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 of any shape as the bits of bfloat16 (uint16), rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits (uint16), exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
