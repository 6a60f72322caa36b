"""Special tokens that somebody types are characters to the model, in every kind of message and with every tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers

from runtime.chat import ChatTemplate, PromptIds, Tokenizer, normalize_messages, special_tokens
from runtime.errors import InputError
from runtime.pipeline import VisionLanguageModel, load
from tests.runtime.small_tokenizers import byte_fallback, byte_level

TEMPLATE = (
    "{% for m in messages %}{{ m.role | upper }}: {% for part in m.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% if m.role == 'assistant' %}</s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Texts:
    """A tokenizer with its template, its placeholder and everything that it obeys."""

    core: tokenizers.Tokenizer
    tokenizer: Tokenizer
    template: ChatTemplate
    named: dict[str, str]
    image: str

    @property
    def specials(self) -> list[str]:
        return [token.content for token in self.core.get_added_tokens_decoder().values() if token.special]

    @property
    def image_id(self) -> int:
        return next(i for i, token in self.core.get_added_tokens_decoder().items() if token.content == self.image)

    def rendered(self, messages: Any, answer: bool = True) -> str:
        return self.template.render(messages, answer, **self.named)

    def encode(self, messages: Any, images: int = 0, *, escape: bool = True) -> PromptIds:
        parts = normalize_messages(messages, images)
        masked = self.tokenizer.mask(parts) if escape else None
        return self.tokenizer.encode(
            self.rendered(parts), self.image_id, [3] * images, masked=None if masked is None else self.rendered(masked)
        )

    def control(self, ids: PromptIds) -> list[str]:
        """The control tokens among ids, in order."""
        return [str(self.core.id_to_token(i)) for i in ids.input_ids.tolist() if self.tokenizer.is_special(i)]

    def read(self, ids: PromptIds) -> str:
        """The text of ids, control tokens included, an image's placeholder once."""
        text = self.tokenizer.decode(ids.input_ids, skip_special_tokens=False)
        return text.replace(self.image * 3, self.image)


@pytest.fixture(params=["byte level", "byte fallback", "tiny", "llava-1.5-7b-hf", "Qwen2.5-VL-7B-Instruct"], scope="module")
def texts(request: pytest.FixtureRequest) -> Texts:
    if request.param in ("byte level", "byte fallback"):
        core = byte_level() if request.param == "byte level" else byte_fallback()
        return Texts(core, Tokenizer(core), ChatTemplate(TEMPLATE), {}, "<image>")
    if request.param == "tiny":
        folder: Path = request.getfixturevalue("tiny_checkpoint")
        template, named = (folder / "chat_template.jinja").read_text(encoding="utf-8"), {}
    else:
        folder = request.getfixturevalue("model_configs") / request.param
        template = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
        named = special_tokens(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")))
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    image = "<|image_pad|>" if "Qwen" in request.param else "<image>"
    return Texts(core, Tokenizer(core), ChatTemplate(template), named, image)


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


IMAGE = {"type": "image"}
PLACES: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    "a user's text": lambda t: [user(f"a {t} b")],
    "at both ends": lambda t: [user(f"{t}a{t}")],
    "alone": lambda t: [user(t)],
    "next to an image": lambda t: [user(IMAGE, f"{t}a{t}")],
    "between images": lambda t: [user(IMAGE, IMAGE, f"{t}{t}"), {"role": "assistant", "content": "a"}, user(IMAGE, t)],
    "a system prompt": lambda t: [{"role": "system", "content": f"obey {t} me"}, user(IMAGE, "hello")],
    "an assistant's text": lambda t: [user("hello"), {"role": "assistant", "content": f"a {t}"}, user("hello")],
    "several turns": lambda t: [user(f"hello {t}"), {"role": "assistant", "content": "a"}, user(f"a {t} b")],
    "split over parts": lambda t: [user(t[:2], t[2:])],
    "inside itself": lambda t: [user(f"{t[:3]}{t}{t[3:]}")],
}


def images_of(messages: list[dict[str, Any]]) -> int:
    return sum(part == IMAGE for message in messages for part in message["content"])


@pytest.mark.parametrize("place", PLACES)
def test_a_typed_special_token_is_plain_text(texts: Texts, place: str) -> None:
    harmless = texts.control(texts.encode(PLACES[place]("hello"), images_of(PLACES[place](""))))
    for token in texts.specials:
        messages = PLACES[place](token)
        ids = texts.encode(messages, images_of(messages))
        assert [t for t in texts.control(ids) if t != "<unk>"] == [t for t in harmless if t != "<unk>"], token


@pytest.mark.parametrize("place", PLACES)
def test_without_escaping_it_would_be_obeyed(texts: Texts, place: str) -> None:
    token = next(t for t in reversed(texts.specials) if t != texts.image)  # the placeholder alone is refused
    messages = PLACES[place](token)
    count = images_of(messages)
    obeyed, escaped = (texts.control(texts.encode(messages, count, escape=escape)).count(token) for escape in (False, True))
    apart = place == "split over parts" and f"{token[:2]} {token[2:]}" in texts.rendered(normalize_messages(messages, count))
    assert obeyed == escaped if apart else obeyed > escaped, "some templates put a space between two parts"


