"""The memory plan: exact where shapes decide, never smaller for more; what does not fit is refused with what would."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest

from export import build, memory, writer
from export.configs import list_targets, load_model_config, load_target_config
from export.memory_plan import (
    CONTEXT,
    ENGINE_SCRATCH,
    POST_CACHE,
    PRE_CACHE,
    TABLE,
    MemoryRequest,
    fitting_precisions,
    graph_weights,
    half_activations,
    largest_context,
    largest_keep,
    misfit,
    plan_memory,
    stored_bytes,
)
from export.plan import BuildOptions, make_plan
from export.spec import GRAPH_DTYPES, ModelSpec
from runtime import names
from runtime.errors import UsageError
from runtime.manifest import read_manifest
from runtime.memory_plan import ACTIVATIONS, ASSUMED, BESIDE, DEVICE, ESTIMATED, EXACT, HOST, SHARED, WEIGHTS
from runtime.pipeline import load
from tests.models import tiny_llava_checkpoint
from tests.site import Refused, Site


def seven_b() -> ModelSpec:
    spec = load_model_config("llava15").spec
    assert spec is not None
    return spec


def request(target: str = "jetson-orin", precision: str = "fp16", size: str | None = None, **changes: Any) -> MemoryRequest:
    chip = load_target_config(target) if size is None else load_target_config(target).with_memory(size)
    return dataclasses.replace(MemoryRequest(seven_b(), chip, precision, 2, 166, 2048), **changes)


def options(checkpoint: Path, **more: Any) -> BuildOptions:
    settled: dict[str, Any] = {"keep": (4, 2), "split_layer": 2, "max_context": 512} | more
    return BuildOptions("llava15", checkpoint=str(checkpoint), **settled)


# ---------------------------------------------------------------- exact: weights and caches


def external_bytes(graph: Path) -> int:
    """Bytes of the weights that a graph file refers to."""
    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    return sum(int(entry.value) for tensor in tensors for entry in tensor.external_data if entry.key == "length")


def test_weights_are_those_of_the_exported_graphs(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    plan = make_plan(options(tiny_checkpoint))
    expected = {name: external_bytes(tiny_bundle / f"{name}.onnx") for name in ("vision", "pre_ecl", "post_ecl")}
    assert graph_weights(plan.memory_request) == expected
    assert plan.memory.bytes_of(TABLE) == (tiny_bundle / writer.EMBEDDING_FILE).stat().st_size


@pytest.mark.parametrize("shape", [{"tied": True}, {"kv_heads": 2, "attention_bias": True}, {"projector_bias": False, "strategy": "full"}])
def test_weights_are_exact_for_other_shapes_too(shape: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = tiny_llava_checkpoint(tmp_path / "checkpoint", **shape)
    plan = make_plan(options(checkpoint, keep=(2,), split_layer=1))
    build.build_bundle(plan, tmp_path / "bundle")
    for name, size in graph_weights(plan.memory_request).items():
        assert size == external_bytes(tmp_path / "bundle" / f"{name}.onnx"), name


def test_the_7b_in_fp16_is_as_large_as_it_is_published(model_configs: Path) -> None:
    index = json.loads((model_configs / "llava-1.5-7b-hf" / "model.safetensors.index.json").read_text())
    vision = seven_b().vision
    width, wide = vision.hidden_size, vision.intermediate_size
    unused = 4 * (width * width + width) + 2 * width * wide + wide + width + 4 * width + 2 * width  # the tower's last layer and norm
    assert stored_bytes(seven_b(), "fp16") + 2 * unused == index["metadata"]["total_size"]


def test_bytes_a_weight_are_those_of_the_precision() -> None:
    sizes = {p: graph_weights(request("rtx-40", p))[names.POST_ECL] for p in ("fp32", "fp16", "bf16", "int8", "int4")}
    decoder = seven_b().decoder
    matrices = 30 * (4 * decoder.hidden_size**2 + 3 * decoder.hidden_size * decoder.intermediate_size)
    assert sizes["fp16"] == sizes["bf16"]
    assert sizes["fp16"] - sizes["int4"] == matrices * 2 - matrices * 0.515625
    assert sizes["fp32"] / sizes["fp16"] == pytest.approx(2, abs=1e-3)
    assert sizes["int8"] / matrices == pytest.approx(1.04, abs=0.01)  # the head stays fp16


@pytest.mark.parametrize(("keep", "context"), [(4, 512), (2, 512), (4, 200), (16, 512)])
def test_caches_are_as_large_as_the_runtimes_buffers(tiny_bundle: Path, tiny_checkpoint: Path, keep: int, context: int) -> None:
    plan = make_plan(options(tiny_checkpoint, keep=(keep,), max_context=context)).memory
    conversation = load(tiny_bundle).chain.new_conversation(context, context - (16 - keep))
    assert (plan.bytes_of(PRE_CACHE), plan.bytes_of(POST_CACHE)) == (conversation.pre.nbytes, conversation.post.nbytes)


# ---------------------------------------------------------------- the rest


def test_every_row_says_how_it_is_known() -> None:
    basis = {item.name: item.basis for item in plan_memory(request()).items}
    assert {basis[WEIGHTS.format(name)] for name in ("vision", "pre_ecl", "post_ecl")} == {EXACT}
    assert {basis[PRE_CACHE], basis[POST_CACHE], basis[TABLE]} == {EXACT}
    assert {basis[ACTIVATIONS.format(name)] for name in ("vision", "pre_ecl", "score", "post_ecl")} == {ESTIMATED}
    assert (basis[BESIDE], basis[CONTEXT]) == (ESTIMATED, ASSUMED)


@pytest.mark.parametrize("name", list_targets())
def test_every_target_and_precision_has_a_plan(name: str) -> None:
    target = load_target_config(name)
    for precision in target.precisions:
        plan = plan_memory(request(name, precision))
        counted = sum(item.bytes for item in plan.items if item.place == DEVICE or (target.unified and item.place == HOST))
        assert plan.total_bytes == counted + max((item.bytes for item in plan.items if item.place == SHARED), default=0)
        assert (plan.shared_bytes > 0) == target.engine.startswith("tensorrt"), "compiled engines run in one buffer"
        assert plan.fits == (None if target.memory_bytes is None else plan.total_bytes <= target.memory_bytes - target.reserve_bytes)


def test_unified_memory_holds_the_hosts_side_too() -> None:
    card, module = plan_memory(request("rtx")), plan_memory(request("dgx-spark"))
    assert card.host_bytes == module.host_bytes > 0
    assert (card.total_bytes, module.total_bytes) == (card.device_bytes, module.device_bytes + module.host_bytes)


def test_attention_that_is_not_fused_keeps_its_scores() -> None:
    """As TensorRT for RTX does: neither fp32 is fused, nor heads that share keys and values."""

    def prefill(precision: str = "fp16", kv_heads: int = 32) -> int:
        spec = seven_b()
        spec = dataclasses.replace(spec, decoder=dataclasses.replace(spec.decoder, kv_heads=kv_heads))
        return plan_memory(request("rtx", precision, spec=spec)).bytes_of(ACTIVATIONS.format("pre_ecl"))

    scores = 2 * 32 * 832 * 2048  # and their softmax; 576 visual tokens and 256 of text run in one piece
    assert prefill() < 2 * scores
    assert prefill(kv_heads=8) > 2 * scores
    assert prefill("fp32") > 4 * scores
    assert plan_memory(request("cpu", "fp32")).bytes_of(ACTIVATIONS.format("pre_ecl")) > 8 * 32 * 2048 * 2048


@pytest.mark.parametrize(
    ("half", "rows", "append", "logged"),
    [
        ("pre_ecl", 230, False, 47_277_568), ("pre_ecl", 832, False, 88_432_640), ("pre_ecl", 2048, False, 208_306_176),
        ("post_ecl", 230, False, 43_345_408), ("post_ecl", 832, False, 82_960_384), ("post_ecl", 2048, False, 204_210_176),
        ("pre_ecl", 230, True, 57_313_280), ("pre_ecl", 832, True, 114_556_928), ("pre_ecl", 2048, True, 255_803_392),
        ("post_ecl", 230, True, 50_841_600), ("post_ecl", 832, True, 104_316_928), ("post_ecl", 2048, True, 236_978_176),
    ],
)  # fmt: skip
def test_activations_are_within_10_percent_of_what_was_logged_at_7b_widths(half: str, rows: int, append: bool, logged: int) -> None:
    """Logged by TensorRT for RTX 1.7.1 for a cache of 2048: `python -m benchmarks.engine_memory` builds them again."""
    scratch = ENGINE_SCRATCH if half == "pre_ecl" else ENGINE_SCRATCH // 2
    estimate = half_activations(seven_b().decoder, rows, 2048, 2, fused=True, append=append, scratch=scratch)
    assert estimate == pytest.approx(logged, rel=0.1)


def test_more_never_takes_less() -> None:
    def total(**changes: Any) -> int:
        return plan_memory(request(**changes)).total_bytes

    def on_cpu(**changes: Any) -> int:
        return total(target="cpu", precision="fp32", **changes)

    keeps, contexts = [on_cpu(keep=k) for k in (1, 64, 166, 400, 576)], [total(max_context=c) for c in (600, 700, 2048, 4096)]
    assert keeps == sorted(keeps)
    assert contexts == sorted(contexts)
    assert len(set(keeps)) == len(keeps)
    assert total(keep=1) == total(keep=576), "engines take caches of one length, the whole context"
    assert total(precision="int4") < total(precision="int8") < total(precision="fp16")
    assert on_cpu(split_layer=1) < on_cpu(split_layer=16)


def test_making_a_bundle_has_peaks_of_its_own() -> None:
    here, nothing = plan_memory(request("rtx")), plan_memory(request("cpu", "fp32"))
    assert nothing.compile_peak_bytes == 0
    assert here.compile_peak_bytes == pytest.approx(2.6 * here.bytes_of(WEIGHTS.format("post_ecl")), rel=0.02)
    assert here.export_peak_bytes == nothing.export_peak_bytes == pytest.approx(1.4e9, rel=0.02)  # 2.5 times the 7B's token table


def test_the_allocation_that_failed_on_an_orin_nano_is_above_its_limit_and_is_split() -> None:
    """Cosmos-Reason2-2B: a head of 151936 x 2048 in fp16."""
    decoder = dataclasses.replace(seven_b().decoder, vocab_size=151936, hidden_size=2048)
    spec = dataclasses.replace(seven_b(), decoder=decoder)
    large, nano = (plan_memory(request(name, "int4", spec=spec)) for name in ("jetson-orin", "jetson-orin-nano-8gb"))
    assert nano.max_allocation_bytes is not None
    assert large.largest_allocation_bytes == pytest.approx(1_075_072_515, rel=0.01)
    assert large.largest_allocation_bytes > nano.max_allocation_bytes > nano.largest_allocation_bytes
    assert (large.head_pieces, nano.head_pieces) == (1, 2)


# ---------------------------------------------------------------- what would fit


def test_the_largest_choices_fit_and_the_next_ones_do_not() -> None:
    asked = request("jetson-orin-nano-8gb", "int4", keep=576, max_context=3000)
    assert plan_memory(asked).fits is False
    context = largest_context(asked)
    assert context is not None
    assert plan_memory(dataclasses.replace(asked, max_context=context)).fits is True
    assert plan_memory(dataclasses.replace(asked, max_context=context + 1)).fits is False
    asked = request("cpu", "fp32", "40GB", keep=576, max_context=4096)
    keep = largest_keep(asked)
    assert keep is not None
    assert plan_memory(dataclasses.replace(asked, keep=keep)).fits is True
    assert plan_memory(dataclasses.replace(asked, keep=keep + 1)).fits is False


def test_where_all_fits_the_models_own_limits_are_the_largest() -> None:
    assert (largest_keep(request()), largest_context(request())) == (576, 4096)
    assert fitting_precisions(request()) == ("fp16", "bf16", "int8", "int4")
    assert misfit(request(), "llava15") is None
    assert misfit(request("cpu", "fp32"), "llava15") is None  # memory not known


@pytest.mark.parametrize(
    ("asked", "advice"),
    [
        (request("jetson-orin-nano-8gb"), r"what fits: --precision int4 \(in fp16 no --keep and no --max-context does\)$"),
        (request("jetson-orin-nx-16gb"), r"what fits: --precision int8 or int4 \(in fp16 no --keep and no --max-context does\)$"),
        (request("cpu", "fp32", "40GB", keep=576, max_context=4096), r"what fits: --keep up to \d+, or --max-context up to \d+$"),
        (
            request("rtx", size="6GB"),
            r"what fits: --precision int4 with --keep 166 and --max-context up to \d+$",
        ),
        (
            request("rtx", size="3GB"),
            "nothing of this model fits: choose a device with more memory$",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_what_does(asked: MemoryRequest, advice: str) -> None:
    line = misfit(asked, "llava15")
    assert line is not None
    assert re.search(advice, line), line
    assert "\n" not in line
    asked_for = rf"llava15 in {asked.precision} with --keep {asked.keep} and --max-context {asked.max_context}"
    has = rf"needs [\d.]+ GB, and {asked.target.name} has [\d.]+ GB for it \([\d.]+ GiB less [\d.]+ GiB for the system\): "
    assert re.match(f"{asked_for} {has}", line), line


def test_advice_is_true() -> None:
    asked = request("rtx", size="6GB")
    found = re.search(r"--precision (\w+) with --keep (\d+) and --max-context up to (\d+)", misfit(asked, "llava15") or "")
    assert found is not None
    better = dataclasses.replace(asked, precision=found[1], keep=int(found[2]), max_context=int(found[3]))
    assert plan_memory(better).fits is True
    assert plan_memory(dataclasses.replace(better, max_context=better.max_context + 1)).fits is False


# ---------------------------------------------------------------- a build


def test_report_and_manifest_hold_the_plan(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    expected = make_plan(options(tiny_checkpoint)).memory
    assert read_manifest(tiny_bundle).memory == expected
    report = json.loads((tiny_bundle / names.REPORT_FILE).read_text())["memory"]
    assert (report["total_bytes"], report["fits"], report["keep"]) == (expected.total_bytes, None, 4)
    assert [item["name"] for item in report["items"]] == [item.name for item in expected.items]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--target", "jetson-orin", "--precision", "int4"],
            "building int4 is not implemented yet: choose --precision fp32, fp16, bf16 where the target has it",
        ),
        (
            ["--target", "rtx", "--precision", "int8"],
            "building int8 is not implemented yet: .*--dry-run prints plan and memory",
        ),
        (
            ["--target", "jetson-orin", "--precision", "fp8"],
            "--precision fp8 is not offered for target jetson-agx-orin-64gb: choose one of fp16, bf16",
        ),
        (["--target", "jetson-thor", "--device-memory", "64GB"], "--device-memory 64GB does not go with target jetson-thor"),
        (["--device-memory", "lots"], "--device-memory 'lots' is not a size"),
        (["--device-memory", "1040MB"], r"llava15 in fp32 with --keep 2 and .* cpu has 0.02 GB for it .*: nothing of this model fits"),
    ],
)
def test_what_cannot_be_built_is_refused_with_one_line(site: Site, refused: Refused, more: list[str], message: str) -> None:
    refused(build, site.build("--keep", "2", *more), message)


def test_the_function_refuses_as_the_command_does(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not implemented yet"):
        build.build_bundle(make_plan(options(tiny_checkpoint, target="rtx", precision="int4")), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", list_targets())
def test_a_dry_run_prints_plan_and_memory_for_every_target(name: str, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for precision in load_target_config(name).precisions:
        argv = ["--model", "llava15", "--checkpoint", str(tiny_checkpoint), "--keep", "4", "--target", name, "--precision", precision]
        assert build.main([*argv, "--dry-run"]) == 0
        told = capsys.readouterr()
        assert told.out.splitlines()[-1] == "dry run: nothing was written"
        assert (precision in GRAPH_DTYPES) != ("is not implemented yet" in told.out)
        assert f"in {precision}, one image, --keep 4" in told.err
        assert all(line.startswith("  ") for line in told.err.splitlines())


# ---------------------------------------------------------------- the command


def test_the_command_needs_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "llava15", "--target", "jetson-orin-nano-8gb", "--precision", "int4", "--json"]
    assert memory.main(argv) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    plan = plan_memory(request("jetson-orin-nano-8gb", "int4"))
    assert (found["total_bytes"], found["fits"], found["misfit"], found["keep"]) == (plan.total_bytes, True, None, 166)
    for words in (
        "weights, post_ecl",
        "KV cache after the split",
        "fits, ",
        "peak while compiling on the device",
        "MORE than the target has",
    ):
        assert words in out


def test_the_command_says_what_does_not_fit_and_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main(["--model", "llava15", "--target", "jetson-orin-nano-8gb"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("DOES NOT FIT: 9.4 GB too much" in line for line in lines)
    assert lines[-1] == misfit(request("jetson-orin-nano-8gb"), "llava15")


def test_the_command_takes_a_shipped_checkpoints_shapes_and_the_builds_options(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "tiny-llava", "--split-layer", "3", "--keep", "8", "--max-context", "256", "--json"]
    assert memory.main([*argv, "--device-memory", "2GB"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["keep"], found["max_context"], found["fits"], found["available_bytes"]) == (8, 256, True, 1 << 30)


def test_all_is_a_table_of_the_jetsons(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main(["--model", "llava15", "--all", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[3:-1]]
    assert len(rows) == 6 * 3
    assert {row[0] for row in rows} == {name for name in list_targets() if name.startswith("jetson") and name != "jetson-orin"}
    answer = {(row[0], row[1]): row[4] for row in rows}
    assert answer["jetson-orin-nano-8gb", "fp16"] == "no"
    assert answer["jetson-orin-nano-8gb", "int4"] == answer["jetson-agx-orin-32gb", "fp16"] == "yes"
    for row, found in zip(rows, json.loads(lines[-1])["rows"], strict=True):
        assert row[6] == ("none" if found["largest_context"] is None else str(found["largest_context"]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "llava15", "--target", "jetson"], r"unknown target 'jetson': did you mean jetson-"),
        (["--model", "llava15", "--precision", "fp16"], "--precision fp16 is not offered for target cpu: choose one of fp32"),
        (["--model", "llava15", "--keep", "577"], "--keep 577 is out of range"),
        (["--model", "llava15", "--split-layer", "32"], "--split-layer 32 is out of range"),
        (["--model", "llava15", "--max-context", "5000"], "--max-context 5000 is out of range"),
        (["--model", "llava15", "--all", "--precision", "int4"], "--all takes every Jetson target in several precisions: leave out"),
    ],
)
def test_options_of_the_command_are_checked_as_a_builds_are(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main(argv) == 2
    assert re.search(message, capsys.readouterr().err)
