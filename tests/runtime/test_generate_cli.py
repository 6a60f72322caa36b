"""`python -m runtime.generate`: the answer on stdout, figures on stderr, one JSON object as the last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime import generate
from runtime.pipeline import load
from tests.conftest import ROOT

PROMPT = "what is at row 2 column 3?"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)).save(path)
    return path


def arguments(bundle: Path, *more: object) -> list[str]:
    return ["--bundle", str(bundle), "--prompt", PROMPT, "--max-new-tokens", "8", *map(str, more)]


def test_the_answer_goes_to_stdout_and_figures_to_stderr(tiny_bundle: Path, scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(arguments(tiny_bundle, "--image", scene)) == 0
    captured = capsys.readouterr()
    expected = load(tiny_bundle).generate(PROMPT, [scene], max_new_tokens=8)
    assert captured.out.strip() == expected.text
    assert f"{expected.prompt_tokens} prompt tokens, 4 of 16 visual tokens kept; first token after " in captured.err
    for stage in ("vision", "pre_ecl", "score", "post_ecl", "decode"):
        assert f"{stage} " in captured.err


def test_json_is_the_last_line_and_whole(tiny_bundle: Path, scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(arguments(tiny_bundle, "--image", scene, "--keep", 2, "--json")) == 0
    lines = capsys.readouterr().out.splitlines()
    last = json.loads(lines[-1])
    result = load(tiny_bundle).generate(PROMPT, [scene], keep=2, max_new_tokens=8)
    assert last["text"] == result.text
    assert last["token_ids"] == list(result.token_ids)
    assert (last["prompt_tokens"], last["visual_tokens"], last["kept_tokens"]) == (result.prompt_tokens, 16, 2)
    assert last["kept_indices"] == sorted(last["kept_indices"]) == list(result.kept_indices)
    assert last["ttft_ms"] > 0
    assert last["tpot_ms"] > 0
    assert {"preprocess", "vision", "embed", "pre_ecl", "score", "post_ecl", "decode"} <= set(last["stages_ms"])
    assert last["finish_reason"] in ("length", "eos")


@pytest.mark.parametrize(
    ("options", "api"),
    [
        (["--keep", "all"], {"keep": "all"}),
        (["--do-sample", "--temperature", "1.3", "--top-k", "40", "--top-p", "0.9", "--seed", "3"],
         {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9, "seed": 3}),
        (["--repetition-penalty", "1.7"], {"repetition_penalty": 1.7}),
        (["--stop", "a", "--stop", "row"], {"stop_strings": ["a", "row"]}),
    ],
)  # fmt: skip
def test_options_mean_what_they_mean_in_the_api(
    tiny_bundle: Path, scene: Path, capsys: pytest.CaptureFixture[str], options: list[str], api: dict[str, Any]
) -> None:
    assert generate.main(arguments(tiny_bundle, "--image", scene, "--json", *options)) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    keep = api.pop("keep", None)
    expected = load(tiny_bundle).generate(PROMPT, [scene], keep=keep, max_new_tokens=8, **api)
    assert last["token_ids"] == list(expected.token_ids)
    assert last["text"] == expected.text


def test_images_and_a_system_prompt_come_in_order(
    tiny_bundle: Path, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (56, 56), "red").save(other)
    assert generate.main(arguments(tiny_bundle, "--image", scene, "--image", other, "--system", "read row 1.", "--json")) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": PROMPT}]
    messages: list[dict[str, Any]] = [{"role": "system", "content": "read row 1."}, {"role": "user", "content": parts}]
    expected = load(tiny_bundle).generate(messages, [scene, other], max_new_tokens=8)
    assert last["token_ids"] == list(expected.token_ids)
    assert last["visual_tokens"] == 32


def test_a_picture_is_written_beside_the_answer(tiny_bundle: Path, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kept.PNG"
    for images in (["--image", scene], ["--image", scene, "--image", scene]):
        assert generate.main(arguments(tiny_bundle, *images, "--picture", path)) == 0
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200
        assert f"picture: {path}" in capsys.readouterr().err


def test_a_real_process_writes_utf8_and_json_whatever_the_locale(tiny_bundle: Path, scene: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "runtime.generate", *arguments(tiny_bundle, "--image", scene, "--json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.decode("utf-8", "surrogateescape").splitlines()[-1])
    assert len(last["token_ids"]) <= 8
