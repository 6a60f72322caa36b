"""The picture of a selection: what stays bright, what is darkened, what was not seen, and scores as colours."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.build import build_bundle
from export.plan import BuildOptions, make_plan
from runtime import picture
from runtime.errors import InputError, StorageError, UsageError
from runtime.generation import Generation
from runtime.images import ImageProcessor
from runtime.manifest import Manifest
from runtime.patch_map import Explanation, explanation_of, grid_side, one_line
from runtime.picture import DROPPED, HEAT_SHARE, draw, draw_selection, grey_contrast, heat, over_grey, panels, save_picture
from runtime.pipeline import VisionLanguageModel, load
from tests.models import tiny_llava_checkpoint

GREY = 200
EDGE = 160


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> VisionLanguageModel:
    return load(tiny_bundle)


def generation(tokens: int, kept: Sequence[int], scores: np.ndarray | None = None, text: str = "a red 3") -> Generation:
    return Generation(
        text=text, token_ids=(), prompt_tokens=tokens, reused_tokens=0, visual_tokens=tokens, kept_tokens=len(kept),
        kept_indices=tuple(kept), token_entropy=scores, ttft_ms=12.345, tpot_ms=1.0, stages_ms={}, finish_reason="eos",
    )  # fmt: skip


def flat(width: int = 56, height: int = 56, grey: int = GREY) -> np.ndarray:
    return np.full((height, width, 3), grey, np.uint8)


def shown(explanation: Explanation, image: int = 0, size: tuple[int, int] = (EDGE, EDGE)) -> list[np.ndarray]:
    """The pixels of an image's three panels."""
    return [np.asarray(panel) for panel in panels(explanation.maps[image], size, explanation.score_range)]


def cells(panel: np.ndarray, side: int) -> np.ndarray:
    """The colour beside the middle of each patch, [side * side, 3] (a patch without a score is crossed in its middle)."""
    height, width = panel.shape[:2]
    return np.array(
        [panel[int((r + 0.5) * height / side), int((c + 0.35) * width / side)] for r in range(side) for c in range(side)]
    ).astype(int)


# ---------------------------------------------------------------- panels


@pytest.mark.parametrize("grey", [255, 200, 40])
def test_kept_patches_stay_bright_and_dropped_ones_are_darkened(model: VisionLanguageModel, grey: int) -> None:
    image, kept, _ = shown(explanation_of(model, flat(grey=grey), generation(16, (0, 5, 15))))
    assert (image == grey).all()
    colours = cells(kept, 4)
    assert {i for i, colour in enumerate(colours) if (colour == grey).all()} == {0, 5, 15}
    assert {int(c) for i, colour in enumerate(colours) if i not in (0, 5, 15) for c in colour} == {round(grey * DROPPED)}


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_kept_patches_are_outlined_on_dark_and_on_bright_images(model: VisionLanguageModel, grey: int) -> None:
    _, kept, _ = shown(explanation_of(model, flat(grey=grey), generation(16, (5,))))
    assert tuple(kept[40, 60]) == picture.OUTLINE, "the upper edge of patch 5, which begins at 40, 40"
    assert tuple(kept[60, 79]) == picture.OUTLINE
    inside = [tuple(kept[60, x]) for x in range(40, 46)]
    assert picture.INSIDE in inside, "a dark line within the bright one"
    assert len({tuple(pixel) for pixel in kept[:40].reshape(-1, 3)}) == 1, "nothing is drawn over dropped patches"


def test_higher_scores_are_lighter_and_the_bar_has_their_colours(model: VisionLanguageModel) -> None:
    scores = np.linspace(0.6, 0.9, 16, dtype=np.float32)
    _, _, shade = shown(explanation_of(model, flat(), generation(16, (15,), scores)))
    colours = cells(shade, 4)
    assert (np.diff(colours @ np.array([0.299, 0.587, 0.114])) > 0).all()
    assert np.abs(colours[0] - over_grey(heat(0.0))).max() <= 1, "over an even image a colour is that of the bar"
    assert np.abs(colours[15] - over_grey(heat(1.0))).max() <= 1


@pytest.mark.parametrize(("dark", "light"), [(0, 60), (0, 255), (190, 255)])
def test_the_image_is_seen_through_the_heat_map(model: VisionLanguageModel, dark: int, light: int) -> None:
    image = flat(grey=dark)
    image[:, 28:] = light
    _, _, shade = shown(explanation_of(model, image, generation(16, (0,), np.ones(16, np.float32))))
    left, right = shade[80, 40].astype(int), shade[80, 120].astype(int)
    assert (right - left).min() > 40
    middle, gain = grey_contrast(image[..., 0].astype(np.float32))
    expected = (light - middle) * gain + 128
    assert np.abs(right - (HEAT_SHARE * np.array(heat(0.0)) + (1 - HEAT_SHARE) * expected)).max() <= 4  # resizing overshoots


