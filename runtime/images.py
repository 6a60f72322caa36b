"""Images on their way into the vision graph: loading, Hugging Face's CLIP preprocessing without torch, and patch geometry.

Knows nothing about engines, prompts or tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from runtime.errors import BundleError, InputError, UsageError, shown

MAX_PIXELS = 64_000_000
"""Largest image that is taken, and largest intermediate image of a resize, in pixels (192 MB as RGB)."""

MAX_SIDE = 8_000
"""Largest side, in pixels, that a bundle may resize or crop images to."""

# Readers that decode in this process; others (EPS) start outside programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "TGA", "AVIF")
# What Pillow's readers raise on damaged files, besides OSError.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError,
    struct.error, zlib.error,
)  # fmt: skip
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]+://|data:)", re.IGNORECASE)


def load_image(source: str | os.PathLike[str] | Image.Image | npt.NDArray[Any]) -> Image.Image:
    """An RGB image from a file, a PIL image or an array.

    Files are turned upright by their EXIF orientation; a caller's PIL image is taken as it lies. Transparency is composited onto
    white (as the Hugging Face processor does), 16-bit greyscale is scaled to 8 bits, an animation gives its first frame.

    Args:
        source: a path; a PIL image of any mode but 32-bit; or uint8 [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4] (RGBA).

    Raises:
        InputError: it cannot be used; the message says why.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"an image must be a path, a PIL image or a numpy array, not {type(source).__name__}")
    return _from_file(os.fsdecode(source))


def image_hash(image: Image.Image) -> str:
    """SHA-256 (hexadecimal) of an image's size and RGB bytes."""
    rgb = _as_rgb(image)
    digest = hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode())
    digest.update(rgb.tobytes())
    return digest.hexdigest()


