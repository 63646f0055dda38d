"""scripts/gpu_check.sh with programs of a few lines in the place of Python, nvidia-smi and compute-sanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.sh"
STEPS = ["environment", "build", "doctor", "test-kernels", "demo-torch", "bench-torch-final", "bench-torch-fast"]
STEPS += [
    "test-torch",
    "test-pycuda",
    "test-tensorrt",
    "bench-tensorrt-final",
    "bench-tensorrt-fast",
    "memcheck",
    "racecheck",
]
PROGRAM = """#!/bin/sh
echo "$0 $*" >>"$CALLS"
case "$0 $*" in
    *compute-sanitizer*) exit 0 ;;
    $FAILS) echo "these are its last words"; exit 7 ;;
    $HANGS) sleep 60 ;;
esac
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux")


@pytest.fixture
def check(tmp_path):
    """Runs the script; `fails` and `hangs` are patterns of commands."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("nvidia-smi", "python3", "other-python", "compute-sanitizer"):
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)

    def run(fails="-", hangs="-", **more):
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "WHEELS", "BUDGET")}
        environment |= {"PATH": f"{programs}:/usr/bin:/bin", "CALLS": str(tmp_path / "calls"), **more}
        environment |= {"FAILS": fails, "HANGS": hangs}
        command = ["bash", str(SCRIPT), str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, cwd=tmp_path)
        summary = tmp_path / "out" / "summary.txt"
        rows = [line.split(None, 2) for line in summary.read_text().splitlines()] if summary.exists() else []
        return done, {row[1]: row[0] for row in rows}, (tmp_path / "calls").read_text()

    return run


def test_every_step_runs(check):
    done, results, calls = check()
    assert done.returncode == 0, done.stdout
    assert list(results) == STEPS and set(results.values()) == {"ok"}
    assert "HISTOSEG_CUDA" not in calls and "setup.py build_ext --inplace" in calls
    for plan in ("final", "fast"):
        assert f"--engine {plan} --json" in calls


def test_a_step_that_fails_does_not_stop_the_others(check):
    done, results, _ = check(fails="*setup.py*")
    assert done.returncode == 1 and "these are its last words" in done.stdout
    assert list(results) == STEPS
    assert [name for name, result in results.items() if result == "FAILED"] == ["build"]
    assert "exit code 7" in done.stdout.splitlines()[-len(STEPS) + 1]


def test_a_step_that_hangs_ends_with_the_budget_and_what_follows_is_skipped(check):
    done, results, _ = check(hangs="*doctor*", BUDGET="8")
    assert done.returncode == 1 and list(results) == STEPS
    assert results["build"] == "ok" and results["doctor"] == "FAILED"
    assert set(list(results.values())[3:]) == {"skipped"} and "no time left of 8 s" in done.stdout


def test_without_tensorrt(check):
    done, results, _ = check(fails="*import tensorrt*")
    assert done.returncode == 0
    assert results["tensorrt"] == "skipped" and not any("tensorrt-" in name for name in results)


def test_another_python_and_wheels(check, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a.whl").write_text("")
    _, results, calls = check(PYTHON="other-python", WHEELS=str(tmp_path / "wheels"))
    assert results["wheels"] == "ok" and "/python3" not in calls
    assert f"--no-index --no-deps --upgrade --target {tmp_path}/out/site {tmp_path}/wheels/a.whl" in calls


@pytest.mark.parametrize(("fails", "words"), [("*nvidia-smi*", "no NVIDIA GPU"), ("*is_available*", "set PYTHON")])
def test_without_a_gpu(check, fails, words):
    done, results, calls = check(fails=fails)
    assert done.returncode == 1 and words in done.stdout
    assert not results and "setup.py" not in calls


def test_the_modules_it_asks_for_are_those_that_are_used():
    """In this environment, which can run all of it, none is missing."""
    script = SCRIPT.read_text()
    program = script.partition("versions='\n")[2].partition("\n'\n")[0]
    names = " ".join(part.partition('"')[0] for part in script.split('MODULES="')[1:] + script.split('MODULES+="')[1:])
    done = subprocess.run([sys.executable, "-c", program, *names.split()], capture_output=True, text=True)
    assert done.returncode == 0 and f"numpy {__import__('numpy').__version__}" in done.stdout
    done = subprocess.run([sys.executable, "-c", program, "numpy", "no_such_module"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("missing: no_such_module")
