"""The training curve as a picture: exact answers and cell labels over training time, from the training's own log.

python -m tiny_llava.curve --log tiny_llava/training_log.jsonl --output tiny_llava/curve.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 900, 380, 56, 24, 190, 48
SERIES = (("cells", "cells labelled right", (120, 120, 120)), ("exact", "exact answers", (200, 60, 30)))


def draw_curve(rows: list[dict[str, float]]) -> Image.Image:
    """Shares in percent over minutes of training; rows as train.py logs them (`seconds`, `cells`, `exact`)."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    last = max(r["seconds"] for r in rows) / 60
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(minutes: float, share: float) -> tuple[float, float]:
        return LEFT + width * minutes / last, TOP + height * (1 - share)

    for percent in range(0, 101, 20):
        draw.line([place(0, percent / 100), place(last, percent / 100)], fill=(225, 225, 225))
        draw.text((LEFT - 40, place(0, percent / 100)[1] - 8), f"{percent} %", fill=(80, 80, 80), font=font)
    for minutes in range(0, int(last) + 1, 20):
        draw.text((place(minutes, 0)[0] - 6, HEIGHT - BOTTOM + 8), str(minutes), fill=(80, 80, 80), font=font)
    draw.text((LEFT + width / 2 - 60, HEIGHT - 22), "minutes of training", fill=(80, 80, 80), font=font)
    for key, label, color in SERIES:
        points = [place(r["seconds"] / 60, r[key]) for r in rows if key in r]
        if points:
            draw.line(points, fill=color, width=2)
            draw.text((points[-1][0] + 8, points[-1][1] - 8 + 14 * (key == "exact")), label, fill=color, font=font)
    return image


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tiny_llava.curve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    draw_curve([json.loads(line) for line in args.log.read_text(encoding="utf-8").splitlines()]).save(args.output, optimize=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
