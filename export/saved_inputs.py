"""A bundle's graph runs as Polygraphy's own files, and the `polygraphy run` lines that repeat each comparison on any machine.

    DIR/README.txt                  what this is, and the lines
    DIR/saved.json                  runs, sources, tolerances; it names all that the directory holds
    DIR/no_tf32.py                  given to Polygraphy, so that float32 products are not rounded
    DIR/RUN.inputs.json             [{input: array}], for --load-inputs
    DIR/RUN.outputs.json            RunResults of what is expected, for --load-outputs

The directory is written whole or not at all, and only over an earlier one of its kind.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from export.graph_runs import GraphRun
from export.staging import Kind, staged
from runtime.engine_info import Profile, ShapeRange
from runtime.engines.tensorrt_profiles import ProfileOptions, profiles_of
from runtime.errors import UsageError
from runtime.manifest import Manifest
from runtime.names import PAST

INDEX_FILE: Final = "saved.json"
README_FILE: Final = "README.txt"
CONFIG_FILE: Final = "no_tf32.py"
CONFIG: Final = '''\
"""Read by `polygraphy run --trt-config-postprocess-script`: float32 products are not rounded to TF32.

Polygraphy sees to that with TensorRT; with TensorRT for RTX it leaves the library's default, which rounds.
"""

import importlib

import polygraphy.config


def postprocess_config(builder, network, config):
    library = importlib.import_module("tensorrt_rtx" if polygraphy.config.USE_TENSORRT_RTX else "tensorrt")
    config.clear_flag(library.BuilderFlag.TF32)
'''
BUNDLE_VARIABLE: Final = "$BUNDLE"
README: Final = """\
Inputs and expected outputs of every graph of a bundle, in Polygraphy's formats
===============================================================================
Bundle: {bundle}: {model} for {target}, {precision}, split before layer {split}, budgets {budgets}
Written {created} by python -m export.verify --save-inputs; Polygraphy {polygraphy}, ONNX Runtime {onnxruntime}.

Each line runs one graph on saved inputs of a real prompt and compares every output with the saved one; exit status 0: within tolerance.
Run them in this directory, in a shell, after

  export BUNDLE=DIR ORT_DISABLE_TELEMETRY=1

where DIR is the bundle. All of one kind, stopping at the first that fails:

  grep '^polygraphy.* --onnxrt ' README.txt | sh -e      ONNX Runtime, on the CPU
  grep '^polygraphy.* --trt ' README.txt | sh -e         TensorRT, on a device
  export POLYGRAPHY_USE_TENSORRT_RTX=1                   before the same lines: TensorRT for RTX

Expected: outputs of vision, pre_ecl and post_ecl are those of eager transformers in float32, computed from the checkpoint without any of
these graphs; of score those of ONNX Runtime on the CPU. Tolerances (export/tolerances.py) are absolute for each output: the relative one
of the table times the largest value expected. Kept tokens have to be the same; where a device keeps others while token_entropy agrees,
two tokens were within {swap:.0e} of each other. A line with --trt builds an engine of its own for one profile of
runtime/engines/tensorrt_profiles.py, with the saved caches' length, and without TF32 ({config}); the engines of runtime.compile, which may
use it outside score, are not read.
"""


@dataclass(frozen=True, slots=True)
class Saved:
    """One run as written, and how far ONNX Runtime on this machine's CPU is from what is expected: the worst share of its tolerance."""

    name: str
    graph: str
    source: str
    tolerances: dict[str, float]
    passed: bool
    worst_output: str
    worst_share: float


def check_savable(manifest: Manifest) -> None:
    """Raises UsageError where a bundle's arrays cannot be written."""
    if any(tensor.dtype == "bfloat16" for graph in manifest.graphs.values() for tensor in graph.inputs):
        raise UsageError(
            "--save-inputs cannot write bfloat16: numpy, which Polygraphy's files hold, has no such type, and ONNX Runtime runs none on a "
            "CPU; export the same checkpoint with --precision fp32 or fp16 and save that bundle's inputs"
        )


