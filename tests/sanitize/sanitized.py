"""A plugin of pytest for scripts/sanitize.sh: the core is the sanitised one, and slow tests are not late."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

from histoseg_fast import _core

_MARKS = {"address": b"__asan_init", "thread": b"__tsan_init"}


def pytest_configure(config: pytest.Config) -> None:
    if _MARKS[os.environ["HISTOSEG_SANITIZE"]] not in Path(_core.__file__).read_bytes():
        raise pytest.UsageError(f"{_core.__file__} is built without sanitizers")
    hypothesis.settings.register_profile("sanitized", deadline=None, max_examples=30)
    hypothesis.settings.load_profile("sanitized")
