"""The wheel holds what users need and nothing else, works outside the clone, and its dependencies are declared and locked."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.metadata import Metadata, parse_email
from packaging.requirements import Requirement

from tests.conftest import ROOT
from tools import lock

PACKAGES = ("calibration", "configs", "export", "runtime")
INSTALLED_BY_THE_USER = {"tensorrt", "tensorrt_rtx", "lmms_eval"}  # engines come with the device, the harness in an environment of its own
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(command: list[str], folder: Path) -> str:
    """Runs a command in `folder` and returns what it printed; fails the test with its message where it fails."""
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that the build leaves nothing in the clone and takes nothing stale from it."""
    source = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.safetensors")
    for name in (*PACKAGES, "benchmarks", "tests", "tiny_llava", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*pip, "--wheel-dir", str(folder), str(source)], source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel)], folder)
    return folder


def test_wheel_holds_the_four_packages_their_data_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in ROOT.glob(f"{package}/**/*")
        if file.suffix in (".py", ".toml") or file.name == "py.typed"
        if file.name != "ruff.toml"
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"runtime/py.typed", "configs/models/llava15.toml", "configs/targets/cpu.toml"} <= names
    assert "entropy_prune-0.1.0.dist-info/licenses/LICENSE" in names


def test_wheel_metadata_names_the_runtime_dependencies_and_the_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        raw, unparsed = parse_email(archive.read("entropy_prune-0.1.0.dist-info/METADATA"))
    assert not unparsed
    metadata = Metadata.from_raw(raw)
    required = {r.name.lower() for r in metadata.requires_dist or [] if r.marker is None}
    assert required == {"jinja2", "numpy", "onnxruntime", "pillow", "tokenizers"}
    assert set(metadata.provides_extra or []) == {"export", "calibration", "train", "tensorrt-rtx", "cuda", "gpu", "dev"}
    assert str(metadata.requires_python) == ">=3.10"
    assert metadata.license_expression == "Apache-2.0"


def test_configs_are_found_outside_the_clone(installed: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "import export.configs as c\n"
        "print(c.__file__)\n"
        "print(*(c.load_model_config(name).name for name in c.list_models()))"
    )
    where, models = run([sys.executable, "-c", code], tmp_path).splitlines()
    assert Path(where).is_relative_to(installed)
    assert models.split() == sorted(file.stem for file in (ROOT / "configs" / "models").glob("*.toml"))


@pytest.mark.parametrize("module", ["export.build", "export.verify", "runtime.compile", "runtime.generate"])
def test_commands_start_outside_the_clone(module: str, installed: Path, tmp_path: Path) -> None:
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(installed)!r}); sys.argv[1:] = ['--help']\n"
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    assert "usage:" in run([sys.executable, "-c", code], tmp_path)


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("runtime", []),
        ("export", ["export"]),
        ("calibration", ["export", "calibration"]),
        ("tiny_llava", ["export", "train"]),
        ("benchmarks", ["export", "calibration"]),
        ("tools", []),
    ],
)
def test_every_imported_distribution_is_declared(folder: str, extras: list[str]) -> None:
    declared = {lock.normal(Requirement(line).name) for line in PROJECT["dependencies"] + optional(*extras)}
    provided_by = packages_distributions()
    own = {*PACKAGES, "benchmarks", "tests", "tiny_llava", "tools", *sys.stdlib_module_names}
    undeclared = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in ROOT.glob(f"{folder}/**/*.py")
        for module in sorted(imported_modules(file) - own)
        if module not in INSTALLED_BY_THE_USER and not declared & {lock.normal(name) for name in provided_by.get(module, [])}
    ]
    assert not undeclared


def imported_modules(file: Path) -> set[str]:
    """Top-level names of all absolute imports of a file, those inside functions too."""

    def names() -> Iterator[str]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module or ""

    return {name.partition(".")[0] for name in names()}


def optional(*extras: str) -> list[str]:
    """The requirement lines of some extras."""
    return [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]


@pytest.mark.parametrize("one", lock.LOCKS, ids=lambda one: one.name)
def test_locks_pin_everything_that_pyproject_asks_for_within_its_bounds(one: lock.Lock) -> None:
    pins = lock.read(one)
    for line in PROJECT["dependencies"] + optional(*one.extras):
        requirement = Requirement(line)
        version = pins.get(lock.normal(requirement.name), "absent")
        assert requirement.specifier.contains(version), f"{one.file.name} has {requirement.name} {version}, pyproject.toml asks for {line}"


def test_locks_agree_with_each_other_and_with_jetpack() -> None:
    dev, runtime, jetpack = (lock.read(one) for one in lock.LOCKS)
    assert runtime.items() <= dev.items(), "what is deployed is not what is tested: python -m tools.lock refresh runtime"
    assert (jetpack["onnxruntime"], jetpack["numpy"].rpartition(".")[0]) == ("1.23.2", "2.2")
    assert not {"torch", "transformers", "onnx"} & (runtime.keys() | jetpack.keys())


@pytest.mark.network
@pytest.mark.parametrize("one", [one for one in lock.LOCKS if one.checked_for], ids=lambda one: one.name)
def test_locks_resolve_as_wheels_for_the_devices(one: lock.Lock) -> None:
    try:
        lines = lock.check([one])
    except lock.IndexUnreachableError as error:
        pytest.skip(str(error))
    assert len(lines) == len(one.checked_for)


@pytest.fixture(scope="session")
def jetpack_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python 3.10 that has what `requirements/jetpack-6.2.txt` names (this machine's wheels) and nothing else."""
    folder = tmp_path_factory.mktemp("jetpack")
    try:
        python310 = lock.find_python("3.10")
    except lock.LockError as error:
        pytest.skip(str(error))
    run([python310, "-m", "venv", "--without-pip", str(folder)], folder)
    (python,) = (file for file in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if file.exists())
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--retries", "1", "install", "--quiet", "--no-deps", "--no-compile"]
    pip += ["--only-binary=:all:", "--requirement", str(ROOT / "requirements" / "jetpack-6.2.txt")]
    done = subprocess.run(pip, check=False, capture_output=True, text=True, timeout=300)
    if done.returncode and lock.UNREACHABLE.search(done.stderr):
        pytest.skip("no package index answered")
    assert done.returncode == 0, done.stderr
    return python


@pytest.mark.network
@pytest.mark.slow
def test_runtime_imports_on_python_310_with_the_jetpack_lock(jetpack_python: Path, installed: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "import importlib, pkgutil, runtime, numpy, onnxruntime\n"
        "for module in pkgutil.walk_packages(runtime.__path__, 'runtime.'): importlib.import_module(module.name)\n"
        "print(sys.version_info[:2], numpy.__version__, onnxruntime.__version__, runtime.__file__, sep='\\n')"
    )
    version, numpy, onnxruntime, where = run([str(jetpack_python), "-W", "error", "-c", code], tmp_path).splitlines()
    assert (version, numpy, onnxruntime) == ("(3, 10)", "2.2.6", "1.23.2")
    assert Path(where).is_relative_to(installed)
