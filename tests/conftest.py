"""What all tests share: threads, the folder of real model configurations, and when tests that need a GPU run.

Imports neither torch nor transformers, so that the runtime's tests run where these are not installed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.site import Refused, Site

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Before torch is imported: few threads (the models are tiny), no hub, so that no test can download, and no telemetry."""
    os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("nvidia-smi"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU: nvidia-smi is not on the PATH"))


@pytest.fixture(scope="session")
def model_configs() -> Path:
    """Configurations and tokenizers of the real models (no weights), one folder per Hugging Face name; not shipped."""
    named = os.environ.get("ENTROPY_PRUNE_MODEL_CONFIGS")
    folder = Path(named) if named else ROOT.parent / "shared" / "model-configs"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set ENTROPY_PRUNE_MODEL_CONFIGS to one that holds llava-1.5-7b-hf/config.json and the like")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA checkpoint of 4 layers and 16 visual tokens. Shared by all tests: copy it before changing it."""
    pytest.importorskip("torch", reason="checkpoints for tests are made by transformers")
    from tests.models import tiny_llava_checkpoint

    return tiny_llava_checkpoint(tmp_path_factory.mktemp("shared") / "checkpoint", image_size=56)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` exported: split before layer 2, budgets 4 (the default) and 2, a context of 512. Copy it before changing it."""
    from export.build import build_bundle
    from export.plan import BuildOptions, make_plan

    output = tmp_path_factory.mktemp("shared") / "bundle"
    build_bundle(make_plan(BuildOptions("llava15", checkpoint=str(tiny_checkpoint), keep=(4, 2), split_layer=2, max_context=512)), output)
    return output


@pytest.fixture
def site(tmp_path: Path, tiny_checkpoint: Path, tiny_bundle: Path) -> Site:
    """A folder with copies of `tiny_checkpoint` and `tiny_bundle`, and an image."""
    from tests.site import Site

    return Site.make(tmp_path / "site", tiny_checkpoint, tiny_bundle)


@pytest.fixture
def refused(site: Site, capfd: pytest.CaptureFixture[str]) -> Refused:
    """`refused(module, argv, message)`: runs a command that must fail with one line and change nothing in `site`."""
    from tests.site import Refused

    return Refused(site, capfd)
