"""Which devices `--device` names, and which library runs them. Where there is no GPU, asking costs next to nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from histoseg_fast.engines.trt.gpu import NoGpuError, gpu_count
from histoseg_fast.errors import EngineError, UsageError
from histoseg_fast.extras import has

DEVICES = ("auto", "cpu", "cuda", "cuda:1", "cuda:0,1")
"""What `--device` takes; any other GPUs likewise."""
LIBRARIES = ("tensorrt", "torch", "none")
LIBRARY_VARIABLE = "HISTOSEG_GPU_ENGINE"
"""Set to one of `LIBRARIES`: runs that one on GPUs, or says why it cannot. Under "none" `auto` is the CPU."""
NO_LIBRARY = "neither TensorRT with pycuda nor PyTorch with CUDA is installed"
INSTALL = "pip install 'histoseg-fast[tensorrt]', or '[train]' for PyTorch"


def parse_device(text: str) -> tuple[int, ...] | None:
    """The GPUs that `text` names by number: () for the CPU, None for "auto". Raises UsageError."""
    if text in ("auto", "cpu"):
        return None if text == "auto" else ()
    match = re.fullmatch(r"cuda(?::(\d{1,4}(?:,\d{1,4})*))?", text, re.ASCII)
    if match is None:
        raise UsageError(f"unknown device {text!r}", fix="choose one of " + ", ".join(DEVICES))
    indices = tuple(int(number) for number in (match[1] or "0").split(","))
    if len(set(indices)) < len(indices):
        raise UsageError(f"device {text!r} names a GPU twice")
    return indices


def choose_gpus(device: str, report: Callable[[str], None]) -> tuple[tuple[int, ...], str]:
    """The GPUs that `device` means here and the library for them; none for the CPU.

    "auto" is the first GPU if there is one and a library for it. Raises UsageError for an unknown device, EngineError
    for GPUs that are not there or cannot be used.
    """
    indices = parse_device(device)
    if indices == () or (indices is None and os.environ.get(LIBRARY_VARIABLE) == "none"):
        return (), ""
    try:
        count = gpu_count()
    except EngineError as error:
        if indices is not None:
            raise
        if not isinstance(error, NoGpuError):
            report(f"going on with the CPU: {error}")
        return (), ""
    if indices is None:
        indices = (0,) if count else ()
    if missing := [index for index in indices if index >= count]:
        here = f"this machine has {count}, numbered from 0" if count else "this machine has none"
        raise EngineError(f"there is no GPU {missing[0]}: {here}", fix="use --device auto")
    if not indices:
        return (), ""
    library = choose_library(report)
    if library:
        return indices, library
    if device == "auto":
        report(f"this machine has a GPU, but {NO_LIBRARY}: going on with the CPU ({INSTALL})")
        return (), ""
    raise EngineError(NO_LIBRARY, fix=f"{INSTALL}; or use --device cpu")


def choose_library(report: Callable[[str], None]) -> str:
    """TensorRT where it can be imported, else PyTorch if it was built for CUDA, else ""; or what the variable says.

    Raises EngineError if what the variable names cannot be imported, UsageError if it is unknown.
    """
    wanted = os.environ.get(LIBRARY_VARIABLE) or "auto"
    if wanted not in ("auto", *LIBRARIES):
        raise UsageError(f"{LIBRARY_VARIABLE}={wanted!r} is not known", fix="choose one of " + ", ".join(LIBRARIES))
    if wanted == "none":
        raise EngineError(f"{LIBRARY_VARIABLE}=none keeps GPUs out", fix="unset it, or use --device cpu")
    for library, packages, check in (
        ("tensorrt", ("tensorrt", "pycuda"), _check_tensorrt),
        ("torch", ("torch", "onnx"), _check_torch),
    ):
        if wanted not in ("auto", library):
            continue
        try:
            if wanted == library or has(*packages):
                check()
                return library
        except EngineError as error:
            if wanted == library:
                raise
            report(f"{library} is installed, but cannot be used: {error}")
    return ""


def _check_tensorrt() -> None:
    from histoseg_fast.engines.trt.library import tensorrt
    from histoseg_fast.engines.trt.memory import check_pycuda

    tensorrt()
    check_pycuda()


def _check_torch() -> None:
    try:
        import onnx  # noqa: F401
        import torch
    except (ImportError, OSError) as error:
        raise EngineError(f"PyTorch cannot be used ({error})", fix="pip install 'histoseg-fast[train]'") from error
    if not torch.cuda.is_available():
        raise EngineError("this PyTorch finds no GPU", fix="install a build of PyTorch for CUDA")
