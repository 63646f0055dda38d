"""The GPU as the driver tells it: against a driver of a few lines of C."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRIVER = r"""
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuCtxGetDevice(int *device) { if (CONTEXT < 0) return 201; *device = CONTEXT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return DEVICES ? 0 : 101; }
int cuDeviceGetName(char *name, int size, int device) {
    strncpy(name, device ? "Second" : "NVIDIA H200", size);
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : device; return 0; }
"""
ASK = """
from histoseg_fast.engines.trt.gpu import current_gpu, gpu_at
try:
    print(current_gpu(), current_gpu().sm, gpu_at(1))
except Exception as error:
    print(error)
"""
compiled = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")


def ask(folder=""):
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


@compiled
@pytest.mark.parametrize(
    ("init", "context", "devices", "answer"),
    [
        (0, -1, 1, "NVIDIA H200 (sm90) sm90 Second (sm91)"),
        (0, 1, 1, "Second (sm91) sm91 Second (sm91)"),
        (100, -1, 1, "the NVIDIA driver does not start (CUDA error 100); run nvidia-smi; --device cpu"),
        (0, -1, 0, "no NVIDIA GPU can be used (cuDeviceGet: CUDA error 101); use --device cpu"),
    ],
)
def test_what_the_driver_says(tmp_path, init, context, devices, answer):
    (tmp_path / "driver.c").write_text(DRIVER)
    numbers = {"INIT": init, "CONTEXT": context, "DEVICES": devices}
    definitions = [f"-D{name}={value}" for name, value in numbers.items()]
    target = str(tmp_path / "libcuda.so.1")
    subprocess.run(["cc", "-shared", "-fPIC", *definitions, "-o", target, str(tmp_path / "driver.c")], check=True)
    assert ask(tmp_path) == answer


def test_no_driver(monkeypatch):
    from histoseg_fast.engines.trt import gpu

    monkeypatch.setattr(gpu, "_DRIVER", "libcuda-that-is-not-there.so.1")
    with pytest.raises(gpu.EngineError, match="no NVIDIA driver was found; use --device cpu"):
        gpu.current_gpu()
