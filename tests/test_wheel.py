"""The wheel holds all it needs: built, installed in a fresh environment, and run far from the source."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from running import PATIENCE

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_wheel.sh"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the script is bash's")
def test_the_wheel_runs_where_the_source_is_not() -> None:
    missing = [name for name in ("setuptools", "pybind11", "Cython", "pip") if importlib.util.find_spec(name) is None]
    if missing or not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip(f"nothing to build with: no {', '.join(missing) or 'C++ compiler'}")
    environment = {**os.environ, "SITE": sysconfig.get_path("purelib")}
    command = ["bash", SCRIPT, sys.executable]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10 * PATIENCE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1].startswith("ok: Python ")
