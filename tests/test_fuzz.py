"""Random bad input of every kind: a right answer or an error of the project's own, soon, and nothing is changed by it.

Seeded; a failure names its family and seed. ENTROPY_PRUNE_FUZZ_ROUNDS=10 runs ten times as many cases.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from runtime.errors import EntropyPruneError, InputError
from runtime.generation import Generation
from runtime.names import MANIFEST_FILE
from runtime.pipeline import VisionLanguageModel, load

LIMIT_S = 10
QUESTION = "what is at row 2 column 3?"
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "JPEG2000")
SUFFIXES = (".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".ppm", ".tga", ".jp2", ".avif", ".eps", "", ".svg", ".pdf")
ALPHABETS = (
    "abc ", "\x00\x01\x1b\x7f\u200b\ufeff", "\ud800\udfff a", "🙂👩\u200d👩\u200d👧🏽🇩🇪", "مرحبا \u202eשלום", "\n\t\r \u2028\u3000",
    "<>/s|imagepdun_tr{}% ",
    "\U000f4e50\U000f4e510123456789", "e\u0301a\u0308",
)  # fmt: skip
TOKENS = ("<image>", "</s>", "<s>", "<pad>", "<unk>", "<|im_end|>", "{{ 1/0 }}", "{% for %}", "USER:", "ASSISTANT:")


@dataclass(frozen=True, slots=True)
class Place:
    """Where cases run: a loaded model, a bundle to copy, and a folder for their files."""

    vlm: VisionLanguageModel
    bundle: Path
    folder: Path

    def ask(self, messages: Any = QUESTION, images: Any = (), **options: Any) -> Generation:
        return self.vlm.generate(messages, images, **{"max_new_tokens": 2, **options})

    def file(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


Case = Callable[[random.Random, Place], Generation]

# ---------------------------------------------------------------- images


def picture(r: random.Random, sides: tuple[int, ...] = (1, 2, 7, 33, 56, 90)) -> Image.Image:
    size = r.choice(sides), r.choice(sides)
    noise = np.random.default_rng(r.getrandbits(32)).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(noise, "RGBA").convert(r.choice(("RGB", "RGBA", "L", "LA", "P", "CMYK", "YCbCr", "1", "I", "F", "HSV", "LAB")))


def encoded(r: random.Random) -> bytes:
    """A file of a random format, sometimes animated or turned by EXIF."""
    kind, image, data = r.choice(FORMATS), picture(r), io.BytesIO()
    options: dict[str, Any] = {}
    if kind in ("PNG", "GIF", "TIFF", "WEBP") and r.random() < 0.3:
        options = {"save_all": True, "append_images": [image, image]}
    if kind in ("JPEG", "PNG", "WEBP") and r.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = r.choice((0, 1, 6, 8, 99))
        options["exif"] = exif
    for attempt in (image, image.convert("RGB")):
        try:
            data = io.BytesIO()
            attempt.save(data, kind, **options)
            break
        except (OSError, ValueError, KeyError):
            continue
    return data.getvalue()


def noise_file(r: random.Random, place: Place) -> Generation:
    magic = r.choice((b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"RIFF\xff\xff\0\0WEBPVP8 ", b"P6 "))
    return place.ask(images=[place.file("noise" + r.choice(SUFFIXES), magic + r.randbytes(r.choice((0, 1, 20, 3000))))])


def damaged_file(r: random.Random, place: Place) -> Generation:
    data = bytearray(encoded(r)) or bytearray(1)
    if r.random() < 0.5:
        data = data[: r.randrange(len(data))]
    for _ in range(r.choice((0, 1, 5, 50))):
        if data:
            data[r.randrange(len(data)) if r.random() < 0.5 else r.randrange(min(64, len(data)))] = r.randrange(256)
    return place.ask(images=[place.file("damaged" + r.choice(SUFFIXES), bytes(data))])


def whole_file(r: random.Random, place: Place) -> Generation:
    return place.ask(images=[place.file("whole" + r.choice(SUFFIXES), encoded(r))])


def huge_header(r: random.Random, place: Place) -> Generation:
    """A PNG or BMP of a few bytes that says it is enormous."""
    sides = (0, 1, 8001, 20_000, 65_535, 2**31 - 1, 2**32 - 1)
    width, height = r.choice(sides), r.choice(sides)
    if r.random() < 0.5:
        header = struct.pack(">IIBBBBB", width, height, r.choice((8, 16)), r.choice((0, 2, 3, 6)), 0, 0, r.choice((0, 1)))
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
        data = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
        )
    else:
        data = b"BM" + struct.pack("<IHHIIIIHHIIIIII", 200, 0, 0, 54, 40, width, height, 1, r.choice((8, 24, 32)), 0, 0, 0, 0, 0, 0)
    return place.ask(images=[place.file("huge.bin", data)])


def array_image(r: random.Random, place: Place) -> Generation:
    shape = tuple(r.choice((0, 1, 3, 4, 5, 56)) for _ in range(r.choice((0, 1, 2, 3, 3, 3, 4))))
    kind = r.choice(("uint8", "uint8", "uint8", "float32", "float64", "int64", "bool", "complex64", "object", "U3", "datetime64[s]", "u2"))
    array = np.zeros(shape, kind)
    if r.random() < 0.2:
        array = array[..., ::-1] if array.ndim else array
    if r.random() < 0.1:  # a few bytes that pretend to be many
        array = np.broadcast_to(np.uint8(7), (r.choice((1, 10**5, 10**6)), 10**6, 3))
    return place.ask(images=[array])


def pil_image(r: random.Random, place: Place) -> Generation:
    if r.random() < 0.5:
        return place.ask(images=[picture(r, (1, 2, 3000, 56))])
    try:
        with warnings.catch_warnings(action="ignore"):
            opened = Image.open(io.BytesIO(encoded(r)[: r.choice((200, 10**6))]))
    except (OSError, SyntaxError) as error:  # the caller's own
        raise InputError("the caller could not open the image") from error
    if r.random() < 0.3:
        opened.close()
    return place.ask(images=[opened])


def image_argument(r: random.Random, place: Place) -> Generation:
    things: tuple[Any, ...] = (None, 3, 2.5, True, b"abc", "a.png", "\0", "x" * 5000, "\ud800.png", "https://x/a.png", "data:,x",
              "file:///a", {}, [], [[]], (1,), set(),
              object(), place.folder, "", ".", "..", "/", "/dev/null", np.zeros((56, 56, 3), np.uint8), picture(r), "CON", "~",
              "a\nb")  # fmt: skip
    images = r.choice(things) if r.random() < 0.3 else [r.choice(things) for _ in range(r.choice((1, 1, 2)))]
    return place.ask(images=images)


# ---------------------------------------------------------------- prompts and messages


def words(r: random.Random) -> str:
    """A text of up to 200 characters of all kinds, and special tokens."""
    length = r.choice((0, 1, 3, 20, 200))
    kinds = r.sample(ALPHABETS, r.choice((1, 1, 2, len(ALPHABETS))))
    pieces = [r.choice(TOKENS) if r.random() < 0.1 else r.choice(r.choice(kinds)) for _ in range(length)]
    return "".join(pieces)


def prompt(r: random.Random, place: Place) -> Generation:
    images = [np.zeros((56, 56, 3), np.uint8)] * r.choice((0, 0, 1, 2))
    return place.ask(words(r), images)


def long_prompt(r: random.Random, place: Place) -> Generation:
    return place.ask(((words(r) or "<image>") * 100_000)[:100_000])


def nested(r: random.Random, depth: int = 0) -> Any:
    """Something like JSON, often nearly a message."""
    kind = r.randrange(12 if depth < 4 else 6)
    if kind < 4:
        return r.choice((None, True, 0, -1, 1.5, float("nan"), 10**6000, "", "user", "image", "text", "type", b"x", words(r), np.zeros(2)))
    if kind < 6:
        return r.choice(([], {}, (), {"type": "image"}, {"type": "text", "text": words(r)}, {"type": "text", "text": 3}))
    if kind < 9:
        return [nested(r, depth + 1) for _ in range(r.randrange(4))]
    keys = ("role", "content", "type", "text", "image", words(r), 3)
    return {r.choice(keys): nested(r, depth + 1) for _ in range(r.randrange(4))}


def message(r: random.Random) -> Any:
    if r.random() < 0.2:
        return nested(r)
    part: Callable[[], Any] = lambda: r.choice(({"type": "text", "text": words(r)}, {"type": "image"}, nested(r, 2)))  # noqa: E731
    content = r.choice((words(r), [part() for _ in range(r.randrange(4))], nested(r, 2)))
    return {"role": r.choice(("user", "user", "system", "assistant", "tool", "", nested(r, 3))), "content": content}


def messages(r: random.Random, place: Place) -> Generation:
    images = [np.zeros((56, 56, 3), np.uint8)] * r.choice((0, 0, 1, 2))
    return place.ask([message(r) for _ in range(r.choice((0, 1, 1, 2, 5)))], images)


def anything(r: random.Random, place: Place) -> Generation:
    return place.ask(nested(r), [])


def deep(r: random.Random, place: Place) -> Generation:
    value: Any = r.choice(([], {}, "x"))
    for _ in range(r.choice((50, 3000, 20_000))):
        value = [value] if r.random() < 0.5 else {"content": value}
    return place.ask(r.choice((value, [value], [{"role": "user", "content": value}], [{"role": "user", "content": [value]}])))


# ---------------------------------------------------------------- options and states

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 4, 16, -1, 3, 10**9, 10**30, 10**5000, -(10**5000), 0.0, 0.5, 1.0, 4.0, 1e-300, 1e308, 1e-45,
    5e-324, -0.5, float("nan"),
    float("inf"), "", "4", "all", "auto", "x" * 10_000, "\ud800", b"4", [], [4], (), ("a", ""), ("a", 3), {"a": 1}, [1, -1], [2, 10**30],
    object(), np.int64(4),
    np.float32(0.5), np.zeros(3), np.array(4), Image, 1j,
)  # fmt: skip
NAMES = (
    "keep",
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "seed",
    "stop_strings",
    "eos_token_ids",
)


def options(r: random.Random, place: Place) -> Generation:
    given = {r.choice((*NAMES, "state", "nonsense")): r.choice(VALUES) for _ in range(r.choice((1, 1, 2, 4)))}
    if r.random() < 0.5:
        given["do_sample"] = True
    return place.ask(images=[np.zeros((56, 56, 3), np.uint8)] if r.random() < 0.5 else [], **given)


def load_options(r: random.Random, place: Place) -> Generation:
    given: dict[str, Any] = {
        r.choice(("threads", "cache_bytes", "check_hashes", "shared_threads")): r.choice(VALUES) for _ in range(r.choice((1, 1, 2)))
    }
    given.pop("shared_threads", None)  # with threads of its own the session may not start once the process shares them
    if isinstance(given.get("threads"), int) and given["threads"] > 64:
        given["threads"] = 64
    return load(r.choice((place.bundle, str(place.bundle))), **given).generate(QUESTION, max_new_tokens=2)


def state_misuse(r: random.Random, place: Place) -> Generation:
    state = place.vlm.prefill(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words(r)}]}], [np.zeros((56, 56, 3), np.uint8)]
    )
    kind = r.randrange(6)
    if kind == 0:
        return place.ask(nested(r), state=state)
    if kind == 1:
        return place.ask([message(r)], [picture(r)], state=state)
    if kind == 2:
        with place.vlm.stream("hello", state=state, max_new_tokens=8) as stream:
            next(iter(stream), None)
            return place.ask(words(r), state=state)
    if kind == 3:
        place.ask(words(r) + "a", state=state, keep=r.choice((None, 4, 2, "all", "auto")))
        return place.ask("hello", state=state)
    if kind == 4:
        return place.ask(state=r.choice(VALUES))
    stream = place.vlm.stream(words(r), state=state.clone(), max_new_tokens=r.choice((1, 8)))
    stream.close()
    return stream.result


# ---------------------------------------------------------------- bundles


def copied(r: random.Random, place: Place) -> Path:
    folder = place.folder / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place.bundle, folder)
    del r
    return folder


def loaded(r: random.Random, bundle: Path) -> Generation:
    images = [np.zeros((56, 56, 3), np.uint8)] * r.choice((0, 1))
    return load(bundle).generate(QUESTION, images, keep=r.choice((None, None, "auto")), max_new_tokens=2)


def damaged_bundle(r: random.Random, place: Place) -> Generation:
    folder = copied(r, place)
    path = r.choice(sorted(p for p in folder.iterdir() if p.name != "report.json"))
    data = bytearray(path.read_bytes())
    kind = r.randrange(6)
    if kind == 0:
        for _ in range(r.choice((1, 10))):
            data[r.randrange(len(data))] ^= 1 << r.randrange(8)
        path.write_bytes(data)
    elif kind == 1:
        path.write_bytes(data[: r.randrange(len(data))])
    elif kind == 2:
        path.unlink()
    elif kind == 3:
        path.rename(
            path.with_name(words(r).replace("/", "").replace("\0", "").encode("ascii", "ignore").decode()[:50].strip(".") or "renamed")
        )
    elif kind == 4:
        path.unlink()
        path.mkdir()
    else:
        other = r.choice(sorted(p for p in folder.iterdir() if p.is_file() and p != path))
        path.write_bytes(other.read_bytes())
    return loaded(r, folder)


def entries(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of parsed JSON."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from entries(value[key])


JSON_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    1,
    2,
    3,
    -1,
    16,
    17,
    10**9,
    10**18,
    10**30,
    0.5,
    1e308,
    "",
    "x",
    "../x",
    "/etc/passwd",
    "\0",
    [],
    {},
    [1],
    {"a": 1},
    "4" * 300,
)


def mutate(r: random.Random, raw: Any) -> None:
    shallow = [(c, k) for c, k in entries(raw) if c is raw or c is raw.get("geometry")] if isinstance(raw, dict) else []
    for _ in range(r.choice((1, 1, 2, 4))):
        places = shallow if shallow and r.random() < 0.6 else list(entries(raw))
        if not places:
            return
        container, key = r.choice(places)
        if key not in (container if isinstance(container, dict) else range(len(container))):
            continue
        if r.random() < 0.15:
            del container[key]
        else:
            container[key] = r.choice(JSON_VALUES)


def lying_manifest(r: random.Random, place: Place) -> Generation:
    folder = copied(r, place)
    raw = json.loads((folder / MANIFEST_FILE).read_text())
    if r.random() < 0.4:
        raw.update(schema_version=2, auto_keep=r.choice((0.9, 0.9, float("nan"), float("inf"), 0, 1, 2, -0.1, *JSON_VALUES)))
    if r.random() < 0.8:
        mutate(r, raw)
    (folder / MANIFEST_FILE).write_text(json.dumps(raw))
    return loaded(r, folder)


def lying_text_file(r: random.Random, place: Place) -> Generation:
    """A text file of the bundle that was changed, with a hash that fits."""
    folder = copied(r, place)
    path = folder / r.choice(
        ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "special_tokens.json", "generation_config.json")
    )
    if path.suffix == ".json" and r.random() < 0.7:
        value = json.loads(path.read_text())
        mutate(r, value)
        data = json.dumps(value).encode()
    else:
        changed = bytearray(path.read_bytes())
        for _ in range(r.choice((1, 3))):
            at = r.randrange(len(changed))
            changed[at : at + r.choice((0, 1, 5))] = r.randbytes(r.choice((0, 1, 3)))
        data = bytes(changed)
    path.write_bytes(data)
    raw = json.loads((folder / MANIFEST_FILE).read_text())
    raw["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST_FILE).write_text(json.dumps(raw))
    return loaded(r, folder)


FAMILIES: dict[str, tuple[Case, int]] = {
    "noise_file": (noise_file, 25), "damaged_file": (damaged_file, 60), "whole_file": (whole_file, 30), "huge_header": (huge_header, 20),
    "array_image": (array_image, 40), "pil_image": (pil_image, 20), "image_argument": (image_argument, 40), "prompt": (prompt, 60),
    "long_prompt": (long_prompt, 6), "messages": (messages, 80), "anything": (anything, 40), "deep": (deep, 16), "options": (options, 120),
    "load_options": (load_options, 25), "state_misuse": (state_misuse, 40), "damaged_bundle": (damaged_bundle, 40),
    "lying_manifest": (lying_manifest, 90), "lying_text_file": (lying_text_file, 60),
}  # fmt: skip

# ---------------------------------------------------------------- what must come out


@contextmanager
def limited() -> Iterator[None]:
    """Ends a case that hangs (where signals can)."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {LIMIT_S} s")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(case: Case, name: str, seed: int, place: Place) -> str:
    """Runs one case; "answered" or the error's name. Whatever else comes out fails the test, with the case's name."""
    try:
        with limited():
            answer = case(random.Random(f"{name}:{seed}"), place)
    except EntropyPruneError as error:
        told, end = str(error), type(error).__name__
    except Exception as error:
        raise AssertionError(f"{name}:{seed}: {type(error).__name__}: {error!s:.500}") from error
    else:
        check_answer(answer, f"{name}:{seed}: {answer!r:.300}")
        return "answered"
    assert 15 < len(told) < 1500, f"{name}:{seed}: a message of {len(told)} characters: {told:.200}"
    assert "\n" not in told, f"{name}:{seed}: {told}"
    return end


