"""Questions files: what they give, and how what is wrong in them is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from calibration.questions import Question, by_image, encode, read_questions
from runtime.errors import InputError, StorageError
from runtime.images import load_image

ROW = {"image": "a.png", "question": "how many digits?"}


def test_questions_come_in_the_files_order_with_images_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "q.json"
    rows = [ROW | {"answer": "3", "kind": "count"}, {"image": "sub/b.png", "question": "?"}, ROW | {"question": "read row 2."}]
    for content in (rows, {"seed": 1, "questions": rows}):
        file.write_text(json.dumps(content))
        found = read_questions(file)
        assert found[0] == Question(tmp_path / "a.png", "how many digits?", "3", "count")
        assert found[1] == Question(tmp_path / "sub" / "b.png", "?", None, None)
        assert read_questions(file, tmp_path / "x")[0].image == tmp_path / "x" / "a.png"
    groups = list(by_image(found))
    assert [(path.name, len(group)) for path, group in groups] == [("a.png", 2), ("b.png", 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"q\.json is not valid JSON"),
        ("[]", r"q\.json holds no questions: write a list of objects with image, question and answer"),
        ("{}", "holds no questions"),
        ('{"questions": []}', "holds no questions"),
        ("3", "holds no questions"),
        ("[3]", r"q\.json, question 1 is 3: expected an object"),
        (json.dumps([ROW, {"image": "a.png"}]), r"question 2: question is None; expected a text"),
        (json.dumps([{"question": "?"}]), r"question 1: image is None; expected a text"),
        (json.dumps([ROW | {"answer": 3}]), r"question 1: answer is 3; expected a text"),
        (json.dumps([ROW | {"answer": " "}]), r"question 1: answer is ' '; expected a text"),
        (json.dumps([ROW | {"kind": []}]), r"question 1: kind is \[\]; expected a text"),
    ],
)
def test_what_is_wrong_is_named_with_its_number(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_questions(tmp_path / "q.json")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*none\.json: No such file or directory; name a JSON file of questions"):
        read_questions(tmp_path / "none.json")


def test_a_label_becomes_the_tokens_that_the_template_writes_and_the_end(tiny_checkpoint: Path, images: Path) -> None:
    processor: Any = AutoProcessor.from_pretrained(tiny_checkpoint)
    question = Question(images / "00.png", "how many digits?", "3")
    image = load_image(question.image)
    encoded, pixels = encode(question, image, processor)
    assert encoded.answer_ids is not None
    assert encoded.answer_ids[-1] == processor.tokenizer.eos_token_id
    assert processor.tokenizer.decode(encoded.answer_ids[:-1]).strip() == "3"
    assert encoded.prompt_ids.count(processor.tokenizer.convert_tokens_to_ids("<image>")) == 16
    assert list(pixels.shape) == [1, 3, 56, 56]
    assert encode(dataclasses.replace(question, answer=None), image, processor)[0].answer_ids is None
    with pytest.raises(InputError, match=r"an answer has \d+ tokens; expected 1 to 512"):
        encode(dataclasses.replace(question, answer="red " * 600), image, processor)
