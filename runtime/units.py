"""Numbers as people read them: bytes and FLOPs with their units."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """1234567 -> '1.2 MB' (decimal units)."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def format_flops(count: float | None) -> str:
    """2.5e9 -> '2.5 GFLOP'; None -> '-'."""
    if count is None:
        return "-"
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TFLOP"
