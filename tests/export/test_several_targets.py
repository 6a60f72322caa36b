"""One bundle for several targets: what they share, what each has of its own, and how a target is chosen."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from export import build, verify
from export.plan import BuildOptions, default_output, make_plan
from runtime import compile as compile_command
from runtime import inspect as inspect_command
from runtime.engine_files import CompileOptions, compile_bundle
from runtime.errors import BundleError, UsageError
from runtime.manifest import Manifest, check_files, read_manifest
from runtime.names import MANIFEST_FILE, REPORT_FILE
from runtime.pipeline import VisionLanguageModel, load
from tests.runtime.test_compile import FakeBuild
from tests.site import Refused, Site

GRAPHS = ["vision", "pre_ecl", "post_ecl", "score.4", "score.2"]


def options(checkpoint: Path, target: str, precision: str | None = None) -> BuildOptions:
    return BuildOptions(
        "llava15", target, checkpoint=str(checkpoint), keep=(4, 2), split_layer=2, max_context=128, precision=precision
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for cpu and rtx, without engines."""
    folder = tmp_path_factory.mktemp("several") / "both"
    build.build_bundle(make_plan(options(tiny_checkpoint, "cpu,rtx")), folder)
    return folder


@pytest.fixture
def bundle(both: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(both, tmp_path / "bundle"))


# ---------------------------------------------------------------- what is written


def test_targets_share_all_files_but_weights_and_graphs(both: Path) -> None:
    manifest = read_manifest(both)
    check_files(both, manifest)
    assert manifest.schema_version == 3
    assert manifest.targets == ("cpu", "rtx")
    assert {path.name for path in both.iterdir()} == {*manifest.files, MANIFEST_FILE, REPORT_FILE}
    assert [name for name in manifest.files if name.endswith(".bin")] == ["embed_tokens.fp32.bin", "weights.fp32.bin", "weights.fp16.bin"]
    cpu, rtx = map(manifest.variant, manifest.targets)
    assert (cpu.precision, cpu.kv_write, cpu.engine, cpu.weight_files) == ("fp32", "in_place", "onnxruntime", ("weights.fp32.bin",))
    assert (rtx.precision, rtx.kv_write, rtx.engine, rtx.weight_files) == ("fp16", "tensor_scatter", "tensorrt_rtx", ("weights.fp16.bin",))
    assert [graph.file for graph in cpu.graphs.values()] == [f"{name}.onnx" for name in GRAPHS]
    assert [graph.file for graph in rtx.graphs.values()] == [f"{name}.rtx.onnx" for name in GRAPHS]
    assert cpu.memory is not None
    assert rtx.memory is not None
    assert (cpu.memory.precision, rtx.memory.precision) == ("fp32", "fp16")


