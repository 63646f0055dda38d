"""No thread of a kernel reads or writes beyond its arrays, under AddressSanitizer on the host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-Icsrc"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.slow
def test_threads_stay_in_their_arrays(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++ on PATH")
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    probe = [compiler, *SANITIZERS, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")]
    if subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip(f"{compiler} has no AddressSanitizer here")
    program = str(tmp_path / "bounds")
    command = [compiler, *FLAGS, *SANITIZERS, "tests/cuda/bounds.cpp", "-o", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.stdout == "every address lies in its array\n", ran.stderr[-4000:]
