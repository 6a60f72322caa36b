"""Loading images, and preprocessing that gives the Hugging Face processor's pixels."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.errors import BundleError, InputError, UsageError
from runtime.images import ImageProcessor, image_hash, image_seed, load_image

TOLERANCE = 1e-5  # measured: 0.0, the steps and their order of rounding are the same
CLIP = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
SMALL = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
SIZES = [(1, 1), (2, 2), (1, 40), (40, 1), (7, 5), (47, 49), (48, 48), (48, 96), (49, 333), (100, 75), (333, 500), (640, 427), (479, 641)]


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def transformers_pixels(image: Image.Image, config: dict[str, Any]) -> np.ndarray:
    transformers = pytest.importorskip("transformers")
    arguments = {k: v for k, v in config.items() if k != "image_processor_type"}
    return transformers.CLIPImageProcessorPil(**arguments)(image, return_tensors="np")["pixel_values"]


@pytest.mark.parametrize(
    "change",
    [
        SMALL,
        {**SMALL, "resample": 0},
        {**SMALL, "resample": 2},
        {**SMALL, "crop_size": {"height": 37, "width": 45}},
        {**SMALL, "crop_size": {"height": 60, "width": 51}},
        {**SMALL, "do_center_crop": False},
        {**SMALL, "do_resize": False},
        {**SMALL, "size": {"height": 40, "width": 61}},
        {**SMALL, "do_normalize": False},
        {**SMALL, "do_rescale": False},
        {"size": 48, "crop_size": 48, "rescale_factor": 1 / 127.5, "image_mean": [0.5, 0.4, 0.3], "image_std": [1.0, 0.5, 0.25]},
    ],
    ids=str,
)
def test_pixels_are_those_of_transformers_for_every_size(change: dict[str, Any]) -> None:
    config = {**CLIP, **change}
    process = ImageProcessor.from_json(config)
    worst = 0.0
    for seed, (width, height) in enumerate(SIZES):
        image = noise(width, height, seed=seed)
        expected, got = transformers_pixels(image, config), process(image)
        assert got.dtype == np.float32
        assert got.shape == expected.shape
        worst = max(worst, float(np.abs(got - expected).max()))
    print(f"max abs error over {len(SIZES)} sizes: {worst:.1e}")
    assert worst <= TOLERANCE


def test_pixels_are_those_of_transformers_with_the_real_llava_configuration(model_configs: Path) -> None:
    path = model_configs / "llava-1.5-7b-hf" / "preprocessor_config.json"
    process = ImageProcessor.from_file(path)
    for size in [(336, 336), (640, 480), (123, 457), (2000, 1300)]:
        image = noise(*size)
        error = np.abs(process(image) - transformers_pixels(image, json.loads(path.read_text()))).max()
        print(f"{size}: max abs error {error:.1e}")
        assert error <= TOLERANCE


@pytest.mark.parametrize("change", [{"resample": 2}, {"size": {"shortest_edge": 49}}, {"image_mean": [0.5, 0.5, 0.5]}], ids=str)
def test_negative_control_a_wrong_step_changes_the_pixels(change: dict[str, Any]) -> None:
    config = {**CLIP, **SMALL}
    image = noise(100, 75)
    wrong = ImageProcessor.from_json({**config, **change})(image)
    assert np.abs(wrong - transformers_pixels(image, config)).max() > 1000 * TOLERANCE


def with_transparency(image: Image.Image, value: Any) -> Image.Image:
    """As a PNG would store it: one colour or palette entry is transparent."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=value)
    return Image.open(buffer)


@pytest.mark.parametrize(
    "make",
    [
        lambda: noise(60, 50, "L"),
        lambda: noise(60, 50, "LA"),
        lambda: noise(60, 50, "RGBA"),
        lambda: noise(60, 50, "CMYK"),
        lambda: noise(60, 50, "YCbCr"),
        lambda: noise(60, 50, "L").convert("1"),
        lambda: noise(60, 50).quantize(16),
        lambda: with_transparency(noise(60, 50).quantize(16), 3),
        lambda: with_transparency(noise(60, 50, "L"), 200),
        lambda: with_transparency(Image.new("RGB", (60, 50), (9, 8, 7)), (9, 8, 7)),
    ],
)
def test_every_eight_bit_mode_is_read_as_transformers_reads_it(make: Callable[[], Image.Image]) -> None:
    config = {**CLIP, **SMALL}
    expected = transformers_pixels(make(), config)
    process = ImageProcessor.from_json(config)
    assert np.abs(process(load_image(make())) - expected).max() <= TOLERANCE
    assert np.abs(process(make()) - expected).max() <= TOLERANCE


def test_a_file_a_pil_image_and_arrays_give_the_same_pixels(tmp_path: Path) -> None:
    image = noise(20, 10)
    image.save(tmp_path / "x.png")
    array = np.asarray(image)
    for source in (image, tmp_path / "x.png", str(tmp_path / "x.png"), array, np.asfortranarray(array)):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert loaded.tobytes() == image.tobytes()
    grey = array[:, :, 0]
    assert load_image(grey).tobytes() == load_image(grey[:, :, None]).tobytes() == Image.fromarray(grey).convert("RGB").tobytes()


