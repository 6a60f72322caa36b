"""`runtime.profile`: its statistics on made-up times, its runs and files on a small exported model. No test judges a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime import names, profile
from runtime.chart import CHART_SIZE, draw_profile
from runtime.engine_clock import EngineCall, EngineClock, timed_engines
from runtime.errors import BundleError, EntropyPruneError, UsageError
from runtime.flops import COUNTED_TEXT_TOKENS, decoder_flops
from runtime.machine import Machine, PeakMemory, peak_memory
from runtime.manifest import Manifest, read_manifest
from runtime.pipeline import VisionLanguageModel, load
from runtime.profile_report import STAGES, ColdStart, Memory, Profile, Subject, describe, make_profile
from runtime.profile_runs import ImageSupply, Profiler, Round, Run, messages, synthetic_image, usual_question
from runtime.profile_statistics import Distribution, Ratio, paired_ratio
from tests.runtime.host_device import host

N = 16  # visual tokens of one image
KEEP = 4


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> VisionLanguageModel:
    return load(tiny_bundle)


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return read_manifest(tiny_bundle)


# ---------------------------------------------------------------- statistics


def test_percentiles_are_those_of_the_values() -> None:
    assert Distribution.of([float(v) for v in range(101)]) == Distribution(50.0, 90.0, 99.0, 101)
    assert Distribution.of([7.0]) == Distribution(7.0, 7.0, 7.0, 1)


def test_a_chain_that_is_always_twice_as_slow_has_a_ratio_of_exactly_two() -> None:
    fast = np.random.default_rng(0).uniform(1, 9, 20)
    assert paired_ratio(2 * fast, fast) == Ratio(2.0, 2.0, 2.0, 20)


def test_pairs_cancel_what_slows_both_runs_and_unpaired_times_do_not() -> None:
    rng = np.random.default_rng(1)
    drift = np.exp(rng.normal(0, 0.5, 40))  # the machine is busy now and then
    fast = 10 * drift * rng.normal(1, 0.02, 40)
    slow = 20 * drift * rng.normal(1, 0.02, 40)
    paired = paired_ratio(slow, fast)
    assert paired.low < 2 < paired.high
    assert paired.high - paired.low < 0.06
    unpaired = paired_ratio(rng.permutation(slow), fast)
    assert unpaired.high - unpaired.low > 0.3


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for seed in range(200):
        ratios = 2 * np.exp(rng.normal(0, 0.1, 25))
        found = paired_ratio(ratios, np.ones(25), seed)
        assert found.low <= found.median <= found.high
        held += found.low <= 2 <= found.high
    assert 180 <= held <= 199, "95 % of 200 are 190"


def test_the_same_times_give_the_same_interval() -> None:
    slow, fast = np.random.default_rng(3).uniform(1, 2, (2, 15))
    assert paired_ratio(slow, fast) == paired_ratio(slow, fast)


def test_a_ratio_relative_to_another_scales_its_interval() -> None:
    assert Ratio(1.5, 1.2, 1.8, 9).divided_by(2) == Ratio(0.75, 0.6, 0.9, 9)


# ---------------------------------------------------------------- FLOPs of a prompt


def test_flops_at_the_counted_length_are_the_recorded_ones(manifest: Manifest) -> None:
    f = manifest.flops
    assert decoder_flops(manifest, None, COUNTED_TEXT_TOKENS) == f["pre_ecl"] + f["post_ecl"] + f["head"]
    assert decoder_flops(manifest, KEEP, COUNTED_TEXT_TOKENS) == f["pre_ecl"] + f["score.4"] + f["post_ecl.4"] + f["head"]


@pytest.mark.parametrize("text_tokens", [1, 31, 200])
def test_flops_at_other_lengths_are_what_the_graphs_count_there(text_tokens: int, tiny_bundle: Path, manifest: Manifest) -> None:
    from export.flops import count_flops

    def counted(half: str, tokens: int) -> int:
        return count_flops(tiny_bundle / manifest.graphs[half].file, {"sequence": tokens, "capacity": tokens}).matmul

    dense = counted("pre_ecl", N + text_tokens) + counted("post_ecl", N + text_tokens)  # the head is a part of post_ecl
    pruned = counted("pre_ecl", N + text_tokens) + counted("post_ecl", KEEP + text_tokens) + manifest.flops["score.4"]
    assert decoder_flops(manifest, None, text_tokens) == pytest.approx(dense, rel=1e-12)
    assert decoder_flops(manifest, KEEP, text_tokens) == pytest.approx(pruned, rel=1e-12)


def test_a_manifest_without_figures_is_refused(manifest: Manifest) -> None:
    flops = {k: v for k, v in manifest.flops.items() if k != "score.4"}
    with pytest.raises(BundleError, match=r"holds no FLOPs of score\.4: export the bundle again"):
        decoder_flops(dataclasses.replace(manifest, flops=flops), KEEP, 32)


# ---------------------------------------------------------------- the engines' clock


def test_the_clock_tells_prefill_from_decode() -> None:
    clock = EngineClock()
    calls = (("vision", 1.0), (names.PRE_ECL, 2.0), (names.POST_ECL, 4.0), (names.PRE_ECL, 8.0), (names.POST_ECL, 16.0))
    for name, ms in calls:
        clock.add(EngineCall(name, ms, ms / 2))
    prefill, decode = clock.split()
    assert (prefill.run_ms, prefill.library_ms) == (7.0, 3.5)
    assert (decode.run_ms, decode.library_ms) == (24.0, 12.0)
    clock.add(EngineCall(names.PRE_ECL, 1.0, None))
    assert clock.split()[1].library_ms is None, "one call that does not show its library leaves the sum unknown"


def test_timing_changes_no_answer_and_leaves_the_chain_as_it_was(model: VisionLanguageModel) -> None:
    engines = dict(host(model).engines)
    inside = {name: dict(vars(engine)) for name, engine in engines.items()}
    plain = model.generate("read row 2.", [synthetic_image(1)], max_new_tokens=5, eos_token_ids=())
    with timed_engines(model.chain) as clock:
        timed = model.generate("read row 2.", [synthetic_image(1)], max_new_tokens=5, eos_token_ids=())
    prefill, decode = clock.split()
    assert timed.token_ids == plain.token_ids
    assert timed.kept_indices == plain.kept_indices
    for part, whole_ms in ((prefill, timed.ttft_ms), (decode, timed.stages_ms["decode"])):
        assert part.library_ms is not None
        assert 0 < part.library_ms <= part.run_ms <= whole_ms
    assert host(model).engines == engines
    assert {name: dict(vars(engine)) for name, engine in host(model).engines.items()} == inside


def test_the_chain_is_as_it_was_after_an_error_too(model: VisionLanguageModel) -> None:
    engines = dict(host(model).engines)
    with pytest.raises(ValueError, match="stop"), timed_engines(model.chain):
        raise ValueError("stop")
    assert host(model).engines == engines


# ---------------------------------------------------------------- images and question


def test_synthetic_images_differ_from_each_other_and_not_from_themselves() -> None:
    images = [synthetic_image(i) for i in range(20)]
    assert {image.shape for image in images} == {(480, 640, 3)}
    assert len({image.tobytes() for image in images}) == 20
    assert (synthetic_image(7) == images[7]).all()
    assert min(float(image.std()) for image in images) > 10, "none is plain"


def test_images_of_a_folder_come_in_turn(tmp_path: Path) -> None:
    for name in ("b.png", "a.PNG"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    supply = ImageSupply.from_folder(tmp_path)
    assert [Path(str(supply[i])).name for i in range(4)] == ["a.PNG", "b.png", "a.PNG", "b.png"]
    assert [supply.distinct(count) for count in (1, 2, 50)] == [1, 2, 2]
    assert ImageSupply().distinct(50) == 50


@pytest.mark.parametrize("folder", ["empty", "nowhere"])
def test_a_folder_without_images_is_refused(folder: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=f"--images .*{folder} holds no image .*: name a directory of images, or leave it out"):
        ImageSupply.from_folder(tmp_path / folder)


def test_the_usual_question_has_about_as_many_tokens_as_flops_are_counted_with(model: VisionLanguageModel) -> None:
    ids = model.prompts.build(messages(usual_question(model)), [synthetic_image(0)]).ids.input_ids
    assert abs(len(ids) - N - COUNTED_TEXT_TOKENS) <= 2


# ---------------------------------------------------------------- the runs


def test_each_pair_has_a_new_image_for_both_settings_and_the_order_alternates(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, object]] = []
    generate, prefill = model.generate, model.prefill

    def seen(image: Any) -> str:
        return hashlib.sha256(image.tobytes()).hexdigest()

    def note(*arguments: Any, **options: Any) -> Any:
        if options.get("state") is None:
            asked.append((seen(arguments[1][0]), options["keep"]))
        return generate(*arguments, **options)

    def note_prefill(*arguments: Any, **options: Any) -> Any:
        asked.append((seen(arguments[1][0]), "state"))
        return prefill(*arguments, **options)

    monkeypatch.setattr(model, "generate", note)
    monkeypatch.setattr(model, "prefill", note_prefill)
    heard: list[int] = []
    rounds = Profiler(model, KEEP, "read row 2.", 3, ImageSupply()).measure(runs=6, warmup=2, progress=heard.append)
    assert len(rounds) == 6
    assert heard == list(range(1, 9))
    triples = [asked[i : i + 3] for i in range(0, len(asked), 3)]
    images = [{image for image, _ in triple} for triple in triples]
    assert all(len(found) == 1 for found in images), "one image for all settings of a round"
    assert len(set.union(*images)) == 8, "a new one each round, in the warm-up too"
    assert all({setting for _, setting in triple} == {KEEP, "all", "state"} for triple in triples)
    orders = [tuple(setting for _, setting in triple) for triple in triples]
    assert len(set(orders[:4])) == 4
    assert sum(order.index(KEEP) < order.index("all") for order in orders) == 4


def test_the_parts_of_a_run_add_up(model: VisionLanguageModel) -> None:
    rounds = Profiler(model, KEEP, "read row 2.", 3, ImageSupply()).measure(runs=3, warmup=0, progress=lambda _: None)
    for run in (run for taken in rounds for run in (taken.pruned, taken.dense)):
        stages = sum(getattr(run, f"{stage}_ms") for stage in STAGES)
        assert stages == pytest.approx(run.first_token_ms)
        assert run.rest_ms > 0
        assert run.between_ms > 0
        assert run.between_prefill_ms > run.embed_ms
        assert run.library_ms is not None
        assert run.library_ms < run.engines_ms < run.step_ms < run.per_token_ms
        assert run.new_tokens == 3
    assert all(taken.dense.score_ms == 0 < taken.pruned.score_ms for taken in rounds)
    assert all(N < taken.reused_tokens < N + taken.pruned.text_tokens for taken in rounds)


def test_a_context_that_is_too_small_for_the_answer_is_told(model: VisionLanguageModel) -> None:
    profiler = Profiler(model, KEEP, "read row 2.", 5000, ImageSupply())
    with pytest.raises(UsageError, match=r"a prompt of \d+ tokens and 5000 more exceed the bundle's context of 512: lower --max"):
        profiler.measure(runs=3, warmup=0, progress=lambda _: None)


# ---------------------------------------------------------------- the report


def constructed(manifest: Manifest, pairs: int = 20, library: bool = True, memory: Memory | None = None, distinct: int = 20) -> Profile:
    """A profile whose unpruned decoder takes exactly twice as long, and whose second question takes a tenth."""

    def run(decoder_ms: float, score_ms: float, at: int) -> Run:
        slow = 1 + at % 3  # the machine is busy now and then
        first = (3 + decoder_ms + 1) * slow
        return Run(
            1.0 * slow, 1.5 * slow, 0.5 * slow, 0.25 * decoder_ms * slow, score_ms * slow, (0.75 * decoder_ms - score_ms) * slow, first,
            per_token_ms=2.0, step_ms=1.6, engines_ms=1.52, library_ms=1.2 if library else None, engines_prefill_ms=decoder_ms * slow,
            text_tokens=40, new_tokens=16,
        )  # fmt: skip

    rounds = [Round(run(8.0, 1.0, i), run(16.0, 0.0, i), 1.2 * (1 + i % 3), 20) for i in range(pairs)]
    machine = Machine("A CPU", 4, 2, 0.5, "Linux", "3.11.0", "1.0.0", "2.0.0", "0.1.0", "2026-01-01T00:00:00+00:00")
    images = ImageSupply(tuple(Path(f"{i}.png") for i in range(distinct)) if distinct < pairs else ())
    subject = Subject.of(Path("bundles/b"), manifest, KEEP, "what?", images, rounds, 5, "cpu")
    return make_profile(subject, manifest, rounds, ColdStart(300.0, 100.0, 50.0), memory, machine)


def test_a_decoder_twice_as_slow_realises_its_share_of_the_flops_ratio(manifest: Manifest) -> None:
    p = constructed(manifest)
    flops = decoder_flops(manifest, None, 40) / decoder_flops(manifest, KEEP, 40)
    assert p.comparison.decoder == Ratio(2.0, 2.0, 2.0, 20)
    assert p.comparison.flops_ratio == flops
    assert p.comparison.realised == Ratio(2 / flops, 2 / flops, 2 / flops, 20)
    assert p.comparison.first_token.median == pytest.approx(20 / 12)
    assert p.comparison.per_token.median == 1.0
    assert p.kept_state.share_of_afresh.median == pytest.approx(0.1)
    assert p.dense.between_engines_share == pytest.approx(0.05)
    assert p.dense.binding_share == pytest.approx(0.2)
    assert p.pruned.stages["score"].median_ms > 0 == p.dense.stages["score"].median_ms


def test_the_table_says_what_was_measured_and_what_it_is_not(manifest: Manifest) -> None:
    text = describe(constructed(manifest, memory=Memory.of(PeakMemory(100_000_000, "x"), PeakMemory(120_000_000, "VmHWM"))))
    for part in (
        "16 visual + 40 text tokens, 16 tokens generated",
        "20 pairs after 5 of warm-up",
        "pre_ecl + score + post_ecl  2.000 [2.000, 2.000]",
        "40 text tokens, from those at 32",
        "20 of 56 prompt tokens already held",
        "0.080 (5.0%)",
        "0.320 (20.0%)",
        "libraries 300 ms, loading the bundle 100 ms",
        "120.0 MB at its peak, 100.0 MB once loaded (VmHWM",
        "A CPU, 4 cores, 2 engine threads, load 0.5; Linux; ONNX Runtime 1.0.0",
        "published figures of vision-language models often time a cache",
        "p99 of 20 runs is close to their maximum",
    ):
        assert part in text
    (row,) = (line for line in text.splitlines() if line.startswith("  score"))
    assert row.split()[1:5] == ["-", "-", "-", "20"], "no score where all is kept"


def test_what_is_not_known_is_left_out(manifest: Manifest) -> None:
    p = constructed(manifest, library=False, distinct=6)
    assert p.pruned.binding is None
    assert p.pruned.binding_share is None
    assert p.memory is None
    text = describe(p)
    assert "memory: not known on this system" in text
    (row,) = (line for line in text.splitlines() if "handing over tensors" in line)
    assert row.split()[-2:] == ["-", "-"]
    assert "6 images for 20 pairs: they come again" in text
    assert "preprocess includes reading and decoding the image files" in text


def test_the_chart_shows_both_settings_stages(manifest: Manifest) -> None:
    image = draw_profile(constructed(manifest))
    assert image.size == CHART_SIZE
    pixels = np.asarray(image).reshape(-1, 3)
    areas = {colour: int((pixels == colour).all(1).sum()) for colour in ((153, 153, 153), (86, 180, 233), (204, 60, 0), (0, 158, 115))}
    assert min(areas.values()) > 100, "every stage is drawn"
    assert areas[0, 158, 115] > areas[204, 60, 0], "post_ecl takes longer than the score"


@pytest.mark.parametrize("largest", [0.004, 0.7, 1.0, 4.9, 5.0, 61.0, 12345.0])
def test_axes_have_round_ticks(largest: float) -> None:
    from runtime.chart import _tick_step

    step = _tick_step(largest)
    assert 2 <= largest / step <= 10
    assert f"{step:e}"[0] in "125"


def test_peak_memory_says_who_counted() -> None:
    peak = peak_memory()
    if peak is None:
        pytest.skip("this system does not tell")
    assert peak.bytes > 1_000_000
    assert "VmHWM" in peak.source or "getrusage" in peak.source


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def profiled(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, str]]:
    """The command over a small bundle, in a process of its own: its folder, what it printed, and the bundle's hashes before."""
    folder = tmp_path_factory.mktemp("profile") / "out"
    before = hashes(tiny_bundle)
    options = ["--runs", "3", "--warmup", "1", "--max-new-tokens", "3", "--json", "--output", str(folder)]
    command = [sys.executable, "-W", "error", "-m", "runtime.profile", "--bundle", str(tiny_bundle), *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no progress where stderr is no terminal"
    return folder, done.stdout.splitlines(), before


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_the_command_prints_a_table_and_writes_both_files(profiled: tuple[Path, list[str], dict[str, str]], tiny_bundle: Path) -> None:
    folder, lines, before = profiled
    assert sorted(path.name for path in folder.iterdir()) == ["profile.json", "profile.png"]
    assert json.loads(lines[-1]) == json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    with Image.open(folder / "profile.png") as image:
        assert (image.format, image.size) == ("PNG", CHART_SIZE)
    assert lines[-2] == f"written: {folder / 'profile.json'}, {folder / 'profile.png'}"
    assert any(line.startswith("  time to first token") for line in lines)
    assert hashes(tiny_bundle) == before, "the bundle is not touched"


def test_the_figures_agree_with_each_other(profiled: tuple[Path, list[str], dict[str, str]], manifest: Manifest) -> None:
    found = json.loads(profiled[1][-1])
    subject, comparison = found["subject"], found["comparison"]
    assert (subject["keep"], subject["visual_tokens"], subject["distinct_images"], subject["new_tokens"]) == (KEEP, N, 3, 3)
    assert comparison["flops_dense"] == decoder_flops(manifest, None, subject["text_tokens"])
    assert comparison["flops_ratio"] == pytest.approx(comparison["flops_dense"] / comparison["flops_pruned"])
    assert comparison["realised"]["median"] == pytest.approx(comparison["decoder"]["median"] / comparison["flops_ratio"])
    for ratio in (
        *(comparison[key] for key in ("decoder", "realised", "first_token", "per_token")),
        found["kept_state"]["share_of_afresh"],
    ):
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert ratio["pairs"] == 3
    for setting in (found["dense"], found["pruned"]):
        assert list(setting["stages"]) == list(STAGES)
        for times in (*setting["stages"].values(), setting["first_token"], setting["per_token"]):
            assert 0 <= times["median_ms"] <= times["p90_ms"] <= times["p99_ms"]
            assert times["runs"] == 3
        assert max(times["median_ms"] for times in setting["stages"].values()) <= setting["first_token"]["median_ms"]
    assert found["dense"]["stages"]["score"]["p99_ms"] == 0 < found["pruned"]["stages"]["score"]["median_ms"]
    assert found["cold_start"]["import_ms"] > 0
    assert found["machine"]["engine_threads"] >= 1
    if found["memory"]:
        assert found["memory"]["loaded_bytes"] <= found["memory"]["peak_bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "2"], "--runs is 2: give 3 or more"),
        (["--warmup", "-1"], "--warmup is -1: give 0 or more"),
        (["--max-new-tokens", "1"], "--max-new-tokens is 1: give 2 or more"),
        (["--keep", "7"], "budgets of this bundle below its 16 visual tokens: 4, 2, not 7; export it with another --keep"),
        (["--keep", "16"], "below its 16 visual tokens: 4, 2, not 16"),
        (["--keep", "all"], "below its 16 visual tokens: 4, 2, not all"),
        (
            ["--keep", "auto"],
            "--keep auto has no one latency, it keeps another number for each image: profile its budgets one by one (4, 2)",
        ),
        (["--images", "nowhere"], "--images nowhere holds no image"),
        (["--output", "file/inside"], "cannot make the directory file"),
        (["--bundle", "nowhere"], "nowhere is not a directory: name a bundle"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    options: list[str], message: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no directory", encoding="utf-8")
    assert profile.main(["--bundle", str(tiny_bundle), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_bundle_without_a_budget_below_n_has_nothing_to_compare() -> None:
    with pytest.raises(EntropyPruneError, match="below its 16 visual tokens: none; export it with another --keep"):
        profile._budget(None, (16, 32), 16)
    assert profile._budget(None, (16, 8, 4), 16) == 8


def test_progress_is_told_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    profile._progress(2)(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show = profile._progress(2)
    show(1)
    show(2)
    assert capsys.readouterr().err == "\rpair 1 of 2\rpair 2 of 2\n"


@pytest.mark.parametrize("module", ["runtime.profile", "runtime.inspect"])
def test_help_imports_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module} as m; m.main(['--help']); print(sorted({{'numpy', 'onnxruntime', 'PIL', 'tokenizers'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage:")
    assert done.stdout.splitlines()[-1] == "[]"