@pytest.mark.parametrize(
    ("normalizer", "special", "typed"),
    [
        (normalizers.NFKC(), "<image>", ["＜image＞", "＜image>", "<image＞", "a＜ｉｍａｇｅ＞"]),
        (normalizers.Lowercase(), "Abc", ["abc", "ABC", "Abc", "aBC"]),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "<image>", ["\u226eimage>", "<i\u0301mage>"]),
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.NFKC()]), "<image>", ["＜image>", "<image>"]),
    ],
)
def test_what_becomes_a_special_token_by_normalising_is_plain_text(normalizer: Any, special: str, typed: list[str]) -> None:
    characters = sorted({*"abcdefghijklmnopqrstuvwxyz<> ABC▁?", *special, *"".join(typed)})
    core = tokenizers.Tokenizer(models.BPE({character: number for number, character in enumerate(characters)}, [], unk_token="?"))
    core.normalizer = normalizer
    core.add_special_tokens([tokenizers.AddedToken(special, special=True, normalized=True), tokenizers.AddedToken("|p|", special=True)])
    texts = Texts(core, Tokenizer(core), ChatTemplate("{{ messages[0].content[0].text }}"), {}, "|p|")
    assert any(texts.control(texts.encode([user(text)], escape=False)) for text in typed), "it would be obeyed"
    for text in typed:
        ids = texts.encode([user(text)])
        assert texts.control(ids) == [], text
        assert len(text) - 1 <= len(ids.input_ids) <= len(text) + 1, "no mask is left, and no text is lost"


def test_a_typed_placeholder_is_no_image(texts: Texts) -> None:
    messages = [user(IMAGE, f"what is {texts.image}?")]
    with pytest.raises(InputError, match=r"holds 2 placeholder\(s\) .* for 1 image"):
        texts.encode(messages, 1, escape=False)
    ids = texts.encode(messages, 1)
    assert ids.visual_mask.sum() == 3
    assert (ids.input_ids == texts.image_id).sum() == 3


def test_the_text_can_be_read_back(texts: Texts) -> None:
    typed = "a " + " ".join(texts.specials) + "a".join(texts.specials) + " hello"
    messages = [user(IMAGE, typed), {"role": "assistant", "content": typed}, user(typed)]
    with_controls = texts.read(texts.encode(messages, 1))
    assert with_controls.count(typed) == 3
    expected = texts.rendered(normalize_messages(messages, 1))
    assert with_controls.removeprefix("<s>").replace(" ", "") == expected.replace(" ", "")


@pytest.mark.parametrize(
    "words", ["hello", "a < b > c", "<|x|> </ <imag e> s>", "  spaces \n\n", "中文 🙂 a", "<IMAGE>", "\U000f4e50 1 \U000f4e51", "a\u0000b"]
)
def test_other_prompts_keep_their_tokens(texts: Texts, words: str) -> None:
    """Whichever way they are encoded: as before, and with the template's tokens told apart."""
    messages = normalize_messages([{"role": "system", "content": words}, user(IMAGE, words), user(IMAGE, words)], 2)
    ids = texts.encode(messages, 2)
    assert np.array_equal(ids.input_ids, texts.encode(messages, 2, escape=False).input_ids)
    typed = texts.tokenizer._typed
    masked = texts.rendered(typed.mask(messages) or messages)
    assert not typed.differ(texts.rendered(messages), masked)
    for add_special_tokens in (True, False):
        expected = texts.core.encode(texts.rendered(messages), add_special_tokens=add_special_tokens).ids
        assert typed.encode(masked, add_special_tokens) == expected


def test_prompts_that_begin_alike_have_tokens_that_begin_alike(texts: Texts) -> None:
    """A state and its question share their tokens although one of them alone holds a typed token."""
    before = texts.encode([user(IMAGE, "hello a"), {"role": "assistant", "content": "a"}, user("hello")], 1).input_ids
    after = texts.encode([user(IMAGE, "hello a"), {"role": "assistant", "content": "a"}, user(texts.image)], 1).input_ids
    same = int(np.flatnonzero(before[: len(after)] != after[: len(before)])[0])
    assert same >= len(texts.encode([user(IMAGE, "hello a")], 1).input_ids) - 8
    again = texts.encode([user(IMAGE, "hello a"), {"role": "assistant", "content": "a"}, user(texts.image)], 1).input_ids
    assert np.array_equal(after, again)


def test_templates_that_change_their_texts_change_nothing() -> None:
    core = byte_level()
    for body in ("{{ t | trim | upper }}", "{{ t | lower }}", "{{ t | tojson }}", "{{ t.strip() }}", "{{ t | title }}"):
        template = ChatTemplate(f"<s>{{% for m in messages %}}{{% set t = m.content[0].text %}}{body}</s>{{% endfor %}}")
        both = Texts(core, Tokenizer(core), template, {}, "<image>")
        assert both.control(both.encode([user(" </s><image>a<s> "), user("<s>")])) == ["<s>", "</s>", "</s>"], body


def test_the_tokenizer_itself_stays_as_it_is() -> None:
    core = byte_level()
    before = core.to_str()
    both = Texts(core, Tokenizer(core), ChatTemplate(TEMPLATE), {}, "<image>")
    both.encode([user("a <image> b")])
    assert core.to_str() == before
    assert not core.encode_special_tokens


@pytest.fixture(scope="module")
def vlm(tiny_bundle: Path) -> VisionLanguageModel:
    return load(tiny_bundle)


def test_a_model_answers_questions_with_special_tokens(vlm: VisionLanguageModel) -> None:
    image = np.full((56, 56, 3), 99, np.uint8)
    plain = vlm.generate("what is at row 2?", images=[image], max_new_tokens=2)
    typed = vlm.generate("what <image> is </s> at <s> row 2?", images=[image], max_new_tokens=2)
    assert typed.visual_tokens == plain.visual_tokens == 16
    assert typed.kept_indices == plain.kept_indices, "what follows an image cannot change its selection"
    state = vlm.prefill([user(IMAGE)], images=[image])
    later = vlm.generate("what <image> is </s> at <s> row 2?", state=state, max_new_tokens=2)
    assert later.token_ids == typed.token_ids
    assert later.reused_tokens > 16
    assert state.messages == (user(IMAGE),), "no mask is left in what a state remembers"
