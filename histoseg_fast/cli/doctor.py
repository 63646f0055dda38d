"""`histoseg-fast doctor`: what this machine can run, and what would help."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
from dataclasses import asdict, dataclass

import typer

NAME = "doctor"
DRIVER_SECONDS = 10
"""A hung GPU driver must not hang the doctor."""
EXTRAS = {"train": ("torch", "torchvision", "onnx", "onnxscript", "safetensors", "matplotlib", "tensorboard")}


@dataclass(frozen=True)
class Finding:
    """One line: `ok` is whether the thing is there; `fix` what to do where it is not."""

    what: str
    ok: bool
    detail: str
    fix: str = ""


def command(as_json: bool = typer.Option(False, "--json", help="Print the findings as JSON.")) -> int:
    """Say what this machine can run: CPU, GPU, engines, extras and the shipped plan, with a fix for each lack."""
    findings = [_cpu(), _core(), _openvino(), _plan(), _gpu(), _tensorrt(), _device(), _openslide(), *_extras()]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{'yes' if finding.ok else 'no ':<4} {finding.what:<20} {finding.detail}")
            if finding.fix:
                print(f"{'':<25} -> {finding.fix}")
    return 0 if all(finding.ok for finding in findings[:4]) else 1


def _cpu() -> Finding:
    from histoseg_fast.machine import available_cores, cpu_flags, cpu_name, cpu_precisions

    flags = ", ".join(sorted(cpu_flags())) or "no vector flags known"
    runs = ", ".join(cpu_precisions())
    return Finding("CPU", True, f"{cpu_name()}, {available_cores()} core(s), {flags}; runs {runs}")


def _core() -> Finding:
    try:
        from histoseg_fast import _core
    except ImportError as error:
        return Finding("C++ core", False, str(error), "pip install --force-reinstall histoseg-fast")
    return Finding("C++ core", True, "built with CUDA kernels" if _core.cuda_built else "built without CUDA kernels")


def _openvino() -> Finding:
    try:
        import openvino

        return Finding("OpenVINO", True, openvino.__version__)
    except ImportError as error:
        return Finding("OpenVINO", False, str(error), "pip install openvino")


def _plan() -> Finding:
    from histoseg_fast.engines import choose_precision
    from histoseg_fast.errors import HistosegError
    from histoseg_fast.plans import SHIPPED, open_plan

    try:
        plans = [open_plan(name) for name in SHIPPED]
    except HistosegError as error:
        return Finding("shipped plans", False, str(error), "pip install --force-reinstall histoseg-fast")
    names = ", ".join(f"{plan.name} (runs {choose_precision(plan, 'auto')} here)" for plan in plans)
    return Finding("shipped plans", True, names)


def _gpu() -> Finding:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding("NVIDIA GPU", False, "no driver found", "nothing to do unless this machine has an NVIDIA GPU")
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=DRIVER_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("NVIDIA GPU", False, f"nvidia-smi failed ({error})", "reinstall or reload the NVIDIA driver")
    return Finding("NVIDIA GPU", True, "; ".join(done.stdout.strip().splitlines()))


def _tensorrt() -> Finding:
    missing = [package for package in ("tensorrt", "pycuda") if _version(package) is None]
    if missing:
        fix = "pip install 'histoseg-fast[tensorrt]' on machines with an NVIDIA GPU"
        return Finding("TensorRT", False, f"{' and '.join(missing)} not installed", fix)
    return Finding("TensorRT", True, f"{_version('tensorrt')}, pycuda {_version('pycuda')}")


def _device() -> Finding:
    """What `--device auto` comes to; imports PyTorch or TensorRT only where there is a GPU."""
    from histoseg_fast.engines.devices import choose_gpus
    from histoseg_fast.errors import HistosegError

    lines: list[str] = []
    try:
        indices, library = choose_gpus("auto", lines.append)
    except HistosegError as error:
        return Finding("--device auto", False, str(error), error.fix or "use --device cpu")
    if indices:
        return Finding("--device auto", True, f"the first GPU, by {library}")
    return Finding("--device auto", True, "; ".join(lines) or "the CPU: no GPU that CUDA can use")


def _openslide() -> Finding:
    fix = "pip install 'histoseg-fast[slides]' for NDPI, MRXS, DICOM and others; SVS and pyramidal TIFF need none"
    try:
        import openslide
    except ImportError as error:
        return Finding("OpenSlide", False, str(error).partition("\n")[0], fix)
    if _version("pydicom") is None:
        return Finding("OpenSlide", False, "pydicom not installed, which DICOM slides of several files need", fix)
    versions = f"{openslide.__library_version__}, openslide-python {openslide.__version__}"
    return Finding("OpenSlide", True, f"{versions}, pydicom {_version('pydicom')}")


def _extras() -> list[Finding]:
    from histoseg_fast.extras import has

    findings = []
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if not has(package)]
        detail = f"lacks {', '.join(missing)}" if missing else ", ".join(f"{p} {_version(p)}" for p in packages)
        findings.append(
            Finding(f"extra [{extra}]", not missing, detail, f"pip install 'histoseg-fast[{extra}]'" if missing else "")
        )
    return findings


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