def test_transparent_pixels_become_white() -> None:
    array = np.zeros((2, 2, 4), np.uint8)
    array[0, 0] = (10, 20, 30, 255)
    got = np.asarray(load_image(array))
    assert got[0, 0].tolist() == [10, 20, 30]
    assert got[1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright_and_pil_images_are_not(tmp_path: Path, orientation: int) -> None:
    lying = noise(24, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x.png"
    lying.save(path, exif=exif)
    upright = load_image(path)
    assert upright.size == ((24, 16) if orientation < 5 else (16, 24))
    from PIL import ImageOps

    with Image.open(path) as opened:
        assert upright.tobytes() == ImageOps.exif_transpose(opened).tobytes()
        assert load_image(opened).tobytes() == lying.tobytes()
    assert (upright.tobytes() == lying.tobytes()) == (orientation == 1)


def test_a_broken_exif_block_does_not_refuse_the_image(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    noise(16, 16).save(path, exif=b"Exif\x00\x00" + b"II*\x00\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_image(path).size == (16, 16)


def test_sixteen_bit_greyscale_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    for source in (tmp_path / "x.png", Image.fromarray(values)):
        assert np.asarray(load_image(source))[0, :, 1].tolist() == [0, 1, 128, 255]


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "x.gif").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), r"uint8 .* got float32 \[4, 4, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), r"got uint8 \[3, 8, 8\]"),
        (np.zeros((4, 4, 2), np.uint8), r"got uint8 \[4, 4, 2\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"got uint8 \[1, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), "has no pixels"),
    ],
)
def test_other_arrays_are_refused_with_what_is_expected(array: np.ndarray, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_image(array)


@pytest.mark.parametrize("image", [Image.new("F", (4, 4)), Image.new("I", (4, 4))], ids=["F", "I"])
def test_images_of_unknown_range_are_refused(image: Image.Image) -> None:
    with pytest.raises(InputError, match=r"32-bit values .* convert it to 8 bits first"):
        load_image(image)


def test_other_types_are_refused() -> None:
    with pytest.raises(InputError, match="a path, a PIL image or a numpy array, not list"):
        load_image([1, 2])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no pixels"):
        load_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("url", ["https://example.org/a.png", "http://x/y", "data:image/png;base64,AAAA", "FILE:///tmp/x.png", "s3://b/k"])
def test_urls_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="is a URL: download the image first and give its path"):
        load_image(url)


def test_a_file_name_with_a_colon_is_not_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    noise(4, 4).save("a:b.png")
    assert load_image("a:b.png").size == (4, 4)


def test_missing_empty_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no image .*nowhere.png: check the path"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match="is not a file"):
        load_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError, match=r"empty.png is empty \(0 bytes\)"):
        load_image(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("not an image at all\n" * 100)
    with pytest.raises(InputError, match="not an image of a known format"):
        load_image(tmp_path / "text.png")
    (tmp_path / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="not an image of a known format"):
        load_image(tmp_path / "x.eps")
    with pytest.raises(InputError, match=r"cannot read the image .*name too long"):
        load_image(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
def test_truncated_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    noise(64, 64).save(path)
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.8):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError, match=r"is damaged or cut short|not an image"):
            load_image(path)


def test_a_truncated_file_opened_by_the_caller_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with Image.open(path) as opened, pytest.raises(InputError, match="damaged or cut short"):
        load_image(opened)


