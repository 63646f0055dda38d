"""Engines kept between runs: a folder of the user's, one file an engine, locked between processes, bounded in size."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from histoseg_fast.cache import cache_folder
from histoseg_fast.engines.trt.gpu import Gpu
from histoseg_fast.engines.trt.info import (
    MAX_ENGINE_BYTES,
    MAX_HEADER_BYTES,
    EngineInfo,
    pack_entry,
    unpack_entry,
    unpack_header,
)
from histoseg_fast.errors import EngineError
from histoseg_fast.files import TEMPORARY_SUFFIX, atomic_write

MAX_CACHE_BYTES = 8 << 30
"""All engines together; the least recently used are removed first."""
MAX_TIMING_BYTES = 64 << 20
LOCK_SECONDS = 3600.0
"""Longest wait for another process that builds the same engine."""
POLL_SECONDS = 0.2
SUFFIX = ".engine"
_DIGEST_BYTES = 32


class EngineCache:
    """The engines of one network and options (`digest`), for every GPU and TensorRT they were built for."""

    def __init__(self, digest: str, folder: Path | None = None):
        self._root = folder or cache_folder() / "tensorrt"
        self._folder = self._root / digest[:32]

    def find(self, gpu: Gpu, tensorrt: str) -> tuple[EngineInfo, bytes] | str:
        """An engine that runs here, or why there is none: of the entry used last."""
        reason = "none is in the cache"
        for path in sorted(self._entries(self._folder), key=_age):
            try:
                with open(path, "rb") as stream:
                    info, _ = unpack_header(stream.read(MAX_HEADER_BYTES))
                    if misfit := info.misfit(gpu, tensorrt):
                        reason = f"the one in the cache {misfit}"
                        continue
                    stream.seek(0)
                    found = unpack_entry(stream.read(MAX_ENGINE_BYTES + MAX_HEADER_BYTES + 1))
                with contextlib.suppress(OSError):
                    os.utime(path)
                return found
            except (OSError, ValueError) as error:
                reason = f"the one in the cache is damaged ({error})"
        return reason

    def keep(self, info: EngineInfo, data: bytes) -> None:
        """Add an engine, whole or not at all; remove the least recently used ones beyond the limit, and what was only
        half written long ago. Raises OSError."""
        path = self._folder / f"{_slug(f'{info.gpu.sm}-{info.gpu.name}')}-{_slug(info.tensorrt)}{SUFFIX}"
        with atomic_write(path) as stream:
            stream.write(pack_entry(info, data))
        total = 0
        for left in self._root.rglob(f"*{TEMPORARY_SUFFIX}"):  # by a process that was killed as it wrote
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > LOCK_SECONDS:
                    left.unlink()
        for entry in sorted(self._entries(self._root), key=_age):
            with contextlib.suppress(OSError):  # another process may be removing it, too
                total += entry.stat().st_size
                if total > MAX_CACHE_BYTES and entry != path:
                    entry.unlink()

    @contextlib.contextmanager
    def locked(self, gpu: Gpu, tensorrt: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the lock on this engine; `waiting` is called once if another process holds it.

        The system frees the lock of a process that dies. Where the folder cannot be written there is nothing to
        guard, and no lock. Raises EngineError after `LOCK_SECONDS`.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            stream = open(self._folder / f"{_slug(gpu.sm)}-{_slug(tensorrt)}.lock", "ab")  # noqa: SIM115
        except OSError:
            yield
            return
        with stream:
            end = time.monotonic() + LOCK_SECONDS
            told = False
            while not _try_lock(stream.fileno()):
                if time.monotonic() > end:
                    raise EngineError("another process has been building this engine for too long", where=stream.name)
                if not told:
                    waiting()
                told = True
                time.sleep(POLL_SECONDS)
            yield  # closing the file frees the lock

    def timing(self, gpu: Gpu, tensorrt: str) -> bytes:
        """TensorRT's timing cache from earlier builds on this GPU, or nothing where there is no sound one."""
        try:
            with open(self._timing_path(gpu, tensorrt), "rb") as stream:
                digest, data = stream.read(_DIGEST_BYTES), stream.read(MAX_TIMING_BYTES + 1)
        except OSError:
            return b""
        return data if len(data) <= MAX_TIMING_BYTES and hashlib.sha256(data).digest() == digest else b""

    def keep_timing(self, gpu: Gpu, tensorrt: str, data: bytes) -> None:
        """Keep it for the next build. Raises OSError."""
        if 0 < len(data) <= MAX_TIMING_BYTES:
            with atomic_write(self._timing_path(gpu, tensorrt)) as stream:
                stream.write(hashlib.sha256(data).digest() + data)

    def _timing_path(self, gpu: Gpu, tensorrt: str) -> Path:
        return self._root / "timing" / f"{_slug(f'{gpu.sm}-{gpu.name}')}-{_slug(tensorrt)}.timing"

    @staticmethod
    def _entries(folder: Path) -> list[Path]:
        try:
            return list(folder.rglob(f"*{SUFFIX}"))
        except OSError:
            return []


def _age(path: Path) -> float:
    """Sorts the most recently used first, what has gone meanwhile last."""
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", text)[:80]


def _try_lock(descriptor: int) -> bool:
    """Lock an open file for this process. False: another one holds it. True, too, where files cannot be locked."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # some network file systems; then two processes may build at the same time, each its own file
        return True
    return True