def image_seed(digest: str) -> int:
    """A seed in 0..2^31 - 1 from an image's `image_hash`: it depends on nothing but the image's size and pixels."""
    return int(digest[:8], 16) & 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """CLIP-type preprocessing: resize, centre crop, rescale, normalise; each step is left out where its entry is None.

    `shortest_edge` (keeps the aspect ratio) and `resize_size` exclude each other. Sizes are (height, width) in pixels.
    """

    shortest_edge: int | None
    resize_size: tuple[int, int] | None
    resample: int
    crop_size: tuple[int, int] | None
    rescale_factor: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None

    def __post_init__(self) -> None:
        sides = [s for s in (self.shortest_edge, *(self.resize_size or ()), *(self.crop_size or ())) if s is not None]
        if any(not isinstance(s, int) or isinstance(s, bool) or not 1 <= s <= MAX_SIDE for s in sides) or (
            self.shortest_edge and self.resize_size
        ):
            raise BundleError(f"the image processor's sizes {shown(sides)} are not usable: check preprocessor_config.json and export again")
        if self.resample not in [int(method) for method in Image.Resampling]:
            raise BundleError(f"unknown resample {shown(self.resample)}, expected 0 to 5: check preprocessor_config.json and export again")
        if (self.mean is None) != (self.std is None) or not all(self.std or (1.0,)):
            raise BundleError("image_mean and image_std must both be given, without a zero std: check preprocessor_config.json")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ImageProcessor:
        """Reads `preprocessor_config.json`, or a `processor_config.json` that holds an `image_processor`.

        Raises:
            BundleError: the file is missing or not JSON, or asks for something that is not implemented.
        """
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise BundleError(f"cannot read the image processor's file {path} ({error.strerror}): export the bundle again") from error
        except ValueError as error:
            raise BundleError(f"{path} is not valid JSON ({error}): export the bundle again") from error
        return cls.from_json(config)

    @classmethod
    def from_json(cls, config: Any) -> ImageProcessor:
        """The same from parsed JSON; absent entries take the values of transformers' CLIP processor.

        Raises:
            BundleError: another kind of processor, or an entry that is not implemented.
        """
        if isinstance(config, dict) and isinstance(config.get("image_processor"), dict):
            config = config["image_processor"]
        if not isinstance(config, dict):
            raise BundleError(f"the image processor's configuration must be a JSON object, not {type(config).__name__}")
        given = {key: value for key, value in config.items() if value is not None}
        kind = given.get("image_processor_type", given.get("feature_extractor_type"))
        if kind not in ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor"):
            raise BundleError(f"image_processor_type is {shown(kind)}; only CLIPImageProcessor is implemented: export a model that uses it")
        if given.get("do_pad"):
            raise BundleError("the image processor asks for do_pad, which is not implemented: export a model without it")
        shortest, fixed = _resize_target(given.get("size", 224)) if given.get("do_resize", True) else (None, None)
        normalize = given.get("do_normalize", True)
        return cls(
            shortest_edge=shortest,
            resize_size=fixed,
            resample=given.get("resample", 3),
            crop_size=_height_width(given.get("crop_size", 224), "crop_size") if given.get("do_center_crop", True) else None,
            rescale_factor=float(_number(given.get("rescale_factor", 1 / 255), "rescale_factor"))
            if given.get("do_rescale", True)
            else None,
            mean=_triple(given.get("image_mean", (0.48145466, 0.4578275, 0.40821073)), "image_mean") if normalize else None,
            std=_triple(given.get("image_std", (0.26862954, 0.26130258, 0.27577711)), "image_std") if normalize else None,
        )

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Pixels of one image as the vision graph takes them.

        Returns:
            float32 [1, 3, H, W], the same as transformers' CLIPImageProcessorPil gives.

        Raises:
            InputError: the image is so narrow that resizing it would make more than `MAX_PIXELS` pixels.
        """
        image = _as_rgb(image)
        width, height = self._resized(*image.size)
        if width * height > MAX_PIXELS:
            raise InputError(f"an image of {image.width} x {image.height} is too narrow to be resized to {width} x {height}: crop it first")
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling(self.resample))
        if self.crop_size:
            left, top = self._crop_offset(width, height)
            image = image.crop((left, top, left + self.crop_size[1], top + self.crop_size[0]))  # outside the image: black
        pixels = np.asarray(image)
        values = pixels.astype(np.float32)
        if self.rescale_factor is not None:
            values = (pixels.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.mean is not None and self.std is not None:
            values -= np.array(self.mean, np.float32)
            values /= np.array(self.std, np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1)[None])

    def patch_box(self, index: int, grid: tuple[int, int], original_size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Where a patch lies in the original image: the inverse of resize and centre crop.

        Args:
            index: the patch, 0 .. rows * columns - 1, row after row.
            grid: rows and columns of patches over the processed image.
            original_size: width and height of the original, as PIL's `size`.

        Returns:
            left, top, right, bottom in pixels of the original, cut at its edges (an empty box if the patch shows only padding).

        Raises:
            UsageError: no such patch.
        """
        rows, columns = grid
        if not 0 <= index < rows * columns:
            raise UsageError(f"patch {index} is outside a grid of {rows} x {columns}: expected 0 to {rows * columns - 1}")
        row, column = divmod(index, columns)
        width, height = self._resized(*original_size)
        offset_x, offset_y = self._crop_offset(width, height)
        shown_height, shown_width = self.crop_size or (height, width)

        def span(place: int, count: int, shown: int, offset: int, resized: int, original: int) -> tuple[float, float]:
            edges = ((shown * at / count + offset) * original / resized for at in (place, place + 1))
            low, high = (min(max(edge, 0.0), float(original)) for edge in edges)
            return low, high

        left, right = span(column, columns, shown_width, offset_x, width, original_size[0])
        top, bottom = span(row, rows, shown_height, offset_y, height, original_size[1])
        return left, top, right, bottom

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the resize."""
        if self.resize_size:
            return self.resize_size[1], self.resize_size[0]
        if not self.shortest_edge:
            return width, height
        long = int(self.shortest_edge * max(width, height) / min(width, height))
        return (self.shortest_edge, long) if width <= height else (long, self.shortest_edge)

    def _crop_offset(self, width: int, height: int) -> tuple[int, int]:
        """Left and top of the centre crop in the resized image; negative where the crop is larger than it."""
        crop_height, crop_width = self.crop_size or (height, width)
        return (width - crop_width) // 2, (height - crop_height) // 2


def _from_file(name: str) -> Image.Image:
    if _URL.match(name):
        raise InputError(f"{name:.80} is a URL: download the image first and give its path")
    path = Path(name)
    name = "".join(character if character.isprintable() else "?" for character in name[:300])
    try:
        if not path.exists():
            raise InputError(f"there is no image {name}: check the path")
        if not path.is_file():
            raise InputError(f"{name} is not a file: give the path of one image")
        if path.stat().st_size == 0:
            raise InputError(f"{name} is empty (0 bytes): copy the image again")
        with path.open("rb"):  # permissions, told apart from what a decoder raises
            pass
    except OSError as error:
        raise InputError(f"cannot read the image {name:.200} ({error.strerror}): check the path and its permissions") from error
    too_large = f"{name} has more than {MAX_PIXELS // 10**6} megapixels, the most that is decoded: scale it down first"
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # readers warn of damaged metadata, which is not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=[f for f in _FORMATS if f in Image.OPEN]) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(too_large)
                return _upright(_to_rgb(image, name), image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(too_large) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image of a known format (JPEG, PNG, WebP, GIF, BMP, TIFF ...): convert it first") from error
    except InputError:
        raise
    except _DECODER_ERRORS as error:
        raise InputError(f"{name} is damaged or cut short ({_one_line(error)}): copy the image again") from error


def _upright(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Turns `image` by the EXIF orientation of the file it was read from; an unreadable EXIF block turns nothing."""
    try:
        orientation = opened.getexif().get(_EXIF_ORIENTATION)
    except _DECODER_ERRORS:
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _as_rgb(image: Image.Image) -> Image.Image:
    """The image itself where it already is what `load_image` gives."""
    return image if image.mode == "RGB" and "transparency" not in image.info else load_image(image)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if not image.width or not image.height:
        raise InputError(f"{name} has no pixels ({image.width} x {image.height})")
    if image.width * image.height > MAX_PIXELS:  # before it is decoded, where a caller has only opened it
        raise InputError(
            f"{name} has {image.width} x {image.height} pixels, more than {MAX_PIXELS // 10**6} megapixels: scale it down first"
        )
    try:
        image.load()
        if image.mode == "RGB" and "transparency" not in image.info:
            return image.copy()
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # 16 bits, whatever the mode's name
            sixteen = np.asarray(image.convert("I")).clip(0, 65535)
            return Image.fromarray(((sixteen + 128) // 257).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise InputError(f"{name} holds 32-bit values (mode {image.mode}), whose range is unknown: convert it to 8 bits first")
        if "transparency" not in image.info and not {"A", "a"} & set(image.getbands()):
            return image.convert("RGB")
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    except InputError:
        raise
    except _DECODER_ERRORS as error:
        raise InputError(f"{name} (mode {image.mode}) is damaged or cut short ({_one_line(error)}): copy the image again") from error


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(
            f"an image array must be uint8 of shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], got {array.dtype} {list(array.shape)}"
        )
    if not array.size:
        raise InputError(f"the image array has no pixels (shape {list(array.shape)})")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise InputError(f"an array of shape {list(array.shape)} has more than {MAX_PIXELS // 10**6} megapixels: scale it down first")
    flat = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return _to_rgb(Image.fromarray(np.ascontiguousarray(flat)), "the image array")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _resize_target(size: Any) -> tuple[int | None, tuple[int, int] | None]:
    """The shortest edge, or a fixed (height, width)."""
    if isinstance(size, int):
        return size, None
    if isinstance(size, Mapping) and "shortest_edge" in size and size.get("longest_edge") is None:
        return size["shortest_edge"], None
    return None, _height_width(size, "size")


def _height_width(size: Any, name: str) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= set(size) and not {"longest_edge", "max_height"} & set(size):
        return size["height"], size["width"]
    raise BundleError(f"the image processor's {name} {shown(size)} is not implemented: expected a shortest edge, or height and width")


def _triple(values: Any, name: str) -> tuple[float, float, float]:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise BundleError(f"the image processor's {name} must be three numbers, got {shown(values)}")
    red, green, blue = (float(_number(value, name)) for value in values)
    return red, green, blue


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BundleError(f"the image processor's {name} must be numeric, got {shown(value)}")
    return value
