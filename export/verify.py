"""`python -m export.verify BUNDLE`: the exported chain against eager transformers with the same pruning.

    python -m export.verify bundles/tiny-llava-cpu
    python -m export.verify BUNDLE --checkpoint DIR --images DIR --selection-images 100
    python -m export.verify BUNDLE --save-inputs DIR            # every graph's inputs and outputs, for Polygraphy on a device

Prefill, every cache tensor, greedy decoding, the selection, and controls that must fail. Writes verify.json into the bundle.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.command_line import CommandParser, run_command

if TYPE_CHECKING:
    from export.eager import EagerPrunedLlava
    from export.parity import Check, SelectionQuality
    from runtime.pipeline import VisionLanguageModel
    from runtime.prompt import ImageSource, Prompt

QUESTION = "What is in this picture?"
FAILED = 1  # the bundle was compared and differs


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m export.verify", description="Compare a bundle with eager transformers.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--checkpoint", metavar="DIR|HF-ID", help="what the bundle was made from (default: its model's)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="images to compare with (default: seeded noise and gradients)")
    parser.add_argument("--selection-images", type=int, default=20, metavar="N", help="images for the selection's statistics")
    parser.add_argument(
        "--save-inputs", type=Path, metavar="DIR",
        help="write every graph's inputs and expected outputs as Polygraphy's files, with the lines that compare them on a device",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the last line of stdout is the report as one JSON object")
    return parser


def verify(
    model: VisionLanguageModel, reference: EagerPrunedLlava, images: Sequence[ImageSource], selection_images: int = 20
) -> dict[str, Any]:
    """Climbs the ladder and returns the report as plain data.

    Args:
        model: the loaded bundle.
        reference: the same checkpoint, eager, with the bundle's split layer and score mode, and `keep` None (indices are injected).
        images: at least two; they are used again where more are needed.
        selection_images: how many prompts the selection is compared over.
    """
    from tqdm import tqdm

    checks = list(tqdm(_ladder(model, reference, images), desc="parity", disable=None, file=sys.stderr))
    selection = _selection(model, reference, images, selection_images)
    checks += selection.pop("checks", [])
    return {
        "passed": all(c.passed for c in checks),
        "checks": [{**dataclasses.asdict(c), "passed": c.passed} for c in checks],
        "selection": selection,
        "bundle": {
            "model": model.manifest.model,
            "split_layer": model.manifest.split_layer,
            "budgets": model.manifest.budgets,
            "manifest_sha256": model.manifest.export_sha256(),
        },
        **_where(),
    }


def _ladder(model: VisionLanguageModel, reference: EagerPrunedLlava, images: Sequence[ImageSource]) -> Iterator[Check]:
    import numpy as np

    from export import parity

    chain, n = model.chain, model.manifest.geometry.visual_tokens
    one, two, text = _prompt(model, images[:1]), _prompt(model, images[:2]), _prompt(model, [])
    yield from parity.compare_prompt(chain, reference, text, None, "text only")
    yield from parity.compare_prompt(chain, reference, one, np.arange(n), "keep = N")
    for keep in dict.fromkeys((*model.manifest.budgets, 1)):
        kept = np.sort(np.random.default_rng(keep).permutation(n)[:keep])
        yield from parity.compare_prompt(chain, reference, one, kept, f"keep {keep}")
    kept = np.sort(np.random.default_rng(0).permutation(2 * n)[: max(1, n // 2)])
    yield from parity.compare_prompt(chain, reference, two, kept, "two images")
    yield parity.compare_continuation(chain, one, range(10, 18), "prefill + decode = one prefill")
    if n >= 4:  # with fewer, renumbering or reordering may change nothing
        kept = np.arange(1, n, 2)
        yield from parity.negative_controls(chain, reference, one, kept)


def _selection(model: VisionLanguageModel, reference: EagerPrunedLlava, images: Sequence[ImageSource], count: int) -> dict[str, Any]:
    from tqdm import tqdm

    from export import parity

    manifest = model.manifest
    keep, mode = manifest.budgets[0], manifest.score_mode
    if keep >= manifest.geometry.visual_tokens or mode in ("random", "uniform") or count < 1:
        return {}
    prompts = (_prompt(model, [images[i % len(images)]]) for i in range(count))
    bar = tqdm(prompts, total=count, desc="selection", disable=None, file=sys.stderr)
    found = [parity.compare_selection(model.chain, reference, prompt, keep)[0] for prompt in bar]
    errors = [q.score_error for q in found if q.score_error == q.score_error]
    return {
        "images": count, "mode": mode, "keep": keep, "mean_overlap": sum(q.overlap for q in found) / count,
        "worst_overlap": min(q.overlap for q in found), "largest_score_error": max(errors, default=None),
        "largest_swap_distance": max(q.swap_distance for q in found), "checks": list(_selection_checks(mode, found)),
    }  # fmt: skip


def _selection_checks(mode: str, found: Sequence[SelectionQuality]) -> Iterator[Check]:
    from export import parity, tolerances
    from export.exact_score import HIDDEN_MODES

    if mode in HIDDEN_MODES:
        shortfall, gap = max(q.shortfall for q in found), max(q.determinant_gap for q in found)
        yield parity.Check("selection: variance forgone by a step", shortfall, tolerances.MAX_SHORTFALL)
        yield parity.Check("selection: ln det from the exact set's, per kept token", gap, tolerances.MAX_DETERMINANT_GAP)
        return
    loss, distance = 1 - sum(q.overlap for q in found) / len(found), max(q.swap_distance for q in found)
    yield parity.Check(f"selection: 1 - mean overlap over {len(found)} images", loss, 1 - tolerances.MIN_OVERLAP)
    yield parity.Check("selection: a swapped token's distance from the threshold", distance, tolerances.MAX_SWAP_DISTANCE)


def _prompt(model: VisionLanguageModel, images: Sequence[ImageSource]) -> Prompt:
    parts: list[dict[str, str]] = [{"type": "image"} for _ in images]
    return model.prompts.build([{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}], images)


def synthetic_images(count: int, side: int) -> list[ImageSource]:
    """Seeded noise, smooth at different scales: uint8 [side, side, 3] arrays."""
    import numpy as np
    from PIL import Image

    images: list[ImageSource] = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        cells = int(rng.integers(2, 16))
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        images.append(np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)))
    return images


def verify_targets(
    model: VisionLanguageModel, reference: EagerPrunedLlava, images: Sequence[ImageSource], selection_images: int = 20
) -> dict[str, Any]:
    """As `verify`, for the graphs of all of a bundle's targets that ONNX Runtime runs on a CPU: one report, its checks named by target
    where there are several.
    """
    from runtime.manifest import read_manifest
    from runtime.pipeline import VisionLanguageModel

    whole, reports = read_manifest(model.bundle), dict[str, dict[str, Any]]()
    for target in whole.targets:
        variant = whole.variant(target)
        if target == model.manifest.target:
            reports[target] = verify(model, reference, images, selection_images)
        elif variant.precision in ("fp32", "fp16"):
            reports[target] = verify(VisionLanguageModel(model.bundle, variant), reference, images, selection_images)
        else:
            print(f"target {target} was not compared: ONNX Runtime runs no {variant.precision} on a CPU", file=sys.stderr)
    report = _merged(reports) if len(reports) > 1 else next(iter(reports.values()))
    return {**report, "bundle": {**report["bundle"], "manifest_sha256": whole.export_sha256()}}


def _merged(reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The first target's report with the checks of all of them."""
    checks = [{**check, "name": f"{target}: {check['name']}"} for target, report in reports.items() for check in report["checks"]]
    first = next(iter(reports.values()))
    selections = {target: report["selection"] for target, report in reports.items()}
    return {**first, "passed": all(r["passed"] for r in reports.values()), "checks": checks, "selections": selections}


