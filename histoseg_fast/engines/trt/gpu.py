"""Which GPU this process would use, asked of the CUDA driver itself: no CUDA package is needed for that."""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

from histoseg_fast.errors import EngineError, one_line

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_NAME_BYTES = 256
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


class NoGpuError(EngineError):
    """A machine without an NVIDIA GPU, or without its driver: nothing is wrong with it."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as engines know it: its `name` and compute `capability` (major, minor)."""

    name: str
    capability: tuple[int, int]

    @property
    def sm(self) -> str:
        """The architecture as compilers call it, e.g. "sm90"."""
        return f"sm{self.capability[0]}{self.capability[1]}"

    def __str__(self) -> str:
        return f"{self.name} ({self.sm})"


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver's library, started. Raises NoGpuError where there is none, which costs a look at the disk;
    EngineError where it does not start.
    """
    try:
        cuda = ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise NoGpuError("no NVIDIA driver was found", fix="use --device cpu") from error
    if code := cuda.cuInit(0):
        kind = NoGpuError if code == _NO_DEVICE else EngineError
        raise kind(f"the NVIDIA driver does not start (CUDA error {code})", fix="run nvidia-smi; --device cpu")
    return cuda


def gpu_count() -> int:
    """How many GPUs this process may use. Raises what `driver` raises."""
    count = ctypes.c_int()
    _call(driver().cuDeviceGetCount, ctypes.byref(count))
    return count.value


def current_gpu() -> Gpu:
    """The GPU of the calling thread's CUDA context, or the first one. Raises EngineError where there is none."""
    device = ctypes.c_int()
    if driver().cuCtxGetDevice(ctypes.byref(device)):  # no context yet: TensorRT takes the first GPU
        return gpu_at(0)
    return _gpu(device)


def gpu_at(index: int) -> Gpu:
    """The GPU of this number. Raises EngineError where there is none."""
    device = ctypes.c_int()
    _call(driver().cuDeviceGet, ctypes.byref(device), index)
    return _gpu(device)


def _gpu(device: ctypes.c_int) -> Gpu:
    cuda = driver()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    _call(cuda.cuDeviceGetName, name, _NAME_BYTES, device)
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        number = ctypes.c_int()
        _call(cuda.cuDeviceGetAttribute, ctypes.byref(number), attribute, device)
        numbers.append(number.value)
    return Gpu(one_line(name.value.decode(errors="replace")), (numbers[0], numbers[1]))


def _call(function: ctypes._CFuncPtr, *arguments: object) -> None:  # type: ignore[name-defined]
    if code := function(*arguments):
        raise EngineError(f"no NVIDIA GPU can be used ({function.__name__}: CUDA error {code})", fix="use --device cpu")
