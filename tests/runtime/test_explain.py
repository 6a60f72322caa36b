"""`python -m runtime.explain`: a page that stands alone and says what was kept, a picture, and errors in one line."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime import explain
from runtime.generation import Generation
from runtime.patch_map import Explanation, explanation_of
from runtime.picture import heat_of
from runtime.picture_html import data_uri, page
from runtime.pipeline import VisionLanguageModel, load

N = 16
PROMPT = "what is at row 2 column 3?"
ATTACK = "</script><script>alert('1')</script> & \"<b>\" {{ 7 * 7 }}"
VOID = {"meta", "input", "br", "img"}


class Page(HTMLParser):
    """A parsed page: elements with their attributes and own text; fails where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[int] = []
        self.feed(text)
        self.close()
        assert not self._open, "elements are left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}, []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.elements[self._open[-1]][2].append(data)

    def find(self, tag: str, **attributes: str) -> list[tuple[dict[str, str], str]]:
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [(has, "".join(text)) for name, has, text in self.elements if name == tag and wanted.items() <= has.items()]

    @property
    def data(self) -> dict[str, Any]:
        (found,) = self.find("script", id="data")
        return dict(json.loads(found[1]))


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> VisionLanguageModel:
    return load(tiny_bundle)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 80, 3), dtype=np.uint8)).save(path)
    return path


def explained(
    model: VisionLanguageModel, scores: np.ndarray | None, kept: Sequence[int], images: int = 1, prompt: str = PROMPT, answer: str = "a 3"
) -> Explanation:
    result = Generation(
        text=answer, token_ids=(), prompt_tokens=images * N, reused_tokens=0, visual_tokens=images * N, kept_tokens=len(kept),
        kept_indices=tuple(kept), token_entropy=scores, ttft_ms=12.3, tpot_ms=1.0, stages_ms={}, finish_reason="eos",
    )  # fmt: skip
    return explanation_of(model, [np.full((56, 56, 3), 99, np.uint8)] * images, result, prompt)


def rising(count: int = N) -> np.ndarray:
    return np.linspace(0.5, 0.75, count, dtype=np.float32)


# ---------------------------------------------------------------- the page


def test_the_page_refers_to_nothing_outside_itself(model: VisionLanguageModel) -> None:
    for explanation in (explained(model, rising(), (14, 15)), explained(model, None, range(N)), explained(model, rising(32), (31,), 2)):
        text = re.sub(r"base64,[^)]*", "", page(explanation))
        assert not re.search(r"https?:|//[a-z]|@import|<link|<iframe|<object|<base|\bsrc=", text, re.IGNORECASE)
        assert set(re.findall(r"url\(([^)]{1,5})", text)) <= {"data:", "#hatc", "#cros"}
        assert {f"#{has['id']}" for has, _ in Page(text).find("pattern")} == {"#hatch", "#crossed"}
        (policy,) = Page(text).find("meta", **{"http-equiv": "Content-Security-Policy"})
        assert policy[0]["content"].startswith("default-src 'none'; img-src data:;")


def test_the_images_are_inside_the_page(model: VisionLanguageModel, scene: Path) -> None:
    result = model.generate(PROMPT, [scene, scene], max_new_tokens=1)
    uris = re.findall(r"#image(\d) \.photo \{ background-image: url\(data:image/(png|jpeg);base64,([^)]+)\)", page(
        explanation_of(model, [scene, scene], result)
    ))  # fmt: skip
    assert [number for number, _, _ in uris] == ["1", "2"]
    with Image.open(io.BytesIO(base64.b64decode(uris[0][2]))) as image, Image.open(scene) as original:
        assert np.array_equal(np.asarray(image), np.asarray(original)), "a small image is embedded as it is"


def test_a_large_image_is_embedded_as_a_smaller_jpeg() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8))
    assert data_uri(noise).startswith("data:image/jpeg;base64,")
    assert data_uri(noise.resize((500, 500))).startswith("data:image/jpeg;base64,"), "few pixels, but many bytes as PNG"
    assert data_uri(noise.resize((50, 50))).startswith("data:image/png;base64,")