def test_each_targets_files_are_those_of_a_bundle_for_it_alone(both: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    manifest = read_manifest(both)
    for target in manifest.targets:
        alone = build.build_bundle(make_plan(options(tiny_checkpoint, target)), tmp_path / target)
        for name, graph in manifest.variant(target).graphs.items():
            assert manifest.files[graph.file] == alone.files[alone.graphs[name].file], name
        for name in manifest.variant(target).weight_files:
            assert manifest.files[name] == alone.files[name]


def test_equal_graphs_and_weights_are_written_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    manifest = build.build_bundle(make_plan(options(tiny_checkpoint, "rtx-30,rtx-40,jetson-orin")), tmp_path / "b")
    assert [name for name in manifest.files if name.startswith("weights")] == ["weights.fp16.bin"]
    rtx30, rtx40, orin = map(manifest.variant, manifest.targets)
    assert rtx30.graphs == rtx40.graphs
    assert orin.target == "jetson-agx-orin-64gb"
    own = {name for name, graph in orin.graphs.items() if graph != rtx30.graphs[name]}
    assert own == {"pre_ecl", "post_ecl"}, "the cache is written otherwise there"


def test_plan_report_and_dry_run_speak_of_all_targets(both: Path, site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    report = json.loads((both / REPORT_FILE).read_text(encoding="utf-8"))
    assert [(name, t["precision"], t["kv_write"]) for name, t in report["targets"].items()] == [
        ("cpu", "fp32", "in_place"), ("rtx", "fp16", "tensor_scatter")
    ]  # fmt: skip
    assert report["targets"]["rtx"]["memory"]["precision"] == "fp16"
    argv = site.build("--keep", "4", "--split-layer", "2", "--max-context", "128", "--target", "cpu,rtx,jetson-orin-nano-8gb", "--dry-run")
    assert build.main([*argv, "--device-memory", "12GB"]) == 0
    err = capfd.readouterr().err
    assert "memory on cpu in fp32, one image, --keep 4, --max-context 128; memory not known" in err
    assert "memory on rtx in fp16, one image, --keep 4, --max-context 128; memory 12 GiB (--device-memory)" in err
    assert "memory on jetson-orin-nano-8gb in fp16" in err
    assert "(targets cpu, rtx, jetson-orin-nano-8gb)" in err


def test_inspect_speaks_of_all_targets(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_command.main([str(both), "--json"]) == 0
    out = capsys.readouterr().out
    assert "target    rtx: tensorrt_rtx, fp16, the cache is written by tensor_scatter\n" in out
    assert "Memory on cpu, one" in out
    assert "Memory on rtx, one" in out
    assert "  pre_ecl  (pre_ecl.rtx.onnx)" in out
    found = json.loads(out.splitlines()[-1])
    assert found["memory_of_others"]["rtx"][0]["kv_post_bytes"] == found["memory_of_others"]["rtx"][1]["kv_post_bytes"], "one length"


def test_a_bundle_takes_space_for_every_precision_and_engine(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (make_plan(options(tiny_checkpoint, target)).bytes_to_write for target in ("cpu", "cpu,rtx"))
    plan = make_plan(options(tiny_checkpoint, "cpu,rtx"))
    half = sum(plan.each()[1].memory.bytes_of(f"weights, {name}") for name in ("vision", "pre_ecl", "post_ecl"))
    assert half * 0.9 < two - one < half
    usage = shutil.disk_usage(tiny_checkpoint)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(two * 1.1)))
    with pytest.raises(OSError, match=r"has 0\.00 GB free, the bundle needs 0\.00 GB: free some space"):
        build._check_space(plan, tiny_checkpoint / "b")
    build._check_space(make_plan(options(tiny_checkpoint, "cpu,jetson-orin")), tiny_checkpoint / "b")


# ---------------------------------------------------------------- choosing


def test_a_variant_is_a_manifest_of_its_own_and_an_unknown_one_is_refused(both: Path) -> None:
    manifest = read_manifest(both)
    rtx = manifest.variant("rtx")
    assert (rtx.target, rtx.targets, rtx.files) == ("rtx", ("rtx",), manifest.files)
    assert manifest.variant("cpu").graphs == manifest.graphs
    alone = manifest.variant("cpu")
    assert alone.variant("cpu") is alone
    with pytest.raises(UsageError, match="the bundle was not built for target 'rtx-50': choose cpu or rtx, or export it again"):
        manifest.variant("rtx-50")


def test_an_engine_gets_the_target_that_was_made_for_it(both: Path, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def chosen(manifest: Manifest) -> dict[str, str | None]:
        found = {engine: manifest.for_engine(engine) for engine in ("onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt_rtx")}
        return {engine: None if m is None else m.target for engine, m in found.items()}

    assert chosen(read_manifest(both)) == {"onnxruntime": "cpu", "onnxruntime-cuda": "rtx", "tensorrt": None, "tensorrt_rtx": "rtx"}
    plain = {"onnxruntime": "cpu", "onnxruntime-cuda": "cpu", "tensorrt": None, "tensorrt_rtx": None}
    assert chosen(read_manifest(tiny_bundle)) == plain
    orin = build.build_bundle(make_plan(options(tiny_checkpoint, "jetson-orin", "bf16")), tmp_path / "orin")
    assert chosen(orin) == {"onnxruntime": None, "onnxruntime-cuda": None, "tensorrt": "jetson-agx-orin-64gb", "tensorrt_rtx": None}
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "compiled"))
    compile_bundle(bundle, CompileOptions("tensorrt_rtx", (86,)), build=FakeBuild(bundle))
    assert chosen(read_manifest(bundle)) == {**plain, "tensorrt_rtx": "cpu"}, "it has engines of it"
    with pytest.raises(UsageError, match="unknown engine 'tpu': choose one of onnxruntime, onnxruntime-cuda, tensorrt, tensorrt_rtx"):
        read_manifest(both).for_engine("tpu")


def test_load_takes_the_first_target_and_the_others_answer_alike(both: Path) -> None:
    model, manifest = load(both), read_manifest(both)
    assert model.manifest.target == "cpu"
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    rtx = VisionLanguageModel(both, manifest.variant("rtx"))
    expected, actual = (m.generate("what?", images=[image], max_new_tokens=8).token_ids for m in (model, rtx))
    assert list(actual) == list(expected)


def test_verify_compares_every_target(bundle: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify.main([str(bundle), "--checkpoint", str(tiny_checkpoint), "--selection-images", "2", "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_target = {target: [c for c in report["checks"] if c["name"].startswith(f"{target}: ")] for target in ("cpu", "rtx")}
    assert [len(checks) for checks in by_target.values()] == [len(report["checks"]) // 2] * 2
    # random weights: in fp16 one of many near ties may turn, and what is decoded after it
    ladder = [c for c in report["checks"] if not any(word in c["name"] for word in ("selection", "greedy", "after decoding"))]
    assert all(c["passed"] for c in ladder), [c for c in ladder if not c["passed"]]
    assert report["bundle"]["manifest_sha256"] == read_manifest(bundle).export_sha256()


# ---------------------------------------------------------------- compiling


def test_engines_enter_the_target_that_the_library_is_for(bundle: Path) -> None:
    exported, fake = read_manifest(bundle).export_sha256(), FakeBuild(bundle, manifest=lambda m: m.variant("rtx"))
    compile_bundle(bundle, CompileOptions("tensorrt_rtx", (86,)), build=fake)
    manifest = read_manifest(bundle)
    assert manifest.engines == ()
    assert [engine.graph for engine in manifest.variant("rtx").engines] == GRAPHS
    assert [Path(spec.onnx).name for spec in fake.specs] == [f"{name}.rtx.onnx" for name in GRAPHS]
    check_files(bundle, manifest)
    assert manifest.export_sha256() == exported
    compile_bundle(bundle, CompileOptions("tensorrt_rtx", (86,), target="cpu"), build=FakeBuild(bundle, "other"))
    both = read_manifest(bundle)
    assert len(both.engines) == 5
    assert both.variant("rtx").engines == manifest.variant("rtx").engines, "the other target keeps its engines"
    check_files(bundle, both)


def test_two_targets_may_have_the_same_engine_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    build.build_bundle(make_plan(options(tiny_checkpoint, "rtx-30,rtx-40")), bundle)
    for target in ("rtx-30", "rtx-40"):
        compile_bundle(bundle, CompileOptions("tensorrt_rtx", (86, 89), target=target), build=FakeBuild(bundle))
    manifest = read_manifest(bundle)
    assert manifest.engines == manifest.variant("rtx-40").engines
    compile_bundle(bundle, CompileOptions("tensorrt_rtx", (86, 89), target="rtx-30"), build=FakeBuild(bundle, "anew"))
    check_files(bundle, read_manifest(bundle))


def test_a_target_that_the_bundle_has_not_is_refused_before_anything_is_built(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = hashlib.sha256((bundle / MANIFEST_FILE).read_bytes()).hexdigest()
    assert compile_command.main([str(bundle), "--target", "jetson-orin"]) == 2
    assert "was not built for target 'jetson-orin': choose cpu or rtx" in capfd.readouterr().err
    assert hashlib.sha256((bundle / MANIFEST_FILE).read_bytes()).hexdigest() == before


# ---------------------------------------------------------------- options


def test_a_bundle_of_several_is_called_after_all_of_them() -> None:
    assert str(default_output(BuildOptions("tiny-llava", "cpu, rtx"))) == "bundles/tiny-llava-cpu-rtx"
    assert str(default_output(BuildOptions("tiny-llava", "rtx"))) == "bundles/tiny-llava-rtx"


def test_precisions_go_to_the_targets_in_order(tiny_checkpoint: Path) -> None:
    plan = make_plan(options(tiny_checkpoint, "cpu,rtx,rtx-50", "fp32,bf16,fp16"))
    assert [one.precision for one in plan.each()] == ["fp32", "bf16", "fp16"]
    assert [one.precision for one in make_plan(options(tiny_checkpoint, "cpu,rtx", "fp32")).each()] == ["fp32", "fp32"]


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--target", "cpu,rtx,cpu"], "--target cpu,rtx,cpu names cpu twice: name each target once"),
     (["--target", "jetson-orin,jetson-agx-orin-64gb"], "names jetson-agx-orin-64gb twice"),
     (["--target", "cpu,"], "unknown target '': --target takes cpu, "),
     (["--target", "cpu,rtx", "--precision", "fp16"], "--precision fp16 is not offered for target cpu: choose one of fp32"),
     (["--target", "cpu,rtx", "--precision", "fp32,fp16,fp16"], "--precision fp32,fp16,fp16 has 3 for 2 targets: give one for each"),
     (["--target", "cpu,rtx", "--device-memory", "600MB"], "needs .* GB, and rtx has .* GB for it"),
     (["--target", "jetson-orin,jetson-thor", "--device-memory", "16GB"], "does not go with target jetson-agx-orin-64gb"),
     (["--target", "cpu,rtx", "--precision", "fp32,int4"], "building int4 is not implemented yet")],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(more: list[str], message: str, refused: Refused) -> None:
    refused(build, refused.site.build("--keep", "4", "--split-layer", "2", "--max-context", "128", *more), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rtx": {"engine": "tpu"}}, "unknown engine 'tpu'"),
     ({"rtx": {"graphs": {}}}, r"no score graph for the budgets \[4, 2\]"),
     ({"rtx": {"precision": 3}}, "variants: rtx: precision: 3 has the wrong type")],
)  # fmt: skip
def test_a_malformed_variant_is_refused(change: dict[str, dict[str, object]], message: str, bundle: Path) -> None:
    raw = json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    for target, entries in change.items():
        raw["variants"][target].update(entries)
    (bundle / MANIFEST_FILE).write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        read_manifest(bundle)


def test_a_target_cannot_be_there_twice(both: Path) -> None:
    manifest = read_manifest(both)
    with pytest.raises(BundleError, match="the target 'cpu' is there twice"):
        dataclasses.replace(manifest, variants={"cpu": manifest.variants["rtx"]})
