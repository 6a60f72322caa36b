"""Whatever is given to a command line: one clear line, exit code 2, and nothing lost.

Each case runs a command's `main` beside an earlier bundle and compares everything with what was there before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from export import build, verify
from export.staging import staged
from runtime import generate
from runtime.names import MANIFEST_FILE
from tests.models import tiny_llava_checkpoint
from tests.site import Refused, Site, cut

# ---------------------------------------------------------------- options of a build


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "llava16"], r"unknown model 'llava16': did you mean llava15\? --model takes llava15, .*tiny-llava"),
        (["--model", "gpt"], "unknown model 'gpt': --model takes "),
        (["--target", "jetson"], r"unknown target 'jetson': did you mean jetson-(orin|thor)\? --target takes cpu, "),
        (["--score-mode", "entropy"], "unknown --score-mode 'entropy': choose one of trace, row, raw, dpp, random, energy-high"),
        (["--precision", "int3"], "--precision int3 is not offered for target cpu: choose one of fp32"),
        (["--split-layer", "0"], "--split-layer 0 is out of range: the decoder has 4 layers, split before layer 1 to 3"),
        (["--split-layer", "4"], "--split-layer 4 is out of range"),
        (["--split-layer", "-1"], "--split-layer -1 is out of range"),
        (["--split-layer", "two"], r"argument --split-layer: invalid int value: 'two' \(see --help\)"),
        (["--keep", "0"], "--keep 0 is out of range: an image has 16 visual tokens, keep 1 to 16 of them"),
        (["--keep", "17"], "--keep 17 is out of range"),
        (["--keep", "4,-2"], "--keep -2 is out of range"),
        (["--keep", "4;2"], "argument --keep: '4;2' is not a list of whole numbers such as 166 or 166,98,29"),
        (["--keep", ""], "argument --keep: '' is not a list"),
        (["--keep", "1" * 5000], "argument --keep: '1+' is not a list"),
        (["--avg-keep", "3"], "an average of 3 visual tokens over 4 layers is not feasible .*: choose 8.5 to 16, or an earlier split"),
        (["--avg-keep", "17"], "choose 8.5 to 16"),
        (["--avg-keep", "nan"], "choose 8.5 to 16"),
        (["--avg-keep", "inf"], "choose 8.5 to 16"),
        (["--avg-keep", "1e308"], "choose 8.5 to 16"),
        (["--keep-percent", "0"], "--keep-percent is the percentage of visual tokens KEPT, above 0 and up to 100; got 0"),
        (["--keep-percent", "150"], "got 150"),
        (["--keep-percent", "nan"], "got nan"),
        (["--auto-keep", "most"], "argument --auto-keep: invalid float value: 'most'"),
        (["--keep", "4,2", "--auto-keep", "0"], "--auto-keep is the share of the scores' mass that kept .*, above 0 and up to 1; got 0"),
        (["--keep", "4,2", "--auto-keep", "90"], "above 0 and up to 1; got 90"),
        (["--keep", "4,2", "--auto-keep", "-0.5"], "above 0 and up to 1; got -0.5"),
        (["--keep", "4,2", "--auto-keep", "nan"], "above 0 and up to 1; got nan"),
        (["--keep", "4", "--auto-keep", "0.9"], "--auto-keep chooses among budgets, and the bundle would hold 4 alone: give two or more"),
        (["--keep", "4,4", "--auto-keep", "0.9"], "the bundle would hold 4 alone: give two or more, as --keep R,R"),
        (
            ["--keep", "4,2", "--auto-keep", "0.9", "--score-mode", "random"],
            "--auto-keep means nothing with --score-mode random, whose scores see no image: choose one of trace, row, raw, dpp",
        ),
        (["--keep", "4,2", "--auto-keep", "0.9", "--score-mode", "uniform"], "--auto-keep means nothing with --score-mode uniform"),
        (["--keep", "4", "--avg-keep", "9"], "argument --avg-keep: not allowed with argument --keep"),
        (
            ["--keep", "4", "--max-context", "31"],
            "--max-context 31 is out of range: the model has 1024 positions and an image needs 32; choose 32 to 1024",
        ),
        (["--keep", "4", "--max-context", "1025"], "--max-context 1025 is out of range"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_an_option_out_of_range_says_what_is_in_range(site: Site, refused: Refused, options: list[str], message: str) -> None:
    told = refused(build, site.build(*options), message)
    assert told.before == []


def test_a_missing_option_is_named(site: Site, refused: Refused) -> None:
    refused(build, ["--checkpoint", str(site.checkpoint)], r"the following arguments are required: --model \(see --help\)")


def test_a_model_with_two_heads_has_no_entropy(site: Site, refused: Refused, tmp_path: Path) -> None:
    two = tiny_llava_checkpoint(tmp_path / "two", heads=2)
    refused(
        build, ["--model", "llava15", "--checkpoint", str(two), "--keep", "1"], "--score-mode trace needs at least 3 query heads, .* has 2"
    )
    assert build.main(["--model", "llava15", "--checkpoint", str(two), "--keep", "1", "--score-mode", "uniform", "--dry-run"]) == 0


# ---------------------------------------------------------------- checkpoints


def test_a_missing_checkpoint_says_how_to_name_one(site: Site, refused: Refused) -> None:
    for place, message in (
        (site.folder / "nowhere", "there is no directory .*nowhere: name a Hugging Face checkpoint with --checkpoint DIR"),
        (
            "llava-hf/none",
            r"llava-hf/none is neither a directory nor complete in the Hugging Face cache .*name a local one with --checkpoint",
        ),
        (site.image, "scene.png is not a directory: name the directory that holds config.json"),
        (site.bundle, "bundle holds no config.json"),
    ):
        refused(build, ["--model", "llava15", "--checkpoint", str(place)], message)


HEAD = "language_model.lm_head.weight"
NORM = "language_model.model.norm.weight"
DAMAGES: list[tuple[str, Callable[[Site], object], str]] = [
    ("another architecture", lambda s: s.configure(None, model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"]),
     r"not of family llava15: its config.json has model_type 'qwen2_5_vl' .*this architecture is not implemented"),
    ("another decoder", lambda s: s.configure("text_config", model_type="mistral"),
     "text_config.model_type = 'mistral' is not implemented; expected 'llama'"),
    ("a missing tensor", lambda s: s.weights(lambda t: t.pop(NORM)), r"1 missing \(norm.weight\); use the checkpoint as published"),
    ("an extra tensor", lambda s: s.tensor("image_newline", torch.ones(64)), r"1 unexpected \(image_newline\)"),
    ("a wrong shape", lambda s: s.tensor(NORM, torch.ones(65)),
     r"1 of the wrong shape \(language_model.model.norm.weight \[65\] \(expected \[64\]\)\)"),
    ("an integer tensor", lambda s: s.tensor(NORM, torch.ones(64, dtype=torch.int8)), "of a type that is not read"),
    ("quantised", lambda s: s.configure(None, quantization_config={"quant_method": "awq", "bits": 4}),
     r"already quantised \(config.json has quantization_config\): use the original checkpoint"),
    ("quantised by its tensors", lambda s: s.tensor(HEAD + "_scale", torch.ones(1)), "it looks already quantised"),
    ("rope scaling", lambda s: s.configure("text_config", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
     r"rope_type = 'linear' is not implemented; expected 'default' \(rope scaling is not implemented\)"),
    ("old rope scaling", lambda s: s.configure("text_config", rope_scaling={"type": "dynamic", "factor": 2.0}),
     "rope_scaling.type = 'dynamic' is not implemented"),
    ("sliding window", lambda s: s.configure("text_config", sliding_window=4096), "sliding_window = 4096 is not implemented"),
    ("another norm", lambda s: s.configure("text_config", norm_type="layer_norm"), "norm_type = 'layer_norm' is not implemented"),
    ("a norm of queries and keys", lambda s: s.configure("text_config", qk_norm=True), "qk_norm = True is not implemented"),
    ("no JSON", lambda s: s.write("config.json", "{"), r"config.json is not valid JSON .*: fetch the file again"),
    ("no weights", lambda s: s.remove("model.safetensors"), "holds neither model.safetensors nor model.safetensors.index.json"),
    ("truncated weights", lambda s: cut(s.checkpoint / "model.safetensors", -1), "is truncated: .*; fetch the file again"),
    ("empty weights", lambda s: cut(s.checkpoint / "model.safetensors", 0), r"\(0 bytes\) is truncated or not a safetensors file"),
    ("no tokenizer", lambda s: s.remove("tokenizer.json"), "holds no tokenizer.json: fetch it"),
    ("a damaged tokenizer", lambda s: cut(s.checkpoint / "tokenizer.json", 100), "tokenizer.json is not valid JSON"),
    ("no tokenizer of this kind", lambda s: s.write("tokenizer.json", '{"added_tokens": [{"id": 4, "content": "<image>"}]}'),
     "tokenizer.json is not a tokenizer this version reads"),
    ("another image token", lambda s: s.configure(None, image_token_index=7, image_token_id=7), "tokenizer.json has no added token 7"),
    ("no template", lambda s: s.remove("chat_template.jinja"), "has no chat template: put a chat_template.jinja beside"),
    ("a damaged template", lambda s: s.write("chat_template.jinja", "{% for %}"), "the chat template is not valid"),
    ("a template without images", lambda s: s.write("chat_template.jinja", "hello"),
     r"the rendered prompt holds 0 placeholder\(s\) '<image>' for 1 image"),
    ("a damaged generation config", lambda s: s.write("generation_config.json", "{"), "generation_config.json is not valid"),
    ("beam search", lambda s: s.write("generation_config.json", '{"num_beams": 3}'), "num_beams = 3, which is not implemented"),
    ("no processor", lambda s: s.remove("processor_config.json"), "holds no preprocessor_config.json or processor_config.json"),
    ("a processor of another size", lambda s: s.write("preprocessor_config.json",
        '{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}'),
     "the image processor gives 336 x 336 pixels, the vision tower takes 56 x 56"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_a_checkpoint_that_cannot_be_exported_says_why(
    site: Site, refused: Refused, damage: Callable[[Site], object], message: str
) -> None:
    damage(site)
    for more in ([], ["--dry-run"]):
        told = refused(build, site.build("--keep", "4", *more), message)
        assert told.before == [], "it is noticed before the plan is printed"


def test_a_tokenizer_larger_than_the_model_is_named(site: Site, refused: Refused) -> None:
    site.configure("text_config", vocab_size=300)
    site.weights(lambda t: t.update({name: t[name][:300] for name in (HEAD, "language_model.model.embed_tokens.weight")}))
    refused(build, site.build("--keep", "4"), r"tokenizer.json has 108 token\(s\) beyond the model's vocabulary of 300, such as ")


# ---------------------------------------------------------------- output directories


def test_an_output_that_holds_something_else_is_left_alone(site: Site, refused: Refused) -> None:
    (site.folder / "thesis").mkdir()
    (site.folder / "thesis" / "chapter1.txt").write_text("mine")
    (site.folder / "file").write_text("mine")
    (site.bundle / "notes.txt").write_text("mine")
    for output in ("thesis", "file"):
        told = refused(
            build, site.build("--keep", "4", output=output), f"{output} exists and is not a bundle; it is left alone: choose another"
        )
        assert told.before == []
    refused(build, site.build("--keep", "4"), "bundle holds notes.txt, which is not of the bundle; it is left alone")
    refused(
        build,
        site.build("--keep", "4", output="file/below"),
        "cannot write .*file/below: (Not a directory|File exists); choose a writable --output",
    )


def test_another_build_of_the_same_directory_is_refused(site: Site, refused: Refused) -> None:
    with staged(site.bundle) as directory:
        refused(build, site.build("--keep", "4"), "another build is writing .*bundle: wait for it, or choose another --output")
        shutil.copytree(site.bundle, directory, dirs_exist_ok=True)


def test_a_read_only_place_is_named(site: Site, refused: Refused) -> None:
    site.folder.chmod(0o500)
    if os.access(site.folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    try:
        refused(build, site.build("--keep", "4"), "Permission denied; choose a writable --output and build again")
    finally:
        site.folder.chmod(0o700)


# ---------------------------------------------------------------- bundles


def bundle_files() -> list[str]:
    return [
        "embed_tokens.fp32.bin", "weights.fp32.bin", "vision.onnx", "pre_ecl.onnx", "post_ecl.onnx", "score.4.onnx", "score.2.onnx",
        "tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "special_tokens.json", "generation_config.json",
    ]  # fmt: skip


def test_every_file_of_a_bundle_is_known_here(tiny_bundle: Path) -> None:
    assert set(bundle_files()) == set(json.loads((tiny_bundle / MANIFEST_FILE).read_text())["files"])


@pytest.mark.parametrize("name", bundle_files())
def test_an_altered_truncated_or_missing_file_of_a_bundle_is_named(site: Site, refused: Refused, name: str) -> None:
    path = site.bundle / name
    data = path.read_bytes()
    for place in (0, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        refused(generate, site.ask(), rf"{name} was altered .*: copy the bundle again, or export it again")
    path.write_bytes(data[:-1])
    refused(generate, site.ask(), rf"{name} has {len(data) - 1} bytes, the manifest says {len(data)}")
    path.unlink()
    refused(generate, site.ask(), rf"{name} is missing from ")


@pytest.mark.parametrize("module", [generate, verify])
def test_a_bundle_that_is_none_or_too_new_says_so(site: Site, refused: Refused, module: Any) -> None:
    def argv(bundle: Path) -> list[str]:
        return ["--bundle", str(bundle), "--prompt", "x"] if module is generate else [str(bundle)]

    refused(module, argv(site.folder / "nowhere"), "nowhere is not a directory: name a bundle made by `python -m export.build`")
    refused(module, argv(site.checkpoint), "checkpoint holds no bundle.json")
    path = site.bundle / MANIFEST_FILE
    text = path.read_text()
    path.write_text(text.replace('"schema_version": 2', '"schema_version": 99'))
    refused(module, argv(site.bundle), "the bundle has schema 99, this version reads up to 3: upgrade, or export it again")
    path.write_text(text[: len(text) // 2])
    refused(module, argv(site.bundle), "bundle.json is not valid JSON")
    path.write_text(text.replace('"budgets"', '"bugdets"'))
    refused(module, argv(site.bundle), "missing or unknown entries")


def test_verify_needs_the_checkpoint_that_the_bundle_was_made_from(site: Site, refused: Refused) -> None:
    site.weights(lambda t: t[NORM].mul_(2))
    refused(verify, [str(site.bundle), "--checkpoint", str(site.checkpoint)], "is not what the bundle was made from .*name that one with")
    refused(verify, [str(site.bundle), "--checkpoint", str(site.folder / "nowhere")], "there is no directory")
    refused(verify, [str(site.bundle), "--selection-images", "many"], "argument --selection-images: invalid int value: 'many'")


def test_verify_needs_two_images(site: Site, refused: Refused) -> None:
    (site.folder / "images").mkdir()
    argv = [str(site.bundle), "--checkpoint", str(site.checkpoint), "--images", str(site.folder / "images")]
    refused(verify, argv, r"images holds 0 image\(s\) .*: name a directory of two or more")


# ---------------------------------------------------------------- questions and images


def truncated(path: Path, kind: str) -> None:
    Image.effect_noise((64, 64), 50).save(path, kind)
    cut(path, -500)


IMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("missing", lambda p: None, "there is no image .*given: check the path"),
    ("empty", lambda p: p.touch(), r"given is empty \(0 bytes\): copy the image again"),
    ("text", lambda p: p.write_text("hello" * 100), "given is not an image of a known format .*: convert it first"),
    ("a directory", lambda p: p.mkdir(), "given is not a file: give the path of one image"),
    ("a truncated PNG", lambda p: truncated(p, "PNG"), "is damaged or cut short .*: copy the image again"),
    ("a truncated JPEG", lambda p: truncated(p, "JPEG"), "is damaged or cut short .*: copy the image again"),
    ("a truncated WebP", lambda p: truncated(p, "WEBP"), "is damaged or cut short|not an image"),
    ("a header alone", lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n"), "is damaged or cut short|not an image"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), [i[1:] for i in IMAGES], ids=[i[0] for i in IMAGES])
def test_an_image_that_is_none_says_so(site: Site, refused: Refused, make: Callable[[Path], object], message: str) -> None:
    make(site.folder / "given")
    refused(generate, site.ask("--image", str(site.folder / "given")), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "the prompt is empty: write a question or an instruction"),
        (["--prompt", "  "], "the prompt is empty"),
        (
            ["--prompt", "row " * 600],
            r"the prompt has \d+ tokens, the bundle's context holds 512 with the answer: shorten it, or export with",
        ),
        (["--image", "https://example.org/a.png"], "https://example.org/a.png is a URL: download the image first and give its path"),
        (["--keep", "3"], "this bundle holds the budgets 4, 2 and all, not 3: export it with --keep 3"),
        (["--keep", "0"], "this bundle holds the budgets 4, 2 and all, not 0"),
        (["--keep", "some"], "argument --keep: 'some' is neither a number of tokens nor 'all' or 'auto'"),
        (["--keep", "4" * 5000], "argument --keep: '4+.{3,}4+' is neither a number of tokens"),
        (
            ["--keep", "auto"],
            "this bundle has no threshold for keep auto: export it with several budgets and --auto-keep T, or keep 4, 2 and all",
        ),
        (["--keep", "²"], "argument --keep: "),
        (["--max-new-tokens", "0"], "max_new_tokens must be an integer of 1 or more: got 0"),
        (["--temperature", "0.5"], "temperature would have no effect without sampling"),
        (["--do-sample", "--temperature", "nan"], "temperature must be a number above 0"),
        (["--do-sample", "--top-p", "1.5"], "top_p must be a number above 0 up to 1"),
        (["--do-sample", "--seed", "-1"], "seed must be an integer of 0 or more"),
        (["--stop", ""], "stop_strings must be texts that are not empty"),
        (["--threads", "0"], "threads is 0; give 1 to 1024"),
        (["--threads", "-3"], "threads is -3; give 1 to 1024"),
        (["--max-new-tokens", "few"], "argument --max-new-tokens: invalid int value: 'few'"),
        (["--picture", "kept.png"], "--picture needs an --image to draw"),
    ],
)
def test_a_question_that_cannot_be_answered_says_why(site: Site, refused: Refused, options: list[str], message: str) -> None:
    told = refused(generate, site.ask(*options), message)
    assert told.before == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kept.jpg", "--picture .*kept.jpg: a PNG is written, give a name that ends in .png"),
        ("kept", "--picture .*kept: a PNG is written"),
        ("nowhere/kept.png", "--picture .*nowhere/kept.png: there is no directory .*nowhere, make it first"),
    ],
)
def test_a_picture_that_cannot_be_written_says_why(site: Site, refused: Refused, name: str, message: str) -> None:
    refused(generate, site.ask("--image", str(site.image), "--picture", str(site.folder / name)), message)
