"""The bytes of one input file: read once, digested, and watched for change."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

from histoseg_fast.errors import ImageError
from histoseg_fast.files import sha256_of

WHOLE_FILE_BYTES = 256 * 2**20
"""Files up to this size are held in memory, so that digest and decode see the same bytes."""

MAX_ENCODED_BYTES = 2**30
"""Largest PNG or JPEG file; these formats have to be held and decoded whole."""


class Content:
    """One opened input file.

    Attributes
    ----------
    path, size : the file and its size in bytes.
    sha256 : hex digest of all its bytes.
    data : all bytes, or None for a file that is read by seeking (over `WHOLE_FILE_BYTES`).
    stream : a seekable binary stream over the same bytes.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Open, read or digest `path`. ImageError where that cannot be done."""
        self.path = Path(path)
        try:
            # Looked at before it is opened: opening a named pipe would wait for ever.
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise ImageError("is not a regular file", where=self.path, fix="give a PNG, JPEG or TIFF file")
            file: BinaryIO = open(self.path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except (OSError, ValueError) as error:
            raise _unreadable(self.path, error) from error
        try:
            self._take(file)
        except BaseException as error:
            file.close()
            if isinstance(error, OSError) and not isinstance(error, ImageError):
                raise _unreadable(self.path, error) from error
            raise

    def _take(self, file: BinaryIO) -> None:
        status = os.fstat(file.fileno())
        self._stamp = (status.st_size, status.st_mtime_ns)
        self.size = status.st_size
        if self.size == 0:
            raise ImageError("the file is empty", where=self.path, fix="copy or export it again")
        self.magic = file.read(16)
        file.seek(0)
        limit = WHOLE_FILE_BYTES if self.magic[:2] in (b"II", b"MM") else MAX_ENCODED_BYTES
        self.data: bytes | None = None
        self.stream: BinaryIO = file
        if self.size > limit:
            self.sha256 = sha256_of(file)
            file.seek(0)
            self.check_unchanged()
            return
        self.data = _read_whole(file, self.size)
        if len(self.data) != self.size or file.read(1):
            raise _changed(self.path)
        file.close()
        self.stream = io.BytesIO(self.data)
        self.sha256 = hashlib.sha256(self.data).hexdigest()

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on. ImageError where the file ends before that."""
        self.stream.seek(offset)
        while target:
            count = self.stream.readinto(target)  # type: ignore[attr-defined]
            if not count:
                raise ImageError("the file ends before its pixels do", where=self.path, fix="copy or export it again")
            target = target[count:]

    def check_unchanged(self) -> None:
        """ImageError where a file that is read by seeking is no longer the one that was digested."""
        if self.data is not None:
            return
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise _changed(self.path) from error
        if (status.st_size, status.st_mtime_ns) != self._stamp:
            raise _changed(self.path)

    def close(self) -> None:
        """Let go of the file and its bytes."""
        self.stream.close()


def _read_whole(file: BinaryIO, size: int) -> bytes:
    """Up to `size` bytes; an unbuffered read may give less than it was asked for."""
    data = file.read(size)
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            break
        data += more
    return data


def _changed(path: Path) -> ImageError:
    return ImageError("changed while it was read", where=path, fix="run again when nothing writes to it")


def _unreadable(path: Path, error: OSError | ValueError) -> ImageError:
    if isinstance(error, ImageError):
        return error
    fixes: dict[type[Exception], str] = {
        FileNotFoundError: "check the path; the file may have been moved or deleted",
        PermissionError: "give this user the right to read it",
    }
    reason = getattr(error, "strerror", None) or str(error)
    return ImageError(
        f"cannot be read: {reason}", where=path, fix=fixes.get(type(error), "check the disk and the path")
    )