def _folder_images(folder: Path) -> list[ImageSource]:
    from runtime.errors import UsageError

    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes) if folder.is_dir() else []
    if len(files) < 2:
        raise UsageError(f"--images {folder} holds {len(files)} image(s) ({', '.join(suffixes)}): name a directory of two or more")
    return list(files)


def _where() -> dict[str, str]:
    import onnxruntime
    import torch
    import transformers

    return {
        "date": datetime.date.today().isoformat(), "onnxruntime": onnxruntime.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(), "machine": platform.machine(),
    }  # fmt: skip


def describe(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [f"  {'check':<62}{'error':>10}{'tolerance':>11}"]
    for c in report["checks"]:
        verdict = "ok" if c["passed"] else "FAILED"
        lines.append(
            f"  {c['name']:<62}{c['error']:>10.1e}{('>' if c['must_fail'] else '') + format(c['tolerance'], '.0e'):>11}  {verdict}"
        )
    for target, s in report.get("selections", {"": report["selection"]}).items():
        if not s:
            continue
        overlap = f"overlap {s['mean_overlap']:.4f} on average, worst {s['worst_overlap']:.3f}"
        error = "unknown" if s["largest_score_error"] is None else f"{s['largest_score_error']:.1e}"
        which = f"{target}: " if target else ""
        lines.append(f"  {which}selection by {s['mode']}, keep {s['keep']}, {s['images']} images: {overlap}; score error {error}")
    failed = sum(not c["passed"] for c in report["checks"])
    lines.append(f"{len(report['checks']) - failed} passed, {failed} failed")
    return "\n".join(lines)


def _run(args: argparse.Namespace) -> int:
    from export.staging import storage_error
    from runtime.names import VERIFY_FILE
    from runtime.pipeline import load

    given = _folder_images(args.images) if args.images else None
    if args.save_inputs is not None:
        _check_save_inputs(args.save_inputs, args.bundle)
    model = load(args.bundle, backend="cpu")
    reference = _reference(model, args.checkpoint)
    images = given or synthetic_images(max(2, args.selection_images), reference.model.config.vision_config.image_size)
    report = verify_targets(model, reference, images, args.selection_images)
    print(describe(report))
    try:
        (args.bundle / VERIFY_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise storage_error(error, args.bundle / VERIFY_FILE) from error
    saved = args.save_inputs is None or _save_inputs(args.save_inputs, model, reference, images[0])
    if args.json:
        print(json.dumps(report))
    return 0 if report["passed"] and saved else FAILED


def _check_save_inputs(directory: Path, bundle: Path) -> None:
    """Says what is wrong with `--save-inputs` before time is spent on comparing."""
    from export.saved_inputs import SAVED_INPUTS, check_savable
    from export.staging import check_destination
    from runtime.errors import UsageError
    from runtime.manifest import read_manifest

    check_savable(read_manifest(bundle))
    if directory.resolve().is_relative_to(bundle.resolve()):
        raise UsageError(f"--save-inputs {directory} is inside the bundle, which holds nothing but its own files: name another directory")
    check_destination(directory, SAVED_INPUTS)


def _save_inputs(directory: Path, model: VisionLanguageModel, reference: EagerPrunedLlava, image: ImageSource) -> bool:
    """Saves one prompt's runs and prints what was written; whether the graphs, run here, are within all tolerances."""
    from export.graph_runs import graph_runs
    from export.saved_inputs import describe, save_runs

    runs = graph_runs(model.bundle, model.manifest, _prompt(model, [image]), reference)
    saved = save_runs(directory, model.bundle, model.manifest, runs)
    print(describe(saved, directory))
    return all(s.passed for s in saved)


def _reference(model: VisionLanguageModel, checkpoint: str | None) -> EagerPrunedLlava:
    from export.checkpoint import Checkpoint, find_checkpoint
    from export.configs import load_model_config
    from export.eager import EagerPrunedLlava
    from runtime.errors import UsageError

    manifest = model.manifest
    directory = find_checkpoint(checkpoint or load_model_config(manifest.model).default_checkpoint())
    if Checkpoint.open(directory).revision != manifest.source.revision:
        raise UsageError(
            f"{directory} is not what the bundle was made from ({manifest.source.checkpoint}): name that one with --checkpoint"
        )
    return EagerPrunedLlava(directory, manifest.split_layer, None, manifest.score_mode)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
