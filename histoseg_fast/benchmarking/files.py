"""What a benchmark reads: made-up fields, and files whose pages the system is asked to forget."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from histoseg_fast.images import write_png
from histoseg_fast.synthetic import make_field

FIELDS = 4
"""Different made-up fields; more images repeat them under other names, each a file of its own."""
PROBES = 8
"""Places of a file that are looked at to see whether it is in memory."""


def make_fields(folder: Path, count: int) -> None:
    """Write `count` PNG files of 1128x720 to `folder`, the same on every call. Raises ImageError (disk full)."""
    fields = [make_field(seed)[0] for seed in range(min(FIELDS, count))]
    for i in range(count):
        write_png(folder / f"field_{i:05}.png", fields[i % FIELDS])


def forget_pages(paths: Iterable[Path]) -> bool:
    """Ask the system to drop the files' contents from its page cache; whether none of it is left there.

    Folders, the results, the plan and the libraries stay, and so does what the disk or a hypervisor keeps. False where
    the system cannot drop them (a file system in memory), or cannot tell (no Linux).
    """
    dropped = [_forget(path) for path in paths]
    return all(dropped)


def _forget(path: Path) -> bool:
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"):
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # a page that is not on the disk yet is not dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(descriptor).st_size
        return not any(_in_memory(descriptor, size * i // PROBES) for i in range(PROBES))
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _in_memory(descriptor: int, offset: int) -> bool:
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True
