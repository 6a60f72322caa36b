"""The plugin for lmms-eval: against a stand-in of the harness's interface, and against the harness where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.accuracy.harness import PLUGIN, main
from benchmarks.accuracy.lmms_plugin.models import AVAILABLE_MODELS
from benchmarks.accuracy.lmms_plugin.tasks.tiny_llava_heldout import utils
from runtime.errors import UsageError
from runtime.pipeline import load
from tiny_llava.heldout import FOLDER, load_heldout

QUESTIONS = 42
Logged = list[tuple[float, int, float, Mapping[str, float]]]


@dataclass(frozen=True, slots=True)
class Request:
    """The part of lmms-eval's `Instance` that a model reads."""

    args: tuple[Any, ...]
    task_name: str = "tiny_llava_heldout"


class Model:
    """The part of `lmms_eval.api.model.lmms` that a model relies on."""

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, its default export."""
    pytest.importorskip("torch", reason="the shipped model is exported with transformers")
    from export.build import build_bundle
    from export.plan import BuildOptions, make_plan

    output = tmp_path_factory.mktemp("lmms") / "bundle"
    build_bundle(make_plan(BuildOptions("tiny-llava")), output)
    return output


@pytest.fixture
def logged() -> Logged:
    return []


@pytest.fixture
def entropy_prune(monkeypatch: pytest.MonkeyPatch, logged: Logged) -> Iterator[Callable[..., Any]]:
    """The registered class, found as lmms-eval finds it, on a stand-in of the harness."""
    for name in ("", ".api", ".api.model", ".models", ".models.model_utils", ".models.model_utils.gen_metrics"):
        monkeypatch.setitem(sys.modules, f"lmms_eval{name}", ModuleType(f"lmms_eval{name}"))
    monkeypatch.setattr(sys.modules["lmms_eval.api.model"], "lmms", Model, raising=False)
    log = lambda *given: logged.append(given)  # noqa: E731
    monkeypatch.setattr(sys.modules["lmms_eval.models.model_utils.gen_metrics"], "log_metrics", log, raising=False)
    module = f"{PLUGIN}.models.entropy_prune"
    sys.modules.pop(module, None)
    yield getattr(importlib.import_module(module), AVAILABLE_MODELS["entropy_prune"])
    del sys.modules[module]


def heldout() -> list[dict[str, Any]]:
    documents: list[dict[str, Any]] = json.loads((FOLDER / "questions.json").read_text(encoding="utf-8"))["questions"]
    return documents[:QUESTIONS]


def accuracy(model: Any, documents: list[dict[str, Any]]) -> float:
    model.task_dict = {"tiny_llava_heldout": {"test": documents}}
    options = {"max_new_tokens": 12, "temperature": 0.0, "do_sample": False, "until": ["\n\n"]}
    requests = [
        Request((doc["question"], options, utils.doc_to_visual, number, "tiny_llava_heldout", "test"))
        for number, doc in enumerate(documents)
    ]
    answers = model.generate_until(requests)
    return sum(utils.process_results(doc, [answer])["exact_match"] for doc, answer in zip(documents, answers, strict=True)) / len(documents)


@pytest.mark.parametrize("keep", ["all", 14])
def test_accuracy_through_the_plugin_is_that_of_generate(
    bundle: Path, entropy_prune: Callable[..., Any], logged: Logged, keep: int | str
) -> None:
    model = load(bundle)
    items = load_heldout(QUESTIONS)
    direct = [model.generate(item.question, [item.image], keep=keep, max_new_tokens=12).text == item.answer for item in items]
    adapter = entropy_prune(bundle=str(bundle), keep=keep, batch_size=1)
    assert accuracy(adapter, heldout()) == sum(direct) / QUESTIONS
    shuffled = [{**doc, "image": other["image"]} for doc, other in zip(heldout(), heldout()[7:] + heldout()[:7], strict=True)]
    assert accuracy(adapter, shuffled) < sum(direct) / QUESTIONS - 0.3  # control: the next image's answers
    (_, tokens, _, found), _ = logged
    assert tokens > QUESTIONS
    assert (found["questions"], found["visual_tokens"], found["kept_tokens"]) == (QUESTIONS, 64, 64 if keep == "all" else 14)
    assert 0 < found["ttft_ms_p50"] <= found["ttft_ms_p90"]


def test_what_a_bundle_cannot_do_is_refused_by_name(bundle: Path, entropy_prune: Callable[..., Any]) -> None:
    model = entropy_prune(bundle=str(bundle))
    with pytest.raises(UsageError, match=r"task seedbench_ppl compares the likelihood .* choose the task's variant that generates"):
        model.loglikelihood([Request((), "seedbench_ppl")])
    with pytest.raises(UsageError, match="task chat asks in several rounds, which is not implemented"):
        model.generate_until_multi_round([Request((), "chat")])


def test_the_local_task_shows_the_question_s_image_and_wants_the_exact_answer() -> None:
    (image,) = utils.doc_to_visual({"image": "000.png"})
    assert (image.mode, image.size) == ("RGB", (112, 112))
    assert utils.process_results({"answer": "4"}, ["4"]) == {"exact_match": 1.0}
    assert utils.process_results({"answer": "4"}, ["4."]) == {"exact_match": 0.0}


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is installed by hand: see docs/benchmarks.md")
@pytest.mark.slow
def test_the_real_harness_finds_what_generate_finds(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--bundle", str(bundle), "--tasks", "tiny_llava_heldout", "--output", str(tmp_path), "--json"]
    assert main([*argv, "--", "--limit", str(QUESTIONS), "--log_samples"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    model = load(bundle)
    for keep in ("all", 14):
        texts = [model.generate(i.question, [i.image], keep=keep, max_new_tokens=12).text for i in load_heldout(QUESTIONS)]
        (samples,) = (tmp_path / f"keep-{keep}").glob("**/*_samples_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        assert [row["filtered_resps"] for row in sorted(rows, key=lambda row: int(row["doc_id"]))] == texts
        right = sum(text == item.answer for text, item in zip(texts, load_heldout(QUESTIONS), strict=True))
        assert found[str(keep)]["metrics"] == {"tiny_llava_heldout/exact_match": pytest.approx(right / QUESTIONS)}
        assert found[str(keep)]["statistics"]["kept tokens"] == (64 if keep == "all" else 14)
