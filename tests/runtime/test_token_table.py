"""Rows of the token table in the decoder's type, bfloat16 rounded without a library that knows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.errors import BundleError
from runtime.token_table import TokenTable, bfloat16_bits, from_bfloat16_bits


def test_bfloat16_is_rounded_to_nearest_ties_to_even() -> None:
    torch = pytest.importorskip("torch", reason="the reference for bfloat16")
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    ties = (rng.integers(0, 1 << 15, 2_000, dtype=np.uint32) << 16) | 0x8000
    edges = np.array([0, 0x80000000, 1, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000], np.uint32)
    values = np.concatenate([bits, ties, edges]).view(np.float32)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    numbers = ~np.isnan(values)
    found = bfloat16_bits(values)
    assert found.dtype == np.uint16
    assert np.array_equal(found[numbers], expected[numbers])
    assert np.isnan(from_bfloat16_bits(found)[~numbers]).all()
    back = from_bfloat16_bits(found)
    assert np.array_equal(bfloat16_bits(back)[numbers], found[numbers])


@pytest.mark.parametrize(("dtype", "held"), [("float32", "float32"), ("float16", "float16"), ("bfloat16", "uint16")])
def test_rows_are_those_of_the_file(dtype: str, held: str, tmp_path: Path) -> None:
    table = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)
    (tmp_path / "t.bin").write_bytes(table.tobytes())
    found = TokenTable(tmp_path / "t.bin", (7, 4), dtype)
    expected = bfloat16_bits(table) if dtype == "bfloat16" else table.astype(dtype)
    rows = found.rows(np.array([3, 0, 3]))
    assert (rows.dtype.name, rows.flags.c_contiguous) == (held, True)
    assert np.array_equal(rows, expected[[3, 0, 3]])
    assert np.array_equal(found.row(5), expected[5][None, None])


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(bytes(10))
    with pytest.raises(BundleError, match=r"t\.bin has 10 bytes, a table of \(7, 4\) needs 112: export the bundle again"):
        TokenTable(tmp_path / "t.bin", (7, 4), "float32")
