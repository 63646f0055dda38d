"""Fixtures that many tests share: a plan that runs fast, and real images where they are at hand."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpu_fixtures import gpus  # noqa: F401 (a fixture)
from tiny_plans import tiny_manifest, tiny_model
from trt_fixtures import machine  # noqa: F401 (a fixture)

from histoseg_fast.cache import FOLDER_VARIABLE, cache_folder
from histoseg_fast.engines.devices import LIBRARY_VARIABLE
from histoseg_fast.plan import MODEL, Plan, pack, unpack, write_plan

os.environ.setdefault("HISTOSEG_TEST_WHEELS", str(cache_folder() / "test-wheels"))
os.environ[FOLDER_VARIABLE] = tempfile.mkdtemp(prefix="histoseg-cache-")
"""Tests neither see nor change what this user's runs have kept."""
os.environ[LIBRARY_VARIABLE] = "none"
"""Where nothing else is asked for, tests run on the CPU, also on machines with a GPU; those in tests/gpu undo this."""


@pytest.fixture(scope="session", autouse=True)
def _remove_cache() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ[FOLDER_VARIABLE], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_plan() -> Plan:
    """A verified plan of a tiny network (stride 2, halo 8, default tile 128)."""
    return unpack(pack(tiny_manifest(), {MODEL: tiny_model()}))


@pytest.fixture(scope="session")
def tiny_plan_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same plan as a file."""
    path = tmp_path_factory.mktemp("plan") / "tiny.plan"
    write_plan(path, tiny_manifest(), {MODEL: tiny_model()})
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images: HISTOSEG_DATA, or ../shared/data beside the project."""
    folder = Path(os.environ.get("HISTOSEG_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "lung").is_dir():
        pytest.skip(f"no real images in {folder} (set HISTOSEG_DATA)")
    return folder