def test_a_token_whose_score_is_no_number_is_crossed_out_and_counted(model: VisionLanguageModel) -> None:
    scores = np.linspace(0.1, 0.5, 16, dtype=np.float32)
    scores[3], scores[7] = np.nan, np.inf
    explanation = explanation_of(model, flat(), generation(16, (15,), scores))
    assert list(explanation.score_range or ()) == pytest.approx([0.1, 0.5])
    assert "; 2 tokens without a score" in explanation.run
    assert sorted(patch.rank or 0 for patch in explanation.tokens)[-2:] == [14, 15]
    assert {explanation.tokens[3].rank, explanation.tokens[7].rank} == {14, 15}
    assert explanation.by_rank
    _, _, shade = shown(explanation)
    assert tuple(shade[20, 140]) == picture.INK, "the middle of patch 3"
    assert len(set(cells(shade, 4)[3])) == 1, "grey, beside the cross"


def test_equal_scores_have_one_colour(model: VisionLanguageModel) -> None:
    explanation = explanation_of(model, flat(), generation(16, (0, 1), np.full(16, 0.5, np.float32)))
    assert len({tuple(colour) for colour in cells(shown(explanation)[2], 4)}) == 1
    assert explanation.by_rank, "of equal scores the lower index is kept"
    assert draw(explanation).width > 3 * 200


@pytest.mark.parametrize("scores", [None, np.full(16, np.nan, np.float32)])
def test_where_nothing_was_scored_the_panel_says_so(model: VisionLanguageModel, scores: np.ndarray | None) -> None:
    explanation = explanation_of(model, flat(), generation(16, range(16), scores))
    assert explanation.score_range is None
    assert "16 kept (100.0 %) from layer 2 of 4 on; nothing was scored" in explanation.figures
    _, kept, shade = shown(explanation, size=(300, 300))
    assert (cells(kept, 4) == GREY).all()
    inked = np.argwhere((shade < 100).all(axis=2))
    assert 50 < len(inked) < 2000, "one line of text"
    assert (np.abs(inked.mean(axis=0) - 150) < 20).all()
    draw(explanation)


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("size", [(112, 56), (56, 112)])
def test_what_the_centre_crop_cuts_off_is_washed_out_and_hatched(model: VisionLanguageModel, size: tuple[int, int]) -> None:
    explanation = explanation_of(model, flat(*size, grey=60), generation(16, (0,), np.arange(16, dtype=np.float32)))
    (map_,) = explanation.maps
    assert map_.cropped
    assert map_.window == pytest.approx((0.25, 0, 0.75, 1) if size[0] > size[1] else (0, 0.25, 1, 0.75))
    pale = []
    for i, panel in enumerate(shown(explanation, size=(2 * size[0], 2 * size[1]))):
        upright = panel if size[0] > size[1] else panel.transpose(1, 0, 2)
        outside = np.concatenate([upright[:, :56], upright[:, 168:]]).reshape(-1, 3)
        colours, counts = np.unique(outside, axis=0, return_counts=True)
        assert len(colours) == 2, "paler, with darker lines"
        assert colours[counts.argmax()].min() > 150
        pale.append(colours[counts.argmax()].tolist())
        assert not (upright[:, 56:168] == colours[counts.argmax()]).all(axis=2).any(), f"panel {i} is pale outside alone"
    assert pale[0] == pale[1], "what was not seen was not dropped either"


def test_a_whole_image_is_not_hatched(model: VisionLanguageModel) -> None:
    explanation = explanation_of(model, flat(447, 447), generation(16, (0,)))
    assert not explanation.maps[0].cropped
    assert explanation.maps[0].window == pytest.approx((0, 0, 1, 1))


@pytest.mark.parametrize("size", [(3, 2), (1, 1), (1, 60), (4000, 20), (20, 4000), (3000, 2000)])
def test_images_of_any_shape_are_drawn(model: VisionLanguageModel, size: tuple[int, int]) -> None:
    explanation = explanation_of(model, flat(*size), generation(16, (0, 5), np.arange(16, dtype=np.float32)[::-1].copy()))
    (map_,) = explanation.maps
    assert map_.original_size == size
    assert max(map_.image.size) <= 1280
    assert 1 / 4 <= map_.image.width / map_.image.height <= 4, "no more of a long image is shown than the surroundings of the crop"
    areas = {round((p.box[2] - p.box[0]) * (p.box[3] - p.box[1]), 6) for p in map_.patches}
    assert len(areas) == 1, "patches tile the window evenly"
    drawn = draw(explanation)
    assert 600 < drawn.width < 2100
    assert drawn.height < 900


