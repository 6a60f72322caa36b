"""Streaming text: pieces join to the whole, never split a character, and stop where they should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from runtime.chat import Tokenizer
from runtime.detokenize import IncrementalDetokenizer, StopStrings
from runtime.errors import UsageError
from tests.runtime.small_tokenizers import byte_fallback, byte_level

TEXTS = [
    "hello hello a", "  two  spaces", "naïve café", "中文字符，日本語", "👩‍👩‍👧‍👦 family 🇩🇪🏳️‍🌈", "a\n\n\nb\n", "", " ", "🙂", "x🙂y🙂🙂z",
    "tab\tand\u200bzero width", "a�b", "hello</s>hello", "Ça va? Žluťoučký kůň",
]  # fmt: skip


class Counting:
    """A tokenizer that counts how many tokens it is asked to decode."""

    def __init__(self, inner: Tokenizer) -> None:
        self.inner, self.decoded, self.longest = inner, 0, 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        self.longest = max(self.longest, len(ids))
        return self.inner.decode(ids, skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        return self.inner.token(token_id)

    def is_special(self, token_id: int) -> bool:
        return self.inner.is_special(token_id)


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback", "llava-1.5-7b-hf", "Qwen2.5-VL-7B-Instruct"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    small: dict[str, Callable[[], object]] = {"byte_level": byte_level, "byte_fallback": byte_fallback}
    if request.param in small:
        return Tokenizer(small[request.param]())  # type: ignore[arg-type]
    folder: Path = request.getfixturevalue("model_configs")
    return Tokenizer.from_file(folder / request.param / "tokenizer.json")


def size_of(tokenizer: Tokenizer) -> int:
    return next(n for n in (2**k for k in range(30)) if tokenizer.token(n) is None and tokenizer.token(n + 1) is None)


def check(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> list[str]:
    stream = IncrementalDetokenizer(tokenizer, skip_special_tokens)
    pieces = [*(stream.push(token_id) for token_id in ids), stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens), (list(ids), pieces)
    return pieces


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_a_text_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, -1, ()).input_ids.tolist()
    for skip in (True, False):
        pieces = check(tokenizer, ids, skip)
        if "�" not in tokenizer.decode(ids, skip):
            assert not any("�" in piece for piece in pieces)
    check(tokenizer, ids[1:])


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_pieces_of_random_tokens_join_to_their_text(tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
    """Any tokens, most of them no valid text: half characters, bad bytes, special tokens, ids beyond the vocabulary."""
    random = np.random.default_rng(0)
    sources = [random.integers(0, size, 400) for size in (size_of(tokenizer), 300, 12)]
    rare = [tokenizer.encode(text, -1, ()).input_ids for text in ("🙂中", "hello a", "�", "  ")]
    mixed = [np.concatenate([rare[i] for i in random.integers(0, len(rare), 60)]) for _ in range(3)]
    for pool in (*sources, *mixed):
        for _ in range(60):
            length = int(random.integers(1, 40))
            check(tokenizer, random.choice(pool, length).tolist(), skip_special_tokens)


def test_single_bytes_in_any_order_join_to_their_text(tokenizer: Tokenizer) -> None:
    """Byte tokens chosen to build and break UTF-8 sequences of every length."""
    raw = [0x41, 0x20, 0x0A, 0x80, 0xBF, 0x9F, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x98, 0x80, 0xFF, 0xC0, 0xED, 0xA0]
    names = {tokenizer.token(i): i for i in range(size_of(tokenizer))}
    printable = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = iter(range(256, 512))
    level = {b: printable.get(b) or chr(next(others)) for b in range(256)}
    ids = [names[f"<0x{b:02X}>"] if f"<0x{b:02X}>" in names else names[level[b]] for b in raw]
    random = np.random.default_rng(1)
    for _ in range(600):
        check(tokenizer, random.choice(ids, int(random.integers(1, 14))).tolist())


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    tokenizer = Tokenizer(byte_level())
    assert check(tokenizer, tokenizer.encode("a🙂b", -1, ()).input_ids.tolist()) == ["", "a", "", "", "🙂", "b", ""]
    tokenizer = Tokenizer(byte_fallback())
    assert check(tokenizer, tokenizer.encode("hello a", -1, ()).input_ids.tolist()) == ["", "hello", " a", ""]


def test_the_work_per_token_does_not_grow_with_the_text(tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(2)
    text = tokenizer.encode("hello a 中文 🙂 café\n" * 40, -1, ()).input_ids.tolist()
    bad_byte = text[1:2] * 3 + [tokenizer.encode("🙂", -1, ()).input_ids[-1].item()] * 800
    for ids in (text, random.integers(0, size_of(tokenizer), 800).tolist(), bad_byte):
        counting = Counting(tokenizer)
        stream = IncrementalDetokenizer(counting)
        pieces = [*(stream.push(token_id) for token_id in ids), stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids)
        print(f"{counting.decoded / len(ids):.1f} tokens decoded for each token, the longest window {counting.longest}")
        assert counting.decoded <= 12 * len(ids)


def test_after_a_flush_another_text_can_follow(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello a", -1, ()).input_ids.tolist()
    stream = IncrementalDetokenizer(tokenizer)
    first, second = ("".join([*(stream.push(i) for i in ids), stream.flush()]) for _ in range(2))
    assert first == second == tokenizer.decode(ids)


def test_negative_control_decoding_token_by_token_does_not_join_to_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂 hello 🦥 a", -1, ()).input_ids.tolist()
    assert "".join(tokenizer.decode([token_id]) for token_id in ids) != tokenizer.decode(ids)


def stopped_text(text: str, stops: Sequence[str]) -> str:
    """By the definition, character by character: the first stop string to be complete, and the longest of those."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def test_stop_strings_cut_the_same_wherever_the_pieces_are_cut() -> None:
    random = np.random.default_rng(3)
    for _ in range(3000):
        text = "".join(random.choice(list("aab\n"), int(random.integers(0, 20))))
        stops = ["".join(random.choice(list("ab\n"), int(random.integers(1, 5)))) for _ in range(int(random.integers(0, 4)))]
        stream, shown, stopped, at = StopStrings(stops), "", False, 0
        while at < len(text):
            step = int(random.integers(0, 5))
            emit, stopped_now = stream.push(text[at : at + step])
            assert stopped_now or not stopped
            assert not (stopped and emit)
            shown, stopped, at = shown + emit, stopped_now, at + step
        shown += stream.flush()
        assert shown == stopped_text(text, stops), (text, stops)
        assert stopped == any(stop in text for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stream = StopStrings(["</end>", "STOP"])
    assert stream.push("hello <") == ("hello ", False)
    assert stream.push("b> ST") == ("<b> ", False)
    assert stream.push("OP it") == ("", True)
    assert stream.push("more") == ("", True)
    assert stream.flush() == ""
    assert StopStrings([]).push("any") == ("any", False)
    unfinished = StopStrings(["END"])
    assert unfinished.push("the EN") == ("the ", False)
    assert unfinished.flush() == "EN"


@pytest.mark.parametrize("stops", ["END", [""], ["a", ""]])
def test_stop_strings_that_make_no_sense_are_refused(stops: Sequence[str]) -> None:
    with pytest.raises(UsageError, match="stop strings must be a list of texts that are not empty"):
        StopStrings(stops)
