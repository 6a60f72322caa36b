"""`runtime.inspect`: what it says of a bundle is what the bundle holds, what is wrong with it included."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime import inspect
from runtime.errors import BundleError
from runtime.inspection import SCORE_WORDS, inspect_bundle, tensor_rows
from runtime.manifest import Manifest, TensorInfo, read_manifest, sha256_of
from runtime.names import MANIFEST_FILE, SCORE_MODES, VERIFY_FILE

N, LAYERS, SPLIT, CONTEXT = 16, 4, 2, 512
KV_HEADS, HEAD_SIZE = 4, 16


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def write_verify(folder: Path, **changes: Any) -> None:
    report = {
        "passed": True, "checks": [{"name": "logits", "passed": True}, {"name": "keys", "passed": True}], "selection": {},
        "bundle": {"manifest_sha256": sha256_of(folder / MANIFEST_FILE)}, "date": "2026-01-31", "onnxruntime": "1.0.0", "torch": "2.0.0",
        "transformers": "5.0.0",
    }  # fmt: skip
    (folder / VERIFY_FILE).write_text(json.dumps(report | changes), encoding="utf-8")


# ---------------------------------------------------------------- figures


def test_budgets_are_averaged_over_the_layers(tiny_bundle: Path) -> None:
    assert [(b.keep, b.average_keep) for b in inspect_bundle(tiny_bundle).budgets] == [(4, 10.0), (2, 9.0)]


def test_memory_counts_weights_both_cache_groups_and_the_token_table(tiny_bundle: Path) -> None:
    found = inspect_bundle(tiny_bundle)
    rows_bytes = 2 * KV_HEADS * HEAD_SIZE * 4  # key and value of one token in one layer
    manifest = read_manifest(tiny_bundle)
    for need, keep in zip(found.memory, (N, 4, 2), strict=True):
        assert need.keep == (None if keep == N else keep)
        assert need.weights_bytes == (tiny_bundle / "weights.fp32.bin").stat().st_size
        assert need.embedding_bytes == manifest.geometry.vocab_size * manifest.geometry.hidden_size * 4
        assert need.kv_pre_bytes == CONTEXT * SPLIT * rows_bytes
        assert need.kv_post_bytes == (CONTEXT - (N - keep)) * (LAYERS - SPLIT) * rows_bytes
        assert need.total_bytes == need.weights_bytes + need.embedding_bytes + need.kv_pre_bytes + need.kv_post_bytes


def test_flops_are_the_recorded_ones(tiny_bundle: Path) -> None:
    flops = read_manifest(tiny_bundle).flops
    dense, four, two = inspect_bundle(tiny_bundle).flops
    assert [stage.flops for stage in dense.stages] == [flops["vision"], flops["pre_ecl"], None, flops["post_ecl"], flops["head"]]
    expected = [flops["vision"], flops["pre_ecl"], flops["score.4"], flops["post_ecl.4"], flops["head"]]
    assert [stage.flops for stage in four.stages] == expected
    assert dense.decoder_share == 1.0
    assert four.decoder_share == pytest.approx(sum(expected[1:]) / (flops["pre_ecl"] + flops["post_ecl"] + flops["head"]))
    assert two.decoder_share < four.decoder_share < 1


def test_a_bundle_that_records_no_flops_is_still_described(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = dataclasses.replace(read_manifest(bundle), flops={})
    (bundle / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    assert inspect.main([str(bundle)]) == 0
    assert "FLOPs: the bundle records none" in capsys.readouterr().out


def test_cache_tensors_of_all_layers_are_one_row() -> None:
    def cache(name: str, capacity: int | str = "capacity") -> TensorInfo:
        return TensorInfo(name, "float32", (1, 4, capacity, 16))

    tensors = [cache(f"past_key_values.{i}.{kind}") for i in range(2, 12) for kind in ("key", "value")]
    other = [
        TensorInfo("past_length", "int64", (1,)),
        cache("past_key_values.12.key", 64),
        cache("past_key_values.x"),
        cache("present.3.*"),
    ]
    rows = [row.name for row in tensor_rows([*tensors, *other])]
    assert rows[:2] == ["past_key_values.2..11.key", "past_key_values.2..11.value"]
    assert rows[2:] == ["past_length", "past_key_values.12.key", "past_key_values.x", "present.3.*"]


def test_every_score_mode_is_described() -> None:
    assert set(SCORE_WORDS) == set(SCORE_MODES)


# ---------------------------------------------------------------- the text


def test_the_text_says_what_the_bundle_holds(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(tiny_bundle)]) == 0
    out, manifest = capsys.readouterr().out, read_manifest(tiny_bundle)
    for part in (
        "model     llava15 (family llava15) for target cpu, weights in fp32",
        f"checkpoint {manifest.source.checkpoint}, revision {manifest.source.revision}",
        "4 layers of 64; 4 query and 4 key-value heads of 16",
        "layers 0..1 see every token, layers 2..3 text and the kept ones",
        "trace: matrix entropy",
        "keep 4 of 16 (10.0 on average over the layers), keep 2 of 16 (9.0",
        "512 tokens, prompt and answer together",
        "past_key_values.2..3.value",
        "MB planned when it was built for cpu, with activations and the process, keep 4",
        "counted in the exported graphs when the bundle was built",
        f"Files: {len(manifest.files)}",
        "there is none: python -m export.verify",
    ):
        assert part in out
    assert all(name in out for name in (*manifest.files, *manifest.graphs))
    assert out.count("size and SHA-256 as recorded") == len(manifest.files)


def test_a_choice_for_each_image_is_told_with_its_threshold(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(bundle)]) == 0
    assert "per image" not in capsys.readouterr().out
    manifest = dataclasses.replace(read_manifest(bundle), schema_version=2, auto_keep=0.29)
    (bundle / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    assert inspect.main([str(bundle), "--json"]) == 0
    out = capsys.readouterr().out
    assert "\nper image keep auto chooses a budget for the images of each message: the smallest that holds 29 % of the scores' mass" in out
    assert json.loads(out.splitlines()[-1])["manifest"]["auto_keep"] == 0.29


def test_json_is_the_last_line_and_holds_the_manifest(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(tiny_bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Manifest.from_json(json.dumps(found["manifest"])) == read_manifest(tiny_bundle)
    assert [column["keep"] for column in found["memory"]] == [None, 4, 2]
    assert all(check["problem"] is None for check in found["files"])


def test_no_engine_is_loaded(tiny_bundle: Path) -> None:
    code = f"import sys, runtime.inspect as m; m.main([{str(tiny_bundle)!r}]); print(sorted({{'numpy', 'onnxruntime'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


# ---------------------------------------------------------------- what is wrong


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_an_altered_file_is_named_in_the_report_and_is_an_error(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(bundle / "weights.fp32.bin")
    (bundle / "tokenizer.json").unlink()
    assert inspect.main([str(bundle), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "weights.fp32.bin was altered" in captured.err
    assert "tokenizer.json is missing" in captured.err
    problems = {check["name"]: check["problem"] for check in json.loads(captured.out.splitlines()[-1])["files"] if check["problem"]}
    assert set(problems) == {"weights.fp32.bin", "tokenizer.json"}


def test_without_hashes_sizes_alone_are_compared(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(bundle / "weights.fp32.bin")
    assert inspect.main([str(bundle), "--no-hashes"]) == 0
    assert "size as recorded, SHA-256 not compared" in capsys.readouterr().out
    with (bundle / "weights.fp32.bin").open("ab") as file:
        file.write(b"x")
    assert inspect.main([str(bundle), "--no-hashes"]) == 2
    assert "the manifest says" in capsys.readouterr().err


def test_what_is_no_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("python -m runtime.inspect: error: ")
    assert "holds no bundle.json: name a bundle made by" in captured.err
    with pytest.raises(BundleError, match="is not a directory"):
        inspect_bundle(tmp_path / "nowhere")


# ---------------------------------------------------------------- verify.json


def test_a_comparison_of_this_build_is_told(bundle: Path) -> None:
    write_verify(bundle)
    found = inspect_bundle(bundle).verification
    assert (found.passed, found.matches, found.date) == (True, True, "2026-01-31")
    assert found.words.startswith(
        "all 2 checks passed on 2026-01-31 (transformers 5.0.0, torch 2.0.0, ONNX Runtime 1.0.0); ONNX Runtime here is"
    )
    assert found.words.endswith("about this very build")


def test_a_comparison_that_failed_names_its_checks(bundle: Path) -> None:
    write_verify(bundle, passed=False, checks=[{"name": "logits", "passed": False}, {"name": "keys", "passed": True}])
    found = inspect_bundle(bundle).verification
    assert found.passed is False
    assert found.words.startswith("1 of 2 checks FAILED (logits) on 2026-01-31")


def test_a_comparison_of_another_build_no_longer_counts(bundle: Path) -> None:
    write_verify(bundle)
    manifest = dataclasses.replace(read_manifest(bundle), created="2026-02-01T00:00:00+00:00")
    (bundle / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    found = inspect_bundle(bundle).verification
    assert found.matches is False
    assert "about ANOTHER build: python -m export.verify" in found.words


def test_a_comparison_that_names_no_build_is_not_believed(bundle: Path) -> None:
    write_verify(bundle, bundle={"model": "llava15"})
    found = inspect_bundle(bundle).verification
    assert found.matches is None
    assert found.words.endswith("it does not record which build it was about")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"passed": true}', '{"passed": true, "date": 1, "checks": 5, "bundle": []}', "[" * 100000]
)
def test_a_verify_json_that_is_none_is_told(text: str, bundle: Path) -> None:
    (bundle / VERIFY_FILE).write_text(text, encoding="utf-8")
    found = inspect_bundle(bundle).verification
    assert found.passed is None
    assert found.words.startswith("it cannot be read: python -m export.verify")


# ---------------------------------------------------------------- what runs here


def test_it_says_which_libraries_can_run_it_here_and_what_is_missing(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(tiny_bundle), "--no-hashes", "--json"]) == 0
    out = capsys.readouterr().out
    text = out[out.index("Runs on this machine with") :]
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["onnxruntime", "tensorrt", "tensorrt_rtx"]
    assert "is installed, on the CPU" in text.splitlines()[1]
    assert [backend["library"] for backend in json.loads(out.splitlines()[-1])["backends"]] == ["tensorrt", "tensorrt_rtx"]
