"""Tests on a real GPU: the library is chosen anew, and engines are cached for this session alone."""

from __future__ import annotations

import pytest

from histoseg_fast.cache import FOLDER_VARIABLE
from histoseg_fast.engines.devices import LIBRARY_VARIABLE


@pytest.fixture(scope="session")
def engine_cache(tmp_path_factory):
    """Where this session's TensorRT engines are kept."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(autouse=True)
def _a_gpu_may_be_used(monkeypatch, engine_cache):
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    monkeypatch.setenv(FOLDER_VARIABLE, str(engine_cache))
