"""The import rule, held twice: by the linter, and by importing the runtime where what it must do without is out of reach."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

ABSENT_ON_DEVICE = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "export",
    "calibration",
    "configs",
    "tiny_llava",
)

IMPORT_ALL = """
import json, logging, os, pkgutil, sys, threading, time, warnings
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # importing it raises ImportError
before = (os.getcwd(), dict(os.environ), list(logging.root.handlers), logging.root.level)
began = time.process_time()
import importlib, runtime
names = [module.name for module in pkgutil.walk_packages(runtime.__path__, "runtime.", onerror=lambda name: None)]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
cpu_s = time.process_time() - began
unchanged = before == (os.getcwd(), dict(os.environ), list(logging.root.handlers), logging.root.level)
print(json.dumps({"names": names, "cpu_s": cpu_s, "unchanged": unchanged, "threads": threading.active_count()}))
"""


def import_all(parent: Path) -> subprocess.CompletedProcess[str]:
    """Imports every module of the package `runtime` that lies in `parent`, in a fresh Python where the rest is blocked."""
    command = [sys.executable, "-W", "error", "-c", IMPORT_ALL, ",".join(ABSENT_ON_DEVICE)]
    return subprocess.run(command, cwd=parent, check=False, capture_output=True, text=True, timeout=120)


def banned_imports(code: str, file_name: str) -> set[str]:
    """What the linter's import rule finds in `code`, were it the contents of `file_name`."""
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--output-format", "json", "--stdin-filename", file_name, "-"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, input=code, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    return {finding["message"].split("`")[1] for finding in json.loads(done.stdout)}


def test_every_runtime_module_imports_without_torch_transformers_or_onnx() -> None:
    done = import_all(ROOT)
    assert done.returncode == 0, done.stderr
    names = json.loads(done.stdout)["names"]
    files = {file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for file in ROOT.glob("runtime/**/*.py")}
    assert set(names) == {name.removesuffix(".__init__") for name in files} - {"runtime"}, "a folder without __init__.py?"


def test_importing_the_runtime_does_nothing_but_define_names() -> None:
    done = import_all(ROOT)
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.stdout.count("\n") == 1, f"a module prints when imported: {done.stdout}"
    assert done.stderr == ""
    assert result["unchanged"], "a module changes the directory, the environment or the root logger when imported"
    assert result["threads"] == 1, "a module starts a thread when imported"
    assert result["cpu_s"] < 5.0  # measured: 0.4 s of CPU, most of it numpy and onnxruntime


@pytest.mark.parametrize(
    ("code", "limit_s"),
    [  # measured: 0.06 s each, and 0.34 s
        *(
            (f"import {name} as m; m.main(['--help'])", 0.2)
            for name in ("runtime.compile", "runtime.generate", "runtime.profile", "runtime.inspect")
        ),
        ("from runtime import load", 0.5),
    ],
)
def test_the_runtime_starts_fast(code: str, limit_s: float) -> None:
    def start() -> float:
        before, began = os.times(), time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)
        wall_s, after = time.perf_counter() - began, os.times()
        cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
        return min(wall_s, cpu_s)  # on a busy machine the wall clock counts others, with several threads the other one counts twice

    start()
    assert min(start() for _ in range(5)) < limit_s


@pytest.mark.parametrize("line", ["import torch", "from onnx import helper", "from export.spec import DecoderSpec"])
def test_a_forbidden_import_in_the_runtime_is_caught_when_it_is_imported(line: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "runtime", tmp_path / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "runtime" / "culprit.py").write_text(f"{line}\n", encoding="utf-8")
    done = import_all(tmp_path)
    assert done.returncode != 0
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ModuleNotFoundError")
    assert line.split()[1].partition(".")[0] in error


@pytest.mark.parametrize("file_name", ["runtime/culprit.py", "runtime/engines/culprit.py"])
def test_the_linter_refuses_forbidden_imports_in_the_runtime(file_name: str) -> None:
    names = {*ABSENT_ON_DEVICE, "tests", "tools"}
    assert banned_imports("".join(f"import {name}\n" for name in names), file_name) == names
    later = "".join(f"    from {name}.part import thing\n" for name in names)
    found = banned_imports(f"def later():\n{later}    return thing\n", file_name)
    assert {name.partition(".")[0] for name in found} == names


def test_the_linter_refuses_imports_against_the_direction_calibration_export_runtime() -> None:
    code = "import calibration\nimport export\nimport runtime\nimport tiny_llava\nimport torch\n"
    assert banned_imports(code, "export/graphs/culprit.py") == {"calibration", "tiny_llava"}
    assert banned_imports(code, "calibration/culprit.py") == {"tiny_llava"}
    assert banned_imports(code, "tests/culprit.py") == set()


def test_the_linter_lets_the_runtime_import_what_a_device_has() -> None:
    code = (
        "import numpy\nimport onnxruntime\nimport tokenizers\nimport jinja2\nfrom PIL import Image\nfrom runtime.errors import InputError\n"
    )
    assert banned_imports(code, "runtime/innocent.py") == set()