def test_texts_from_outside_are_shown_and_never_obeyed(model: VisionLanguageModel, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>.png"
    Image.new("RGB", (56, 56)).save(tmp_path / name)
    result = explained(model, rising(), (15,), prompt=ATTACK, answer=f"{ATTACK}\udcff\x00")
    named = explanation_of(model, tmp_path / name, model.generate(PROMPT, [tmp_path / name], max_new_tokens=2), ATTACK)
    for explanation in (result, named):
        text = page(explanation)
        text.encode("utf-8")
        parsed = Page(text)
        assert [has.get("id") or has.get("type") for has, _ in parsed.find("script")] == ["data", None]
        assert not parsed.find("img")
        assert [text for _, text in parsed.find("b")] == [model.manifest.model], "the page's own"
        assert parsed.find("dd")[0][1] == ATTACK
    assert parsed.find("bdi")[0][1] == name
    assert name in parsed.find("title")[0][1]
    assert Page(page(result)).find("dd")[1][1] == f"{ATTACK}  ", "what cannot be shown is a space"


def test_every_patch_says_its_index_score_and_fate(model: VisionLanguageModel) -> None:
    explanation = explained(model, rising(), (13, 14, 15))
    parsed = Page(page(explanation))
    titles = [text for _, text in parsed.find("title")][1:]
    assert len(titles) == N
    assert titles[0] == "token 0 (row 1, column 1): score 0.5000, rank 16 of 16, dropped"
    assert titles[14] == "token 14 (row 4, column 3): score 0.7333, rank 2 of 16, kept"
    cells = [has for has, _ in parsed.find("rect")]
    assert [(c["x"], c["y"], c["width"], c["height"]) for c in cells[:2]] == [
        ("0.0", "0.0", "250.0", "250.0"),
        ("250.0", "0.0", "250.0", "250.0"),
    ]
    assert cells[15]["fill"] == "#{:02x}{:02x}{:02x}".format(*heat_of(explanation.tokens[15], (0.5, 0.75)))
    (dropped,), (kept,) = parsed.find("path", class_="dropped"), parsed.find("path", class_="bright-line")
    assert (dropped[0]["d"].count("M"), kept[0]["d"].count("M")) == (13, 3)
    assert dropped[0]["d"].startswith("M0 0h250v250h-250z")


def test_the_script_gets_what_another_budget_would_keep(model: VisionLanguageModel) -> None:
    scores = rising(2 * N)
    scores[20] = np.nan
    parsed = Page(page(explained(model, scores, (29, 30, 31), 2)))
    data = parsed.data
    assert (data["kept"], data["ranked"], len(data["images"])) == (3, True, 2)
    first, second = data["images"]
    assert (first["side"], first["first"], second["first"]) == (4, 0, 16)
    assert sorted(first["ranks"] + second["ranks"]) == list(range(2 * N))
    assert second["scores"][4] is None
    assert second["ranks"][4] == 2 * N - 1
    assert [sum(image["kept"]) for image in data["images"]] == [0, 3] == [image["keptTokens"] for image in data["images"]]
    assert second["boxes"][5] == [250.0, 250.0, 500.0, 500.0]
    (slider,) = parsed.find("input", id="keep")
    assert (slider[0]["min"], slider[0]["max"], slider[0]["value"]) == ("1", "32", "3")
    assert [has["value"] for has, _ in parsed.find("option")] == ["4", "2"], "the budgets of the bundle"
    (form,) = parsed.find("form")
    assert "hidden" in form[0], "without a script there is no slider"


def test_other_budgets_are_shown_only_where_scores_decided(model: VisionLanguageModel) -> None:
    text = page(explained(model, rising(), (0, 15)))
    assert not Page(text).find("form")
    assert "The kept tokens are not those of the highest scores over all images, so other budgets are not shown." in text
    assert Page(text).data["ranked"] is False


def test_where_everything_was_kept_there_is_no_heat_map_and_the_page_says_so(model: VisionLanguageModel) -> None:
    text = page(explained(model, None, range(N)))
    parsed = Page(text)
    assert "Every visual token was kept, so nothing was scored and there is no heat map." in text
    assert not parsed.find("rect")
    assert not parsed.find("form")
    assert [text for _, text in parsed.find("p", class_="empty")] == ["nothing was scored"]
    assert parsed.find("path", class_="dropped")[0][0]["d"] == ""


def test_panels_are_described_for_those_who_do_not_see_them(model: VisionLanguageModel) -> None:
    parsed = Page(page(explained(model, rising(32), (15, 31), 2)))
    labels = [has["aria-label"] for has, _ in parsed.find("div", role="img")]
    assert labels[1:4] == [
        "The image itself: image 1 of 2, image 1",
        "image 1 of 2, image 1: 1 of 16 visual tokens kept, drawn bright and outlined, the others dark",
        "image 1 of 2, image 1: heat map of the scores over the image in grey",
    ]
    assert "from 0.5000 (dark violet) to" in labels[0]
    assert len(labels) == 7
    assert parsed.find("html", lang="en")
    assert parsed.find("meta", name="viewport")
    assert Page(page(explained(model, rising(), (15,)))).find("label", for_="keep")


def test_a_long_prompt_is_whole_on_the_page(model: VisionLanguageModel) -> None:
    prompt = "row " * 25_000
    assert Page(page(explained(model, rising(), (15,), prompt=prompt))).find("dd")[0][1] == prompt


def test_the_scripts_of_the_page_parse(model: VisionLanguageModel, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on the PATH to check the script's syntax with")
    (tmp_path / "page.js").write_text(Page(page(explained(model, rising(), (15,)))).find("script")[1][1], encoding="utf-8")
    done = subprocess.run([node, "--check", str(tmp_path / "page.js")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- the command


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], str]:
    code = explain.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def test_the_command_writes_a_picture_and_a_page_and_one_line_of_figures(
    tiny_bundle: Path, model: VisionLanguageModel, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png, html = tmp_path / "kept.png", tmp_path / "kept.html"
    arguments = ("--bundle", tiny_bundle, "--image", scene, "--image", scene, "--prompt", PROMPT, "--keep", 2, "--max-new-tokens", 5)
    code, lines, err = run(capsys, *arguments, "--png", png, "--html", html, "--json")
    assert (code, err) == (0, "")
    assert lines[0].startswith("32 visual tokens in 2 images; 2 kept (6.2 %) from layer 2 of 4 on; score (trace) 0.")
    assert lines[1:3] == [f"picture: {png}", f"page: {html}"]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": PROMPT}]}]
    result = model.generate(messages, [scene, scene], keep=2, max_new_tokens=5)
    last = json.loads(lines[-1])
    assert [i + N * n for n, image in enumerate(last["images"]) for i in image["kept_indices"]] == list(result.kept_indices)
    assert (last["visual_tokens"], last["kept_tokens"], last["score_mode"], last["split_layer"]) == (32, 2, "trace", 2)
    assert last["answer"] == explanation_of(model, [scene, scene], result).answer
    with Image.open(png) as image:
        assert image.format == "PNG"
    kept = [
        i + N * n for n, image in enumerate(Page(html.read_text(encoding="utf-8")).data["images"]) for i in np.flatnonzero(image["kept"])
    ]
    assert kept == list(result.kept_indices)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.html", "kept.png"]


def test_without_a_prompt_the_selection_is_the_same(
    tiny_bundle: Path, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = []
    for more in ((), ("--prompt", PROMPT)):
        code, lines, _ = run(capsys, "--bundle", tiny_bundle, "--image", scene, "--html", tmp_path / "a.html", "--json", *more)
        assert code == 0
        reports.append(json.loads(lines[-1]))
    assert reports[0]["images"] == reports[1]["images"]
    assert (reports[0]["prompt"], reports[0]["answer"], reports[0]["ttft_ms"]) == (None, None, None)
    assert reports[1]["ttft_ms"] > 0


def test_keeping_all_is_drawn_too(tiny_bundle: Path, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--bundle", tiny_bundle, "--image", scene, "--keep", "all", "--png", tmp_path / "a.png", "--html", tmp_path / "a.html")
    code, lines, _ = run(capsys, *arguments)
    assert code == 0
    assert lines[0] == "16 visual tokens; 16 kept (100.0 %) from layer 2 of 4 on; nothing was scored; no question asked"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "OUT/a.html"], "the following arguments are required: --image"),
        (["--image", "SCENE"], "nothing to write: give --png FILE, --html FILE or both"),
        (["--image", "SCENE", "--png", "OUT/a.jpg"], r"--png .*a.jpg: give a name that ends in \.png, which is what is written"),
        (["--image", "SCENE", "--png", "OUT/a.png", "--html", "OUT/a.png"], r"--html .*a.png: give a name that ends in \.html"),
        (["--image", "SCENE", "--png", "OUT/no/a.png"], "cannot write .*a.png: there is no directory .*no, make it first"),
        (["--image", "SCENE", "--html", "OUT"], "give a name that ends in .html"),
        (["--image", "SCENE", "--html", "FOLDER"], "it is a directory or a device, give the name of a file"),
        (["--image", "SCENE", "--html", "OUT/a\0b.html"], r"cannot write .*: .*; give another name"),
        (["--image", "SCENE", "--html", "OUT/" + "a" * 300 + ".html"], "cannot write .*: File name too long"),
        (["--image", "nowhere.png", "--html", "OUT/a.html"], "there is no image nowhere.png"),
        (["--image", "SCENE", "--html", "OUT/a.html", "--keep", "7"], "this bundle holds the budgets 4, 2 and all, not 7"),
        (
            ["--image", "SCENE", "--html", "OUT/a.html", "--keep", "auto"],
            "this bundle has no threshold for keep auto: export it with several",
        ),
        (["--image", "SCENE", "--html", "OUT/a.html", "--keep", "²"], "'²' is neither a number of tokens nor 'all'"),
        (["--image", "SCENE", "--html", "OUT/a.html", "--prompt", ""], "the prompt is empty"),
        (["--image", "SCENE", "--html", "OUT/a.html", "--max-new-tokens", "3"], "--max-new-tokens has no effect without a --prompt"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    tiny_bundle: Path, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (folder := tmp_path.parent / f"{tmp_path.name}.html").mkdir()
    places = {"SCENE": scene, "OUT": tmp_path, "FOLDER": folder}
    given = [re.sub("SCENE|OUT|FOLDER", lambda found: str(places[found[0]]), argument) for argument in arguments]
    code, lines, err = run(capsys, "--bundle", tiny_bundle, *given)
    assert (code, lines) == (2, [])
    assert err.count("\n") == 1
    assert re.search(f"error: .*{message}", err), err
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_moved_into_place_whole(
    tiny_bundle: Path, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.html").write_text("before", encoding="utf-8")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)
        code, _, err = run(capsys, "--bundle", tiny_bundle, "--image", scene, "--html", tmp_path / "a.html")
    assert code != 0
    assert "interrupted" in err
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