def _own_files(directory: Path) -> set[str] | None:
    try:
        raw = json.loads((directory / INDEX_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    files = raw.get("files") if isinstance(raw, dict) else None
    return {str(name) for name in files} | {INDEX_FILE} if isinstance(files, list) else None


SAVED_INPUTS = Kind("directory of saved inputs", _own_files, "--save-inputs")


def save_runs(
    directory: Path, bundle: Path, manifest: Manifest, runs: Iterable[GraphRun], progress: Callable[[str], None] = lambda _: None
) -> list[Saved]:
    """Writes all runs, one after the other, and moves the directory into place.

    Args:
        progress: hears each run's name when it is written.

    Raises:
        BundleExistsError: `directory` holds something else.
        StorageError: it cannot be written.
    """
    saved: list[Saved] = []
    blocks: list[str] = []
    with staged(directory, SAVED_INPUTS) as place:
        for run in runs:
            _write_arrays(place, run)
            saved.append(_compared(run))
            blocks.append("\n".join([f"# {run.name}: expected by {run.source}", *lines_of(manifest, run)]))
            progress(run.name)
        head = README.format(**_head(bundle, manifest))
        (place / CONFIG_FILE).write_text(CONFIG, encoding="utf-8")
        (place / README_FILE).write_text("\n".join([head, *(f"{block}\n" for block in blocks)]), encoding="utf-8")
        index = {
            "files": sorted(path.name for path in place.iterdir()), "manifest_sha256": manifest.export_sha256(),
            "runs": [{"name": s.name, "graph": s.graph, "source": s.source, "tolerances": s.tolerances} for s in saved],
        }  # fmt: skip
        (place / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return saved


def _head(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    import datetime

    import onnxruntime
    import polygraphy

    from export.tolerances import MAX_SWAP_DISTANCE

    return {
        "bundle": bundle.resolve().name, "model": manifest.model, "target": manifest.target, "precision": manifest.precision,
        "split": manifest.split_layer, "budgets": ", ".join(map(str, manifest.budgets)), "created": datetime.date.today().isoformat(),
        "polygraphy": polygraphy.__version__, "onnxruntime": onnxruntime.__version__, "swap": MAX_SWAP_DISTANCE, "config": CONFIG_FILE,
    }  # fmt: skip


def _write_arrays(place: Path, run: GraphRun) -> None:
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        save_json([run.inputs], str(place / f"{run.name}.inputs.json"))
        results = RunResults()
        results.add([run.outputs], runner_name=run.source)
        results.save(str(place / f"{run.name}.outputs.json"))


def _compared(run: GraphRun) -> Saved:
    """The comparison that the lines make, with Polygraphy's own comparator, on what was run here."""
    from polygraphy.comparator import IterationResult, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(all="ignore"):  # it divides by expected zeros, for a figure not used here
        compare = SimpleCompareFunc(atol=run.tolerances, rtol=0.0)
        found = compare(IterationResult(run.actual, runner_name="here"), IterationResult(run.outputs, runner_name=run.source))
    shares = {name: result.max_absdiff / max(run.tolerances[name], 1e-30) for name, result in found.items()}
    worst = max(shares, key=lambda name: shares[name])
    return Saved(run.name, run.graph, run.source, run.tolerances, all(found.values()), worst, shares[worst])


# ---------------------------------------------------------------- the lines


def lines_of(manifest: Manifest, run: GraphRun) -> Iterator[str]:
    """The shell lines that compare one run: with ONNX Runtime, and with TensorRT."""
    tolerances = [f"{name}:{value:.4g}" for name, value in run.tolerances.items()]
    files = ["--load-inputs", f"{run.name}.inputs.json", "--load-outputs", f"{run.name}.outputs.json"]
    checks = ["--validate", "--rtol", "0", "--atol", *tolerances]
    graph = f'"{BUNDLE_VARIABLE}"/{shlex.quote(manifest.graphs[run.graph].file)}'
    for runner in (["--onnxrt"], ["--trt", "--strongly-typed", "--trt-config-postprocess-script", CONFIG_FILE, *_shapes(manifest, run)]):
        yield f"polygraphy run {graph} {shlex.join([*runner, *files, *checks])}"


def _shapes(manifest: Manifest, run: GraphRun) -> list[str]:
    """The shapes of the profile that the run belongs to."""
    profile = run_profile(manifest, run)
    if profile is None:
        return []
    arguments: list[str] = []
    for option, side in (("min", "minimum"), ("opt", "optimum"), ("max", "maximum")):
        shapes = [f"{name}:[{','.join(map(str, getattr(shape, side)))}]" for name, shape in profile.shapes.items()]
        arguments += [f"--trt-{option}-shapes", *shapes]
    return arguments


def run_profile(manifest: Manifest, run: GraphRun) -> Profile | None:
    """The profile of `runtime.compile` for a run, with the saved caches' length; None where all of the graph's sizes are fixed.

    It is widened where the saved prompt is longer than the profile's longest one.
    """
    capacity = next((array.shape[2] for name, array in run.inputs.items() if name.startswith(PAST)), None)
    profiles = profiles_of(manifest, run.graph, ProfileOptions(capacity=capacity))
    profile = next((p for p in profiles if p.name == run.profile), None)
    if profile is None:
        return None
    return Profile(profile.name, {name: _widened(shape, run.inputs[name].shape) for name, shape in profile.shapes.items()})


def _widened(shape: ShapeRange, actual: tuple[int, ...]) -> ShapeRange:
    smallest = tuple(map(min, shape.minimum, actual))
    return ShapeRange(smallest, shape.optimum, tuple(map(max, shape.maximum, actual)))


def describe(saved: Iterable[Saved], directory: Path) -> str:
    """What was written, as a table."""
    lines = [f"  {'saved for Polygraphy':<22}{'expected by':<26}{'worst output here':<30}{'of its tolerance':>17}"]
    for s in saved:
        share = f"{s.worst_share:.1%}" if s.passed else "FAILED"
        lines.append(f"  {s.name:<22}{s.source:<26}{s.worst_output:<30}{share:>17}")
    return "\n".join([*lines, f"written: {directory}; its {README_FILE} has the lines that repeat each comparison, here and on a device"])


def variables(bundle: Path) -> Mapping[str, str]:
    """What the lines need in their environment."""
    return {BUNDLE_VARIABLE.removeprefix("$"): str(bundle)}