def test_tokens_that_show_only_padding_are_told_in_words(tiny_bundle: Path) -> None:
    model = load(tiny_bundle)
    model.prompts.image_processor = ImageProcessor.from_json(
        {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "crop_size": {"height": 56, "width": 56}}
    )
    (map_,) = explanation_of(model, flat(28, 28), generation(16, (0, 5), np.arange(16, dtype=np.float32))).maps
    assert [i for i, patch in enumerate(map_.patches) if patch.placed] == [5, 6, 9, 10]
    assert map_.notes == ("12 patches lie in the padding around the image (1 kept)",)
    assert not map_.cropped
    draw_selection(model, flat(28, 28), generation(16, (0, 5)))


@pytest.fixture(scope="module")
def with_class_token(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder = tmp_path_factory.mktemp("full")
    checkpoint = tiny_llava_checkpoint(folder / "checkpoint", image_size=28, strategy="full")
    build_bundle(make_plan(BuildOptions("llava15", checkpoint=str(checkpoint), keep=(2,), split_layer=2)), folder / "bundle")
    return load(folder / "bundle")


def test_a_class_token_shifts_the_patches_and_is_told_in_words(with_class_token: VisionLanguageModel) -> None:
    scores = np.array([9, 1, 2, 3, 4], np.float32)
    explanation = explanation_of(with_class_token, flat(28, 28), generation(5, (0, 3), scores))
    (map_,) = explanation.maps
    assert (map_.side, map_.kept, len(map_.patches), len(map_.tokens)) == (2, 2, 4, 5)
    assert map_.notes == ("the class token, which has no place in the image, was kept (score 9.0000)",)
    _, kept, shade = shown(explanation)
    assert [bool((colour == GREY).all()) for colour in cells(kept, 2)] == [False, False, True, False]
    assert (np.diff(cells(shade, 2).sum(axis=1)) > 0).all()


def test_a_real_answer_with_a_class_token_is_drawn(with_class_token: VisionLanguageModel) -> None:
    for keep in (2, "all"):
        result = with_class_token.generate("x", [flat(28, 28), flat(28, 40)], keep=keep, max_new_tokens=1)
        explanation = explanation_of(with_class_token, [flat(28, 28), flat(28, 40)], result)
        assert explanation.kept == len(result.kept_indices)
        assert [patch.token for patch in explanation.tokens if patch.kept] == list(result.kept_indices)
        draw(explanation)


@pytest.mark.parametrize(("tokens", "side"), [(576, 24), (577, 24), (64, 8), (65, 8), (1, 1), (2, 1)])
def test_a_square_number_of_tokens_is_a_grid_and_one_more_has_a_class_token(tokens: int, side: int) -> None:
    assert grid_side(tokens) == side


@pytest.mark.parametrize("tokens", [3, 8, 575, 578, 2880 - 1])
def test_tokens_that_form_no_square_are_refused(tokens: int, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"{tokens} visual tokens of an image form no square grid .expected a square number, or one more for the class token.: "
    with pytest.raises(UsageError, match=message):
        grid_side(tokens)
    geometry = dataclasses.replace(model.manifest.geometry, visual_tokens=tokens)
    changed: Manifest = dataclasses.replace(model.manifest, geometry=geometry, max_context=4096)
    monkeypatch.setattr(model, "manifest", changed)
    with pytest.raises(UsageError, match=message):
        draw_selection(model, flat(), generation(tokens, (0,)))


# ---------------------------------------------------------------- several images


def test_a_contact_sheet_has_a_row_and_a_count_for_each_image(model: VisionLanguageModel) -> None:
    images = [flat(), flat(112, 56), flat(grey=90)]
    scores = np.concatenate([np.linspace(0, 1, 16), np.linspace(2, 3, 16), np.linspace(1, 2, 16)]).astype(np.float32)
    explanation = explanation_of(model, images, generation(48, (29, 30, 31, 47), scores))
    assert [map_.kept for map_ in explanation.maps] == [0, 3, 1]
    assert [map_.name for map_ in explanation.maps] == ["image 1", "image 2", "image 3"]
    assert [[p.token for p in map_.patches if p.kept] for map_ in explanation.maps] == [[], [29, 30, 31], [47]]
    assert "48 visual tokens in 3 images; 4 kept (8.3 %)" in explanation.figures
    assert not explanation.by_rank, "image 2 has higher scores than what was kept of image 3"
    one, sheet = draw(explanation_of(model, images[0], generation(16, (0,)))), draw(explanation)
    assert sheet.height > 3 * 120 + 100
    assert sheet.width < one.width, "panels of several images are smaller"


def test_colours_are_comparable_between_the_images_of_a_prompt(model: VisionLanguageModel) -> None:
    scores = np.concatenate([np.full(16, 0.2), np.linspace(0.2, 1.0, 16)]).astype(np.float32)
    explanation = explanation_of(model, [flat(), flat()], generation(32, (31,), scores))
    first, second = (cells(shown(explanation, image)[2], 4) for image in (0, 1))
    assert (first == second[0]).all()
    assert second[15].sum() > second[0].sum() + 150


def test_a_long_sheet_stays_within_reason(model: VisionLanguageModel) -> None:
    sheet = draw_selection(model, [flat()] * 31, generation(31 * 16, (0,), np.arange(31 * 16, dtype=np.float32)))
    assert sheet.width < 900
    assert sheet.height < 31 * 230


def test_real_answers_about_two_images_keep_the_highest_scores_over_both(model: VisionLanguageModel) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (56, 56, 3), dtype=np.uint8) for _ in range(2)]
    result = model.generate("how many digits?", images, max_new_tokens=3)
    explanation = explanation_of(model, images, result, "how many digits?")
    assert explanation.by_rank
    assert explanation.kept == 4
    assert explanation.lowest_kept == pytest.approx(sorted(result.token_entropy if result.token_entropy is not None else [])[-4])
    draw(explanation)


