"""Builds the native parts: the C++ core, the CUDA siblings where there is an nvcc, and the Cython modules.

HISTOSEG_CUDA=auto (the default) builds the CUDA sources if nvcc is on PATH or in CUDA_HOME or CUDA_PATH; 0 never does,
1 insists. What is built imports on machines without a GPU and without CUDA libraries: the runtime is linked in.
HISTOSEG_SANITIZE=address or thread builds the C++ core with gcc's sanitizers, for `scripts/sanitize.sh`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
CUDA_ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME or CUDA_PATH, else the one on PATH."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [shutil.which("nvcc", path=os.path.join(home, "bin")) for home in homes]
    return next(filter(None, found), None) or shutil.which("nvcc")


def cuda_compiler() -> str | None:
    """The nvcc to build with, or None to build without CUDA, as HISTOSEG_CUDA says."""
    wanted = os.environ.get("HISTOSEG_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"HISTOSEG_CUDA={wanted!r} is not known; use auto, 0 or 1")
    if wanted == "0":
        return None
    nvcc = find_nvcc()
    if wanted == "1" and nvcc is None:
        raise SystemExit("HISTOSEG_CUDA=1, but no nvcc on PATH, in CUDA_HOME or in CUDA_PATH; install the CUDA toolkit")
    return nvcc


def architecture_flags(listing: str) -> list[str]:
    """-gencode flags for those CUDA_ARCHITECTURES that `nvcc --list-gpu-arch` printed, with PTX of the newest."""
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", listing)}
    chosen = [number for number in CUDA_ARCHITECTURES if number in known]
    if not chosen:
        raise SystemExit(f"nvcc knows none of the GPU architectures {CUDA_ARCHITECTURES}; use HISTOSEG_CUDA=0")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in chosen]
    return [*flags, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


def cuda_library_folders(nvcc: str) -> list[str]:
    """Where nvcc itself would link from: it may be a wrapper, so that its own path says nothing."""
    shown = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    line = re.search(r"LIBRARIES=(.*)", shown)
    return [flag[2:] for flag in shlex.split(line[1]) if flag.startswith("-L")] if line else []


def cuda_flags() -> list[str]:
    """What nvcc gets besides architectures. No fused multiply-adds: the device's sums equal the host's bit for bit."""
    host = "/O2,/MD" if sys.platform == "win32" else "-fPIC,-fvisibility=hidden,-ffp-contract=off"
    return ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler", host]


def compile_cuda(nvcc: str, sources: list[str], folder: Path, show) -> list[str]:
    """The object files of `sources`, each compiled for all architectures."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    flags = [*cuda_flags(), "--threads", "2", *architecture_flags(listing)]
    folder.mkdir(parents=True, exist_ok=True)
    headers = max(path.stat().st_mtime for path in ROOT.glob("csrc/*.h"))
    objects = []
    for source in sources:
        target = folder / (Path(source).stem + (".cuda.obj" if sys.platform == "win32" else ".cuda.o"))
        objects.append(os.fspath(target))
        if target.exists() and target.stat().st_mtime > max(headers, (ROOT / source).stat().st_mtime):
            continue
        command = [nvcc, "-c", source, "-o", os.fspath(target), *flags]
        show(" ".join(command))
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise SystemExit(f"nvcc failed on {source} (its own words are above); HISTOSEG_CUDA=0 builds without CUDA")
    return objects


class BuildExt(build_ext):
    """build_ext that adds the CUDA objects to the core."""

    def build_extension(self, extension: Extension) -> None:
        if extension.name == "histoseg_fast._core" and (nvcc := cuda_compiler()):
            self.add_cuda(extension, nvcc)
        super().build_extension(extension)

    def add_cuda(self, extension: Extension, nvcc: str) -> None:
        sources = sorted(os.fspath(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cu"))
        extension.extra_objects += compile_cuda(nvcc, sources, Path(self.build_temp, "csrc"), self.announce_command)
        extension.define_macros.append(("HISTOSEG_CUDA_BUILT", "1"))
        extension.library_dirs += cuda_library_folders(nvcc)
        extension.libraries.append("cudart_static")
        if sys.platform != "win32":
            extension.libraries += ["dl", "rt", "pthread"]
            # Another copy of the runtime in the process (PyTorch's) must not be mistaken for this one.
            extension.extra_link_args.append("-Wl,--exclude-libs,ALL")

    def announce_command(self, command: str) -> None:
        self.announce(command, level=2)


def sanitizer_flags() -> list[str]:
    """What HISTOSEG_SANITIZE asks for, for compiler and linker alike; nothing by default."""
    wanted = os.environ.get("HISTOSEG_SANITIZE", "")
    if not wanted:
        return []
    if wanted not in SANITIZERS:
        raise SystemExit(f"HISTOSEG_SANITIZE={wanted!r} is not known; use {' or '.join(SANITIZERS)}")
    return [f"-fsanitize={SANITIZERS[wanted]}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]


def core_extension() -> Extension:
    """The C++ core."""
    import pybind11

    sanitizers = sanitizer_flags()
    if sys.platform == "win32":
        compile_args, link_args = ["/std:c++17", "/O2", "/EHsc", "/fp:precise", "/permissive-"], []
    else:
        compile_args = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
        compile_args += ["-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
        link_args = ["-pthread"] if sys.platform.startswith("linux") else []
    return Extension(
        "histoseg_fast._core",
        sorted(os.fspath(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")),
        depends=sorted(os.fspath(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.[hc]*")),
        include_dirs=["csrc", pybind11.get_include()],
        extra_compile_args=[*compile_args, *sanitizers],
        extra_link_args=[*link_args, *sanitizers],
        language="c++",
    )


def cython_extensions() -> list[Extension]:
    """One module for each .pyx of the package."""
    paths = sorted(path.relative_to(ROOT) for path in ROOT.glob("histoseg_fast/**/*.pyx"))
    if not paths:
        return []
    import numpy
    from Cython.Build import cythonize

    optimise = ["/O2"] if sys.platform == "win32" else ["-O3", "-g0"]
    modules = [
        Extension(
            ".".join(path.with_suffix("").parts),
            [path.as_posix()],
            include_dirs=[numpy.get_include()],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
            extra_compile_args=optimise,
        )
        for path in paths
    ]
    return cythonize(modules, language_level=3)


if __name__ == "__main__":
    os.chdir(ROOT)
    cuda_compiler()
    setup(ext_modules=[core_extension(), *cython_extensions()], cmdclass={"build_ext": BuildExt})