def check_answer(answer: Generation, where: str) -> None:
    assert answer.finish_reason in ("eos", "stop", "length", "cancelled"), where
    assert len(answer.token_ids) >= 1, where
    assert answer.kept_tokens == len(answer.kept_indices) <= answer.visual_tokens, where
    assert list(answer.kept_indices) == sorted({i for i in answer.kept_indices if 0 <= i < answer.visual_tokens}), where
    assert isinstance(answer.text, str), where


def fingerprint(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def place(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(load(tiny_bundle), tiny_bundle, tmp_path_factory.mktemp("fuzz"))


def reference(place: Place) -> tuple[Any, ...]:
    image = np.random.default_rng(3).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    answer = place.ask("read row 2.", [image], max_new_tokens=6)
    return answer.token_ids, answer.kept_indices, answer.text


@pytest.mark.parametrize("name", FAMILIES)
def test_random_input_gives_an_answer_or_an_error_of_our_own(place: Place, name: str) -> None:
    case, count = FAMILIES[name]
    before, expected = fingerprint(place.bundle), reference(place)
    rounds = int(os.environ.get("ENTROPY_PRUNE_FUZZ_ROUNDS", "1"))
    ends = Counter(outcome(case, name, seed, place) for seed in range(count * rounds))
    print(name, dict(ends))
    assert reference(place) == expected, f"the model answers otherwise after {name}"
    assert fingerprint(place.bundle) == before, f"{name} changed the bundle"


def test_there_are_enough_cases() -> None:
    assert sum(count for _, count in FAMILIES.values()) >= 200


def test_other_errors_and_wrong_answers_would_be_noticed(place: Place) -> None:
    def broken(r: random.Random, place: Place) -> Generation:
        raise TypeError("'NoneType' object is not iterable")

    def two_lines(r: random.Random, place: Place) -> Generation:
        raise InputError("a first line that is long enough\nand another")

    def wrong(r: random.Random, place: Place) -> Generation:
        answer = place.ask(images=[np.zeros((56, 56, 3), np.uint8)])
        return Generation(**{f: getattr(answer, f) for f in Generation.__dataclass_fields__} | {"kept_indices": (3, 2, 1, 99)})

    for case, words_of_it in ((broken, "NoneType"), (two_lines, "another"), (wrong, "kept_indices")):
        with pytest.raises(AssertionError, match=words_of_it):
            outcome(case, "control", 0, place)


# ---------------------------------------------------------------- what it has found


def endless(depth: int = 20_000) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: p.ask([{"role": "user", "content": [endless()]}]), "a part must be"),
        (lambda p: p.ask([{"role": np.zeros(2), "content": "x"}]), "the role is array"),
        (lambda p: p.ask(images="scene.png"), r"images must be a list .*, not str: write images=\[image\]"),
        (lambda p: p.ask(images=np.zeros((1, 56, 56, 3), np.uint8)), "images must be a list .*, not ndarray"),
        (lambda p: p.ask(images=None), "images must be a list .*, not NoneType"),
        (lambda p: p.ask(images=[np.broadcast_to(np.uint8(7), (10**6, 10**6, 3))]), "more than 64 megapixels: scale it down first"),
        (lambda p: p.ask(images=["a\nb"]), r"there is no image a\?b: check the path"),
        (lambda p: p.ask(state=4), "state must be what this model's prefill gave, not int"),
        (lambda p: p.ask(keep=np.zeros(3)), r"holds the budgets 4, 2 and all, not array\(\[0., 0., 0.\]\)"),
        (lambda p: p.ask(keep=True), "holds the budgets 4, 2 and all, not True"),
        (lambda p: p.ask(max_new_tokens=-(10**5000)), "max_new_tokens must be an integer of 1 or more: got a value of type int"),
        (lambda p: p.ask(do_sample=True, temperature=10**400), r"temperature must be a number above 0.*, and at most 1e\+30"),
        (lambda p: p.ask(repetition_penalty=1e308), r"repetition_penalty must be a number above 0.*, and at most 1e\+30"),
        (lambda p: p.ask(repetition_penalty=1e-300), "repetition_penalty must be at least 1e-30"),
        (lambda p: load(p.bundle, threads=cast(Any, "4")), "threads is '4'; give 1 to 1024"),
        (lambda p: load(p.bundle, threads=10**9), "threads is 1000000000; give 1 to 1024"),
        (lambda p: load(p.bundle, cache_bytes=cast(Any, 0.5)), "cache_bytes is 0.5; give the bytes"),
        (lambda p: load(p.bundle, check_hashes=cast(Any, np.zeros(3))), "check_hashes is array.*; give True or False"),
    ],
)  # fmt: skip
def test_what_was_found_is_told(place: Place, ask: Callable[[Place], object], message: str) -> None:
    with pytest.raises(EntropyPruneError, match=message):
        ask(place)