def test_a_state_is_drawn_without_a_question(model: VisionLanguageModel) -> None:
    image = flat(60, 56)
    state = model.prefill([{"role": "user", "content": [{"type": "image"}]}], [image])
    explanation = explanation_of(model, image, state)
    assert (explanation.answer, explanation.ttft_ms, explanation.kept) == (None, None, 4)
    assert [p.token for p in explanation.tokens if p.kept] == state.kept_indices.tolist()
    assert explanation.figures.endswith("; no question asked")
    assert "first token" not in explanation.figures
    draw(explanation)


@pytest.mark.parametrize(
    ("images", "tokens", "message"),
    [
        ([flat()], 32, "the result is about 2 images, 1 were given: give those of its prompt"),
        ([flat(), flat()], 16, "the result is about 1 images, 2 were given"),
        ([], 16, "there is no image to draw: a picture needs a prompt with at least one"),
        ([flat()], 0, "there is no image to draw"),
    ],
)
def test_images_that_do_not_belong_to_the_result_are_refused(
    model: VisionLanguageModel, images: list[np.ndarray], tokens: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        draw_selection(model, images, generation(tokens, ()))


def test_an_image_that_cannot_be_read_is_named(model: VisionLanguageModel) -> None:
    with pytest.raises(InputError, match=r"there is no image nowhere\.png"):
        draw_selection(model, "nowhere.png", generation(16, (0,)))


# ---------------------------------------------------------------- text, files


def test_the_figures_stand_in_one_line(model: VisionLanguageModel) -> None:
    scores = np.linspace(0.5, 0.75, 16, dtype=np.float32)
    figures = explanation_of(model, flat(), generation(16, range(12, 16), scores, "a red\n3 'there'")).figures
    assert figures == (
        "16 visual tokens; 4 kept (25.0 %) from layer 2 of 4 on; score (trace) 0.5000 to 0.7500; first token after 12.3 ms; "
        "answer \"a red 3 'there'\""
    )


def test_any_text_can_be_drawn(model: VisionLanguageModel) -> None:
    odd = "\udcff\x00\x1b[31m 形 \N{ARABIC LETTER ALEF} \u202e\n\t" + "W" * 500
    result = generation(16, (0,), text=odd * 3)
    plain, drawn = draw_selection(model, flat(), generation(16, (0,))), draw_selection(model, flat(), result, odd * 200)
    assert drawn.width == plain.width
    assert plain.height < drawn.height < plain.height + 300, "long texts are cut"
    assert one_line("a\n\x00b\ud800  c" + "d" * 50, 12) == "a b cdddd..."
    assert draw_selection(model, flat(), generation(16, (0,)), "").size[0] == plain.width


def test_a_saved_picture_is_a_png_that_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("before", encoding="utf-8")
    save_picture(Image.new("RGB", (20, 10), "red"), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.size) == ("PNG", (20, 10))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"], "no temporary file is left"


def test_a_picture_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (4, 4))
    with pytest.raises(StorageError, match=r"cannot write .*: there is no directory .*nowhere, make it first"):
        save_picture(image, tmp_path / "nowhere" / "a.png")
    with pytest.raises(StorageError, match="it is a directory or a device, give the name of a file"):
        save_picture(image, tmp_path)
    with pytest.raises(StorageError, match="it is a directory or a device, give the name of a file"):
        save_picture(image, "/dev/null")
    (tmp_path / "a.png").write_text("before", encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StorageError, match=r"cannot write .*a\.png: No space left on device"):
        save_picture(image, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_text(encoding="utf-8") == "before"
    assert len(list(tmp_path.iterdir())) == 1
