"""Prompts: messages, chat templates and token ids, the same as transformers gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.chat import ChatTemplate, PromptIds, Tokenizer, normalize_messages, special_tokens
from runtime.errors import BundleError, InputError
from tests.runtime.small_tokenizers import IMAGE_ID, byte_fallback, byte_level

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def assistant(*parts: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(parts)}


SYSTEM = {"role": "system", "content": [text("Be brief.")]}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [user(text("What is this?"))],
    [user(IMAGE, text("What is this?"))],
    [user(text("What is this?"), IMAGE)],
    [user(IMAGE, IMAGE, text("Compare."), text("In one word."))],
    [SYSTEM, user(IMAGE, text("What is this?"))],
    [SYSTEM, user(IMAGE, text("What?")), assistant(text("A cat."), text("Or not.")), user(text("Sure?"))],
    [user(IMAGE, text("One?")), assistant(text("Yes.")), user(IMAGE, text("And this?")), assistant(text("No.")), user(text("Why?"))],
    [user(IMAGE, text("  spaces \n and\tlines\n\n")), assistant(text("Ja, schön 中文 🙂")), user(text("<b>&amp; \"quotes\" 'x' {{ y }}"))],
    [user(IMAGE)],
    [user(text("one")), user(text("two"))],
]
STRINGS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello?"}],
    [
        {"role": "system", "content": "Be brief."},
        user(IMAGE, text("What?")),
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ],
]


@dataclass
class Model:
    """One checkpoint, as transformers has it and as the runtime has it."""

    hugging_face: Any
    template: ChatTemplate
    template_text: str
    tokenizer: Tokenizer
    config: dict[str, Any]
    takes_strings: bool
    visual_tokens: int

    def expected_text(self, conversation: list[dict[str, Any]], prompt: bool) -> str:
        return self.hugging_face.apply_chat_template(
            conversation, chat_template=self.template_text, add_generation_prompt=prompt, tokenize=False
        )

    def render(self, messages: list[dict[str, Any]], prompt: bool = True) -> str:
        return self.template.render(messages, prompt, **special_tokens(self.config))


@pytest.fixture(scope="module", params=["tiny", "llava-1.5-7b-hf", "Qwen2.5-VL-7B-Instruct"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    transformers = pytest.importorskip("transformers")
    if request.param == "tiny":
        from tiny_llava.model import build_processor, build_tokenizer

        folder = tmp_path_factory.mktemp("tiny")
        processor = build_processor(build_tokenizer())
        processor.save_pretrained(folder)
        template, visual = (folder / "chat_template.jinja").read_text(encoding="utf-8"), 64
    else:
        folder = request.getfixturevalue("model_configs") / request.param
        processor = transformers.AutoTokenizer.from_pretrained(folder)
        template, visual = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"], 576
        if "llava" in request.param:
            settings = {k: v for k, v in json.loads((folder / "processor_config.json").read_text()).items() if k != "processor_class"}
            images = transformers.CLIPImageProcessorPil.from_pretrained(folder)
            processor = transformers.LlavaProcessor(images, processor, chat_template=template, **settings)
    return Model(
        hugging_face=processor,
        template=ChatTemplate(template),
        template_text=template,
        tokenizer=Tokenizer.from_file(folder / "tokenizer.json"),
        config=json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")),
        takes_strings=request.param != "llava-1.5-7b-hf",
        visual_tokens=visual,
    )


# Qwen2.5-VL's processor needs torchvision, so its ids are compared without images only.
llava_only = pytest.mark.parametrize("model", ["tiny", "llava-1.5-7b-hf"], indirect=True)


def images_of(conversation: Sequence[dict[str, Any]]) -> int:
    return sum(part == IMAGE for message in conversation for part in message["content"])


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_templates_render_as_transformers_renders_them(model: Model, conversation: list[dict[str, Any]], prompt: bool) -> None:
    assert model.render(conversation, prompt) == model.expected_text(conversation, prompt)


@pytest.mark.parametrize("conversation", STRINGS, ids=range(len(STRINGS)))
def test_contents_may_be_strings_with_every_template(model: Model, conversation: list[dict[str, Any]]) -> None:
    as_parts = [m if isinstance(m["content"], list) else {**m, "content": [text(m["content"])]} for m in conversation]
    rendered = model.render(normalize_messages(conversation, images_of(conversation)))
    assert rendered == model.expected_text(as_parts, True)
    if model.takes_strings:
        assert rendered == model.render(conversation) == model.expected_text(conversation, True)
    else:  # LLaVA-1.5's own template leaves strings out without a word, which is why contents are made lists
        assert "Sure?" not in model.expected_text(conversation, True)


def test_the_real_jinja_file_renders_as_the_json_file(model_configs: Path) -> None:
    folder = model_configs / "llava-1.5-7b-hf"
    from_file = ChatTemplate((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    from_json = ChatTemplate(json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"])
    assert from_file.render(CONVERSATIONS[6]) == from_json.render(CONVERSATIONS[6])
    assert from_file.render(CONVERSATIONS[1]) == "USER: <image>\nWhat is this? ASSISTANT:"


def test_special_tokens_are_those_of_transformers(model: Model) -> None:
    inner = getattr(model.hugging_face, "tokenizer", model.hugging_face)
    expected = {name: token for name, token in inner.special_tokens_map.items() if isinstance(token, str)}
    assert special_tokens(model.config) == expected
    assert special_tokens({"bos_token": {"content": "<s>"}, "add_bos_token": True, "pad_token": None}) == {"bos_token": "<s>"}


@llava_only
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_ids_are_those_of_the_llava_processor(model: Model, conversation: list[dict[str, Any]]) -> None:
    processor, count = model.hugging_face, images_of(conversation)
    rendered = model.render(conversation)
    expected = processor(images=[Image.new("RGB", (20, 30))] * count or None, text=rendered)["input_ids"][0]
    got = model.tokenizer.encode(rendered, processor.image_token_id, [model.visual_tokens] * count)
    assert got.input_ids.dtype == np.int64
    assert got.input_ids.tolist() == list(expected)
    assert got.visual_mask.dtype == np.bool_
    assert np.array_equal(got.visual_mask, got.input_ids == processor.image_token_id)
    assert got.visual_mask.sum() == count * model.visual_tokens
    whole = processor.apply_chat_template(  # with images inside, tokenised by transformers itself
        [{**m, "content": [{**p, "image": Image.new("RGB", (20, 30))} if p == IMAGE else p for p in m["content"]]} for m in conversation],
        add_generation_prompt=True, tokenize=True, return_dict=True,
    )["input_ids"][0]  # fmt: skip
    assert got.input_ids.tolist() == list(whole)


@pytest.mark.parametrize(
    "words", ["", " ", "hello", "  hello  ", "a\n\nb", "中文 🙂", "</s>x<s>", "<s>hello", " <s>hello", "<|im_start|>user\nhi", "e\u0301"]
)
def test_text_is_encoded_and_decoded_as_transformers_does_it(model: Model, words: str) -> None:
    inner = getattr(model.hugging_face, "tokenizer", model.hugging_face)
    ids = model.tokenizer.encode(words, -1, ()).input_ids.tolist()
    begins = bool(inner.bos_token and words.startswith(inner.bos_token))
    assert ids == inner(words, add_special_tokens=not begins)["input_ids"]
    plain = inner(words, add_special_tokens=False)["input_ids"]
    for skip in (True, False):
        for each in (ids, plain, plain[1:]):
            assert model.tokenizer.decode(each, skip) == inner.decode(each, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


@llava_only
def test_negative_control_a_prefix_space_or_a_second_bos_changes_the_ids(model: Model) -> None:
    inner = model.hugging_face.tokenizer
    right = model.tokenizer.encode("hello", -1, ()).input_ids.tolist()
    assert right == inner("hello")["input_ids"]
    assert right != inner(" hello")["input_ids"]
    assert right != inner("<s>hello")["input_ids"]


FEATURES = """
{%- set state = namespace(n=0) -%}
{% for message in messages %}
    {% if message.role == 'system' %}
{% continue %}
    {% endif %}
    {%- set state.n = state.n + 1 -%}
    {%- set inner = 'outer' -%}
  {% generation %}
    {%- set inner = 'changed' -%}
    {{ loop.index }} {{ message | tojson }} {{ message | tojson(indent=1, sort_keys=true) }} {{ inner }}
  {% endgeneration %}
  {{ inner }} {{ message.role.upper() }} {{ bos_token }} {{ tools is none }} {{ documents is defined }} {{ unknown is defined }}
    {% if state.n > 1 %}{% break %}{% endif %}
{# a comment #}
{% endfor %}
{{ state.n }} {{ strftime_now('%Y') }} {{ messages[0].content | length }} {{ "<&>" }}
{% if add_generation_prompt %}go{% endif %}
"""


def test_everything_templates_use_renders_as_in_transformers() -> None:
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    conversation = [SYSTEM, user(text("<ü> \"'&")), assistant(text("b")), user(text("c"))]
    for prompt in (True, False):
        expected, _ = render([conversation], chat_template=FEATURES, add_generation_prompt=prompt, bos_token="<s>")
        assert ChatTemplate(FEATURES).render(conversation, prompt, bos_token="<s>") == expected[0]


def test_a_template_may_refuse_messages() -> None:
    template = ChatTemplate("{% if messages[0].role == 'system' %}{{ raise_exception('no system\nprompts') }}{% endif %}ok")
    assert template.render([user(text("x"))]) == "ok"
    with pytest.raises(InputError, match=r"the chat template cannot render these messages: no system prompts"):
        template.render([SYSTEM])


@pytest.mark.parametrize(
    "body", ["{{ messages[0] + 1 }}", "{{ messages[0].role.nothing.more }}", "{{ 1 / 0 }}", "{{ messages | map('sum') | list }}"]
)
def test_a_template_that_fails_gives_one_line(body: str) -> None:
    with pytest.raises(InputError, match=r"the chat template cannot render these messages: \S.*") as caught:
        ChatTemplate(body).render([user(text("x"))])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", ["{% for x in y %}", "{% nonsense %}", "{% generation %}a", "{{ 'a' "])
def test_an_invalid_template_is_refused(body: str) -> None:
    with pytest.raises(BundleError, match=r"the chat template is not valid \(line 1: .*\): export the bundle again"):
        ChatTemplate(body)


@pytest.mark.parametrize(
    "body",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__() }}",
        "{{ raise_exception.__globals__['os'].getcwd() }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{{ 'x' * 10**16 }}",
        "{{ messages[0].role * 10**16 }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(body: str) -> None:
    with pytest.raises((BundleError, InputError), match="the chat template"):
        ChatTemplate(body).render([user(text("x"))])


def test_a_plain_prompt_gets_its_images_in_front() -> None:
    assert normalize_messages("Hi", 0) == [user(text("Hi"))]
    assert normalize_messages("Hi ", 2) == [user(IMAGE, IMAGE, text("Hi "))]


def test_messages_are_copied_in_one_form() -> None:
    given = [SYSTEM, user(IMAGE, text("a")), {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    made = normalize_messages(given, 1)
    assert made == [SYSTEM, user(IMAGE, text("a")), assistant(text("b")), user(text("c"))]
    made[0]["content"][0]["text"] = "changed"
    assert SYSTEM["content"] == [text("Be brief.")]


@pytest.mark.parametrize(
    ("prompt", "images", "words"),
    [
        ("", 0, "the prompt is empty"),
        (" \n\t", 1, "the prompt is empty"),
        ([], 0, "the prompt is empty"),
        ([user(IMAGE)], 1, "the prompt is empty"),
        ([user(text(" "))], 0, "the prompt is empty"),
        (3, 0, "a text or a list of messages, not int"),
        (None, 0, "a text or a list of messages, not NoneType"),
        ([user(text("a"))], 1, r"the messages hold 0 image part\(s\) for 1 image\(s\)"),
        ([user(IMAGE, IMAGE, text("a"))], 1, r"2 image part\(s\) for 1 image\(s\)"),
        (["a"], 0, "message 1 must be an object with role and content and nothing else, got str"),
        ([user(text("a")), {"role": "user"}], 0, r"message 2 must be an object .* got \['role'\]"),
        ([{"role": "user", "content": "a", "name": "b"}], 0, r"nothing else, got \['content', 'name', 'role'\]"),
        ([{"role": "tool", "content": "a"}], 0, "message 1: the role is 'tool', expected one of system, user, assistant"),
        ([{"role": ["user"], "content": "a"}], 0, "the role is"),
        ([{"role": "user", "content": None}], 0, "the content must be a text or a list of parts that is not empty, got None"),
        ([{"role": "user", "content": []}], 0, "the content must be a text or a list of parts that is not empty"),
        ([user("a")], 0, "a part must be"),
        ([user({"type": "video"})], 0, "a part must be .*video"),
        ([user({"type": "image", "url": "x"}, text("a"))], 1, "images are passed beside the messages"),
        ([user({"type": "text", "text": 3})], 0, "a part must be"),
        ([user({"type": "text"})], 0, "a part must be"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(prompt: Any, images: int, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        normalize_messages(prompt, images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("core", [byte_level, byte_fallback])
def test_placeholders_are_expanded_image_by_image(core: Any) -> None:
    tokenizer = Tokenizer(core())
    plain = tokenizer.encode("a<image>b<image>", IMAGE_ID, [1, 1]).input_ids.tolist()
    first, second = (i for i, token_id in enumerate(plain) if token_id == IMAGE_ID)
    got = tokenizer.encode("a<image>b<image>", IMAGE_ID, [3, 2])
    expected = plain[:first] + [IMAGE_ID] * 3 + plain[first + 1 : second] + [IMAGE_ID] * 2
    assert got.input_ids.tolist() == expected
    assert got.visual_mask.tolist() == [token_id == IMAGE_ID for token_id in expected]
    assert isinstance(got, PromptIds)


@pytest.mark.parametrize(("words", "counts"), [("a<image>", []), ("a", [5]), ("<image><image>", [5]), ("<image> asks <image>", [3, 3, 3])])
def test_a_placeholder_typed_by_the_user_is_refused(words: str, counts: list[int]) -> None:
    found = words.count("<image>")
    with pytest.raises(
        InputError, match=rf"holds {found} placeholder\(s\) '<image>' for {len(counts)} image\(s\): leave the placeholder out"
    ):
        Tokenizer(byte_fallback()).encode(words, IMAGE_ID, counts)


def test_an_image_without_visual_tokens_is_refused() -> None:
    with pytest.raises(InputError, match=r"at least one visual token, got \[0\]"):
        Tokenizer(byte_level()).encode("<image>", IMAGE_ID, [0])


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(InputError, match="half a surrogate pair"):
        Tokenizer(byte_level()).encode("a\udc80b", IMAGE_ID, [])


def test_the_beginning_of_text_is_added_once() -> None:
    begin = byte_level().token_to_id("<s>")
    for core in (byte_level(), byte_fallback()):
        for words in ("hello", "<s>hello"):
            assert Tokenizer(core).encode(words, IMAGE_ID, []).input_ids.tolist().count(begin) == 1
    assert begin not in Tokenizer(byte_level(bos=False)).encode("hello", IMAGE_ID, []).input_ids


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    core = byte_level()
    core.enable_truncation(4)
    core.enable_padding(length=20)
    core.save(str(tmp_path / "tokenizer.json"))
    got = Tokenizer.from_file(tmp_path / "tokenizer.json").encode("hello hello", IMAGE_ID, []).input_ids
    assert got.tolist() == Tokenizer(byte_level()).encode("hello hello", IMAGE_ID, []).input_ids.tolist()


def test_tokens_can_be_named() -> None:
    tokenizer = Tokenizer(byte_level())
    assert tokenizer.token(IMAGE_ID) == "<image>"
    assert tokenizer.is_special(IMAGE_ID)
    assert not tokenizer.is_special(100)
    assert tokenizer.token(10**6) is None
    ids = np.append(tokenizer.encode("hello", IMAGE_ID, []).input_ids, [2, 10**6])
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>hello</s>"


def test_a_tokenizer_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(BundleError, match=r"cannot read the tokenizer .*export the bundle again"):
        Tokenizer.from_file(path)
    for content in ("", "{", "{}", '{"model": 3}'):
        path.write_text(content)
        with pytest.raises(BundleError, match="is not a tokenizer this version reads"):
            Tokenizer.from_file(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="cannot read the tokenizer"):
        Tokenizer.from_file(path)
