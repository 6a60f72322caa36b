"""A process that answers for a long time, and a bundle that goes away below it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import EntropyPruneError
from runtime.pipeline import load
from tests.conftest import ROOT

IMAGE = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
PAGE_LIMIT = 1.01  # resident memory at the end, by that after the warm-up
# The allocator's own share grows until about request 4,000 (by 1.1 % from request 200 on) and stays there: measured to 12,200.
WARM_UP, REQUESTS = 2000, 2000

# Prints resident pages after the warm-up and at the end. With "leak" it keeps a few kilobytes of every request.
DRIVER = """
import gc, json, sys
import numpy as np
from pathlib import Path
from runtime.errors import EntropyPruneError
from runtime.pipeline import load

bundle, warm_up, requests, leak = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "leak"
vlm = load(bundle, threads=1, cache_bytes=4 << 20)
images = [np.random.default_rng(i).integers(0, 256, (40 + i, 56, 3), dtype=np.uint8) for i in range(5)]
question = [{"role": "user", "content": [{"type": "image"}]}]
state, kept, errors = vlm.prefill(question, [images[0]]), [], 0

def pages():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1])

for number in range(warm_up + requests):
    if number == warm_up:
        before = pages()
    image = images[number % 5]
    kind = number % 8
    if kind in (0, 1):
        vlm.generate("what is at row 2?", [image], max_new_tokens=2)
    elif kind == 2:
        with vlm.stream("read row 2.", [image], keep=2, max_new_tokens=6) as stream:
            next(iter(stream), None)  # and cancelled
    elif kind == 3:
        vlm.generate("and row 3?", state=state, max_new_tokens=2)
    elif kind == 4:
        vlm.generate("<image> and </s>?", state=vlm.prefill(question, [image]).clone(), max_new_tokens=2)
    elif kind == 5:
        try:
            vlm.generate("<image>" * 600 if number % 16 < 8 else "x", [image, "nowhere.png"], max_new_tokens=2)
        except EntropyPruneError:
            errors += 1
    elif kind == 6:
        vlm.generate("hello", [image, image], keep="all", max_new_tokens=2, do_sample=True, seed=number)
    else:
        vlm.stream("never asked for", [image]).close()
    if leak:
        kept.append(bytearray(b"x" * 4096))
print(json.dumps({"before": before, "after": pages(), "errors": errors}))
"""


def measured(bundle: Path, requests: int, leak: bool = False) -> dict[str, int]:
    command = [sys.executable, "-c", DRIVER, str(bundle), str(WARM_UP), str(requests), "leak" if leak else "no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True)
    result: dict[str, int] = json.loads(done.stdout)
    return result


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc, as Linux has it")
def test_memory_does_not_grow_over_two_thousand_requests(tiny_bundle: Path) -> None:
    pages = measured(tiny_bundle, REQUESTS)
    print(pages, f"{pages['after'] / pages['before'] - 1:+.3%}")
    assert pages["errors"] == (WARM_UP + REQUESTS) // 8
    assert pages["after"] < pages["before"] * PAGE_LIMIT
    leaking = measured(tiny_bundle, 600, leak=True)
    assert leaking["after"] > leaking["before"] * PAGE_LIMIT, "four kilobytes lost by each request would be noticed"


# ---------------------------------------------------------------- a bundle that goes away


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_bundle_may_be_removed_while_its_model_runs(copy: Path) -> None:
    """Files are read or mapped when a model is loaded."""
    vlm, other = load(copy), load(copy)
    before = vlm.generate("read row 2.", [IMAGE], max_new_tokens=6)
    stream = other.stream("read row 2.", [IMAGE], max_new_tokens=6)
    pieces = iter(stream)
    first = next(pieces, "")
    shutil.rmtree(copy)
    assert (first + "".join(pieces)).strip() == before.text
    assert vlm.generate("read row 2.", [IMAGE], max_new_tokens=6).token_ids == before.token_ids
    assert vlm.generate("another question, with <image> in it", [IMAGE], keep=2, max_new_tokens=2).kept_tokens == 2
    with pytest.raises(EntropyPruneError, match="is not a directory: name a bundle"):
        load(copy)


def test_a_bundle_may_be_replaced_while_its_model_runs(copy: Path) -> None:
    vlm = load(copy)
    before = vlm.generate("read row 2.", [IMAGE], max_new_tokens=6)
    other = copy.with_name("other")
    shutil.copytree(copy, other)
    for path in other.iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    copy.rename(copy.with_name("old"))
    other.rename(copy)
    shutil.rmtree(copy.with_name("old"))
    assert vlm.generate("read row 2.", [IMAGE], max_new_tokens=6).token_ids == before.token_ids


def test_a_read_only_bundle_is_loaded(copy: Path) -> None:
    expected = load(copy).generate("read row 2.", [IMAGE], max_new_tokens=4).token_ids
    for path in copy.iterdir():
        path.chmod(0o400)
    copy.chmod(0o500)
    try:
        vlm = load(copy)
        assert vlm.generate("read row 2.", [IMAGE], max_new_tokens=4).token_ids == expected
        assert {path.name for path in copy.iterdir()} == {*vlm.manifest.files, "bundle.json", "report.json"}, "nothing is written there"
    finally:
        copy.chmod(0o700)


def test_a_bundle_that_may_not_be_read_says_so(copy: Path) -> None:
    (copy / "tokenizer.json").chmod(0)
    if os.access(copy / "tokenizer.json", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(EntropyPruneError, match=r"cannot read .*tokenizer\.json: Permission denied"):
        load(copy)
