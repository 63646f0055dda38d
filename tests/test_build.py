"""setup.py: what HISTOSEG_CUDA and HISTOSEG_SANITIZE ask for, and which flags nvcc gets."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from histoseg_fast import _core

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.fixture(scope="module")
def build():
    return runpy.run_path(str(SETUP), run_name="histoseg_setup")


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def fake_nvcc(folder):
    folder.mkdir(parents=True)
    tool = folder / ("nvcc.exe" if sys.platform == "win32" else "nvcc")
    tool.write_text("")
    tool.chmod(0o755)
    return str(tool)


@pytest.mark.usefixtures("no_nvcc")
def test_without_nvcc(build, monkeypatch):
    for value in ("auto", "0"):
        monkeypatch.setenv("HISTOSEG_CUDA", value)
        assert build["cuda_compiler"]() is None
    monkeypatch.delenv("HISTOSEG_CUDA")
    assert build["cuda_compiler"]() is None
    monkeypatch.setenv("HISTOSEG_CUDA", "1")
    with pytest.raises(SystemExit, match="HISTOSEG_CUDA=1, but no nvcc"):
        build["cuda_compiler"]()


@pytest.mark.usefixtures("no_nvcc")
@pytest.mark.parametrize("variable", ["PATH", "CUDA_HOME", "CUDA_PATH"])
def test_with_nvcc(build, monkeypatch, tmp_path, variable):
    nvcc = fake_nvcc(tmp_path / "cuda" / "bin")
    monkeypatch.setenv(variable, str(tmp_path / "cuda" / ("bin" if variable == "PATH" else "")))
    for value, wanted in (("auto", nvcc), ("1", nvcc), ("0", None)):
        monkeypatch.setenv("HISTOSEG_CUDA", value)
        found = build["cuda_compiler"]()
        assert (found and os.path.normpath(found)) == wanted


@pytest.mark.parametrize("value", ["yes", "2", ""])
def test_other_values_are_refused(build, monkeypatch, value):
    monkeypatch.setenv("HISTOSEG_CUDA", value)
    with pytest.raises(SystemExit, match="use auto, 0 or 1"):
        build["cuda_compiler"]()


def test_the_error_is_one_line():
    environment = {**os.environ, "HISTOSEG_CUDA": "maybe"}
    command = [sys.executable, str(SETUP), "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["HISTOSEG_CUDA='maybe' is not known; use auto, 0 or 1"]


def test_architectures_are_those_nvcc_knows(build):
    flags = build["architecture_flags"]("compute_75\ncompute_80\ncompute_90\ncompute_90a\ncompute_91\n")
    numbers = (75, 80, 90)
    assert flags[:-1] == [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    assert flags[-1] == "-gencode=arch=compute_90,code=compute_90"
    with pytest.raises(SystemExit, match="HISTOSEG_CUDA=0"):
        build["architecture_flags"]("compute_35\n")


def test_the_core_says_how_it_was_built():
    assert isinstance(_core.cuda_built, bool)
    assert _core.best_simd_level() in ("baseline", "avx2", "avx512")


def test_sanitizers(build, monkeypatch):
    monkeypatch.delenv("HISTOSEG_SANITIZE", raising=False)
    assert build["sanitizer_flags"]() == []
    for value, flag in (("address", "-fsanitize=address,undefined"), ("thread", "-fsanitize=thread")):
        monkeypatch.setenv("HISTOSEG_SANITIZE", value)
        assert flag in build["sanitizer_flags"]()
    monkeypatch.setenv("HISTOSEG_SANITIZE", "memory")
    with pytest.raises(SystemExit, match="use address or thread"):
        build["sanitizer_flags"]()