def edited(place: Place, name: str, change: Callable[[Any], object]) -> Path:
    """A copy of the bundle with a JSON file changed, and a hash that fits."""
    folder = copied(random.Random(0), place)
    value = json.loads((folder / name).read_text())
    change(value)
    data = json.dumps(value).encode()
    (folder / name).write_bytes(data)
    if name != MANIFEST_FILE:
        raw = json.loads((folder / MANIFEST_FILE).read_text())
        raw["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / MANIFEST_FILE).write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (MANIFEST_FILE, lambda m: m["geometry"].update(layers=10**9), "no caches for 1000000000 layers"),
        (MANIFEST_FILE, lambda m: m["geometry"].update(layers=10**30), "no caches for 10+ layers"),
        (MANIFEST_FILE, lambda m: m["geometry"].update(visual_tokens=10**9), "1000000000 visual tokens in a context of 512"),
        (MANIFEST_FILE, lambda m: m.update(max_context=10**12), "in a context of 10+; a context holds an image and at most"),
        ("preprocessor_config.json", lambda c: c.update(crop_size={"height": 10**9, "width": 10**9}), "sizes .* are not usable"),
    ],
)
def test_a_bundle_with_absurd_numbers_is_refused_at_once(place: Place, name: str, change: Callable[[Any], object], message: str) -> None:
    with limited(), pytest.raises(EntropyPruneError, match=f"{message}.*: .*export(ed)? .*again"):
        load(edited(place, name, change))


def test_a_state_of_another_bundle_is_refused(place: Place) -> None:
    other = load(edited(place, MANIFEST_FILE, lambda m: m.update(created="another day")))
    state = place.vlm.prefill("hello")
    with pytest.raises(EntropyPruneError, match="not one of another bundle: prefill the messages with this model"):
        other.generate("hello", state=state)
    assert load(place.bundle).generate("hello", state=state, max_new_tokens=2).token_ids, "the same bundle loaded twice may share it"


def test_damaged_metadata_of_an_image_is_no_warning(place: Place) -> None:
    data = io.BytesIO()
    Image.new("RGB", (56, 56)).save(data, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01")
    assert place.ask(images=[place.file("exif.jpg", data.getvalue())]).visual_tokens == 16
