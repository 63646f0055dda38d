"""What a benchmark reads: made-up fields, and files whose pages the system is asked to forget."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from histoseg_fast.images import write_png
from histoseg_fast.synthetic import make_field

FIELDS = 4
"""Different made-up fields; more images repeat them under other names, each a file of its own."""


def make_fields(folder: Path, count: int, poll: Callable[[], None] = lambda: None) -> None:
    """Write `count` PNG files of 1128x720 to `folder`, the same on every call; `poll` is called before each.

    Raises ImageError (disk full).
    """
    fields = [make_field(seed)[0] for seed in range(min(FIELDS, count))]
    for i in range(count):
        poll()
        write_png(folder / f"field_{i:05}.png", fields[i % FIELDS])


def forget_pages(paths: Iterable[Path]) -> bool:
    """Ask the system to drop the files' contents from its page cache; whether none of it is left there.

    Folders, the results, the plan and the libraries stay, and so does what the disk or a hypervisor keeps. False where
    the system does not drop them (a file system in memory), or does not tell (no Linux; a file of another user).
    """
    dropped = [_forget(path) for path in paths]
    return all(dropped)


def _forget(path: Path) -> bool:
    if not hasattr(os, "posix_fadvise"):
        return False
    try:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())  # a page that is not on the disk yet is not dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return pages_in_memory(stream) == 0
    except OSError:
        return False


def pages_in_memory(stream: BinaryIO) -> int:
    """How many pages of an open file are in the page cache. Raises OSError where the system does not tell."""
    size = os.fstat(stream.fileno()).st_size
    if not size:
        return 0
    # A read that must not wait would tell too, but starts to read ahead.
    resident = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
    with mmap.mmap(stream.fileno(), size, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size)
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, length, ctypes.c_void_p(resident.ctypes.data))
        del view  # the map cannot be closed while an array shows it
    if failed:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return int(np.count_nonzero(resident & 1))