def test_damaged_bytes_raise_nothing_but_input_errors(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for kind in ("png", "jpg", "webp", "gif", "tiff"):
        path = tmp_path / f"x.{kind}"
        noise(24, 24).save(path)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            places = random.integers(0, min(len(whole), 200), 4)
            damaged[places] = random.integers(0, 256, 4)
            path.write_bytes(damaged.tobytes())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns about odd metadata
                with contextlib.suppress(InputError):
                    load_image(path)


def png_of_size(path: Path, width: int, height: int) -> None:
    """A valid header and almost no data: its true size shows only on decoding."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))


@pytest.mark.parametrize("size", [(8_001, 8_000), (12_000, 10_000), (20_000, 20_000), (60_000, 60_000)])
def test_too_large_images_are_refused_by_their_header_and_pillow_stays_as_it_was(tmp_path: Path, size: tuple[int, int]) -> None:
    png_of_size(tmp_path / "x.png", *size)
    before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(InputError, match="more than 64 megapixels"):
            load_image(tmp_path / "x.png")
    assert not heard
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def test_too_large_pil_images_and_arrays_are_refused_without_being_decoded(tmp_path: Path) -> None:
    png_of_size(tmp_path / "x.png", 8_001, 8_000)
    with Image.open(tmp_path / "x.png") as opened, pytest.raises(InputError, match="8001 x 8000 pixels, more than 64 megapixels: scale it"):
        load_image(opened)
    with pytest.raises(InputError, match="more than 64 megapixels"):
        load_image(np.broadcast_to(np.uint8(0), (8_001, 8_000, 3)))


def test_an_image_too_narrow_to_resize_is_refused() -> None:
    with pytest.raises(InputError, match="1 x 4000 is too narrow to be resized to 336 x 1344000"):
        ImageProcessor.from_json(CLIP)(Image.new("RGB", (1, 4000)))


def test_a_processor_is_read_from_either_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(CLIP))
    (tmp_path / "b.json").write_text(json.dumps({"image_processor": CLIP, "processor_class": "LlavaProcessor"}))
    assert ImageProcessor.from_file(tmp_path / "a.json") == ImageProcessor.from_file(tmp_path / "b.json") == ImageProcessor.from_json(CLIP)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_processor_type": "Qwen2VLImageProcessor"}, "'Qwen2VLImageProcessor'; only CLIPImageProcessor is implemented"),
        ({"image_processor_type": None}, "image_processor_type is None"),
        ({"size": {"longest_edge": 10}}, "size .*longest_edge.* is not implemented"),
        ({"size": {"shortest_edge": 10, "longest_edge": 20}}, "is not implemented"),
        ({"crop_size": {"shortest_edge": 10}}, "crop_size .* is not implemented"),
        ({"crop_size": {"height": 0, "width": 5}}, "not usable"),
        ({"size": {"shortest_edge": "336"}}, "not usable"),
        ({"resample": 17}, "unknown resample 17"),
        ({"image_std": [1, 0, 1]}, "zero std"),
        ({"image_mean": [1, 1]}, "image_mean must be three numbers"),
        ({"image_mean": ["a", 1, 1]}, "image_mean must be numeric"),
        ({"rescale_factor": "x"}, "rescale_factor must be numeric"),
        ({"do_pad": True}, "do_pad"),
    ],
)
def test_processors_that_are_not_implemented_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        ImageProcessor.from_json({**CLIP, **change})


def test_a_processor_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot read the image processor's file"):
        ImageProcessor.from_file(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        ImageProcessor.from_file(tmp_path / "x.json")
    with pytest.raises(BundleError, match="must be a JSON object, not list"):
        ImageProcessor.from_json([])


def test_patch_boxes_of_known_images() -> None:
    process = ImageProcessor.from_json(CLIP)
    assert process.patch_box(0, (24, 24), (336, 336)) == (0, 0, 14, 14)
    assert process.patch_box(25, (24, 24), (336, 336)) == (14, 14, 28, 28)
    assert process.patch_box(0, (24, 24), (1344, 672)) == (336, 0, 364, 28)  # twice the size, the left and right quarter cut away
    assert process.patch_box(575, (24, 24), (672, 1344)) == (644, 980, 672, 1008)
    padded = ImageProcessor.from_json({**CLIP, "do_resize": False})
    assert padded.patch_box(0, (24, 24), (100, 100)) == (0, 0, 0, 0)
    with pytest.raises(UsageError, match="patch 576 is outside a grid of 24 x 24: expected 0 to 575"):
        process.patch_box(576, (24, 24), (336, 336))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (97, 131), (24, 24), (48, 48)])
@pytest.mark.parametrize("change", [SMALL, {**SMALL, "size": {"height": 60, "width": 72}}, {**SMALL, "do_center_crop": False}], ids=str)
def test_what_is_drawn_into_a_patch_box_appears_in_that_patch(size: tuple[int, int], change: dict[str, Any]) -> None:
    process = ImageProcessor.from_json({**CLIP, **change, "do_normalize": False})
    grid = (4, 4)
    for index in (0, 5, 6, 15):
        image = Image.new("RGB", size)
        left, top, right, bottom = process.patch_box(index, grid, size)
        image.paste((255, 255, 255), (round(left), round(top), round(right), round(bottom)))
        shown = process(image)[0].mean(0)
        rows, columns = np.indices(shown.shape)
        row, column = (rows * shown.shape[0] ** -1 * grid[0]).astype(int), (columns * shown.shape[1] ** -1 * grid[1]).astype(int)
        light = [[float(shown[(row == r) & (column == c)].mean()) for c in range(4)] for r in range(4)]
        flat = np.array(light).ravel()
        assert flat.argmax() == index
        assert flat[index] > 0.75
        assert np.delete(flat, index).max() < 0.3


def test_the_seed_depends_on_pixels_and_size_alone(tmp_path: Path) -> None:
    image = noise(6, 4)
    image.save(tmp_path / "x.png")
    assert image_seed(image_hash(load_image(tmp_path / "x.png"))) == image_seed(image_hash(image)) == image_seed(image_hash(image.copy()))
    assert len(image_hash(image)) == 64
    assert image_hash(image) != image_hash(Image.frombytes("RGB", (4, 6), image.tobytes()))
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    seeds = [image_seed(image_hash(picture)) for picture in (*(noise(5, 5, seed=i) for i in range(50)), changed, image)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_images_can_be_loaded_from_several_threads(tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / "x.png")
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                load_image(tmp_path / "x.png")
        except InputError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
