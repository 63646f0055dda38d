"""Small wheels from the package index that tests unpack without installing them; kept between runs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from histoseg_fast.cache import cache_folder

MAX_WHEEL_BYTES = 16 << 20
PIP_SECONDS = 300


def unpacked(requirement: str) -> Path:
    """The folder of a wheel that satisfies `requirement`, unpacked; skips the test where pip cannot get it."""
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in requirement)
    root = Path(os.environ.get("HISTOSEG_TEST_WHEELS", cache_folder() / "test-wheels"))
    folder = root / f"{name}-{sys.implementation.cache_tag}"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            pytest.skip(f"pip cannot download {requirement} here, no network? ({reason[:200]})")
        assert wheels[0].stat().st_size <= MAX_WHEEL_BYTES
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(folder / "content")
        (folder / "done").touch()
    return folder / "content"
