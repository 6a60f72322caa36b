"""Questions about images, from a file or a folder, and their token ids in the checkpoint's own conversation format.

A questions file is JSON: `{"questions": [{"image": "000.png", "question": "...", "answer": "...", "kind": "..."}, ...]}`, or that list
alone; images relative to the file (or to a folder given beside it); `answer` and `kind` may be missing. Knows nothing about models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import InputError, StorageError, shown

MAX_ANSWER_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Question:
    """One question. `answer` is the only right text where there is one; `kind` groups questions in tables."""

    image: Path
    text: str
    answer: str | None = None
    kind: str | None = None


def read_questions(path: Path, images: Path | None = None) -> list[Question]:
    """The questions of a file, in its order.

    Args:
        images: the folder that image names are relative to (default: the file's).

    Raises:
        InputError: not a questions file, or an entry is wrong (named by its number).
        StorageError: the file cannot be read.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}; name a JSON file of questions") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): write a list of objects with image, question and answer") from error
    rows = raw.get("questions") if isinstance(raw, dict) else raw
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} holds no questions: write a list of objects with image, question and answer")
    folder = images or path.parent
    return [_question(row, folder, f"{path}, question {number}") for number, row in enumerate(rows, 1)]


def _question(row: Any, folder: Path, where: str) -> Question:
    if not isinstance(row, dict):
        raise InputError(f"{where} is {shown(row)}: expected an object with image, question and answer")
    for entry, needed in (("image", True), ("question", True), ("answer", False), ("kind", False)):
        value = row.get(entry)
        if (value is None and needed) or (value is not None and (not isinstance(value, str) or not value.strip())):
            raise InputError(f"{where}: {entry} is {shown(value)}; expected a text")
    return Question(folder / row["image"], row["question"], row.get("answer"), row.get("kind"))


@dataclass(frozen=True, slots=True)
class EncodedQuestion:
    """Token ids: `prompt_ids` with images expanded, ending in the invitation to answer; `answer_ids` with the end token, or None."""

    question: Question
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...] | None


def encode(question: Question, image: Any, processor: Any) -> tuple[EncodedQuestion, Any]:
    """A question as token ids, and the image's `pixel_values` [1, 3, h, w] float32.

    The answer's ids are what the chat template writes after the invitation to answer, without trailing space, and the end token: greedy
    decoding gives the answer exactly when each of them is the most likely one after those before it.

    Args:
        image: PIL image, RGB.
        processor: the checkpoint's Hugging Face processor.

    Raises:
        InputError: the template does not render such a conversation.
    """
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    encoded = process(processor, text, image, question.text)
    prompt_ids = tuple(encoded["input_ids"][0].tolist())
    if question.answer is None:
        return EncodedQuestion(question, prompt_ids, None), encoded["pixel_values"]
    said = [*asked, {"role": "assistant", "content": [{"type": "text", "text": question.answer}]}]
    whole = processor.apply_chat_template(said).rstrip()
    whole = whole.removesuffix(processor.tokenizer.eos_token or "").rstrip()
    if not whole.startswith(text):
        raise InputError(f"the chat template does not put an answer after its invitation to answer: {shown(whole)} does not begin with it")
    return EncodedQuestion(question, prompt_ids, _answer_ids(processor.tokenizer, text, whole)), encoded["pixel_values"]


def process(processor: Any, text: str, image: Any, question: str) -> Any:
    """The processor's tensors of a rendered prompt and its image.

    Raises:
        InputError: it refuses them, a placeholder typed into the question above all.
    """
    try:
        return processor(text=text, images=image, return_tensors="pt")
    except ValueError as error:
        raise InputError(
            f"the checkpoint's processor cannot take the question {shown(question)} ({error}): leave {processor.image_token} out of it"
        ) from error


def _answer_ids(tokenizer: Any, text: str, whole: str) -> tuple[int, ...]:
    before, both = tokenizer(text).input_ids, tokenizer(whole).input_ids
    tail = both[len(before) :] if both[: len(before)] == before else tokenizer(whole[len(text) :], add_special_tokens=False).input_ids
    if not tail or len(tail) > MAX_ANSWER_TOKENS:
        raise InputError(f"an answer has {len(tail)} tokens; expected 1 to {MAX_ANSWER_TOKENS}: {shown(whole[len(text) :])}")
    return (*tail, tokenizer.eos_token_id)


def by_image(questions: Sequence[Question]) -> Iterator[tuple[Path, list[Question]]]:
    """Questions grouped by their image, in the order of each image's first question."""
    groups: dict[Path, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.image, []).append(question)
    yield from groups.items()
