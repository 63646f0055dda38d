"""The bytes of an input: read once, digested, and watched for change."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from histoseg_fast.errors import ImageError
from histoseg_fast.files import sha256_of

WHOLE_FILE_BYTES = 256 * 2**20
"""Files up to this size are held in memory, so that digest and decode see the same bytes."""

MAX_ENCODED_BYTES = 2**30
"""Largest PNG or JPEG file; these formats have to be held and decoded whole."""

MAX_SLIDE_FILES = 10_000
"""Most files of one slide."""

OUT_OF_MEMORY = "there is not enough memory for it"
MORE_MEMORY = "free memory, or save it as a tiled TIFF"

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
TIFF = b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"
"""What a file of each format begins with."""

HEAD_BYTES = 132
"""What is looked at to recognise a format; the mark of DICOM ends here."""


def read_head(path: str | os.PathLike[str]) -> bytes:
    """The first `HEAD_BYTES` bytes of a regular file, or all it has. ImageError where it cannot be read."""
    try:
        with open_regular(Path(path)) as file:
            return file.read(HEAD_BYTES)
    except (OSError, ValueError) as error:
        raise _unreadable(Path(path), error) from error


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, unbuffered. ImageError where it is none, OSError or ValueError where it cannot be opened."""
    # Looked at before it is opened: opening a named pipe would wait for ever.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ImageError("is not a regular file", where=path, fix="give an image file")
    return open(path, "rb", buffering=0)


class Content:
    """One opened PNG, JPEG or TIFF file.

    Attributes
    ----------
    path, size : the file and its size in bytes.
    sha256 : hex digest of all its bytes.
    magic : its first 16 bytes. stamp : what `check_unchanged` compares.
    data : all bytes, or None for a file that is read by seeking (a TIFF over `WHOLE_FILE_BYTES`), and once closed.
    stream : a seekable binary stream over the same bytes.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Open, read or digest `path`. ImageError where that cannot be done, or makes no sense for what it is."""
        self.path = Path(path)
        try:
            file = open_regular(self.path)  # closed by close()
        except (OSError, ValueError) as error:
            raise _unreadable(self.path, error) from error
        try:
            self._take(file)
        except BaseException as error:
            file.close()
            if isinstance(error, MemoryError):
                raise ImageError(OUT_OF_MEMORY, where=self.path, fix=MORE_MEMORY) from error
            if isinstance(error, OSError) and not isinstance(error, ImageError):
                raise _unreadable(self.path, error) from error
            raise

    def _take(self, file: BinaryIO) -> None:
        self._lock = threading.Lock()
        status = os.fstat(file.fileno())
        self.stamp = _stamp(status)
        self.size = status.st_size
        if self.size == 0:
            raise ImageError("the file is empty", where=self.path, fix="copy or export it again")
        self.magic = file.read(16)
        file.seek(0)
        self._check_kind()
        self.data: bytes | None = None
        self.stream: BinaryIO = file
        self._held = self.size <= WHOLE_FILE_BYTES or not self.magic.startswith(TIFF)
        if not self._held:
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

    def _check_kind(self) -> None:
        """Refuse what no reader takes, before gigabytes of it are read."""
        if not self.magic.startswith((PNG, JPEG, *TIFF)):
            what = "is not a PNG, JPEG or TIFF file, nor a slide"
            raise ImageError(what, where=self.path, fix="convert it, or leave it out")
        if self.size > MAX_ENCODED_BYTES and not self.magic.startswith(TIFF):
            what = f"{self.size:,} bytes are too many for this format"
            raise ImageError(what, where=self.path, fix="save it as a tiled TIFF")

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on. ImageError where the file ends before that."""
        with self._lock:
            self.stream.seek(offset)
            while target:
                count = self.stream.readinto(target)  # type: ignore[attr-defined]
                if not count:
                    raise self._cut_off()
                target = target[count:]

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on. ImageError where the file ends before that, seen before they are allocated."""
        if size < 0 or offset + size > self.size:
            raise self._cut_off()
        with self._lock:
            self.stream.seek(offset)
            data = _read_whole(self.stream, size)
        if len(data) < size:
            raise self._cut_off()
        return data

    def _cut_off(self) -> ImageError:
        return ImageError("the file ends before its pixels do", where=self.path, fix="copy or export it again")

    def check_unchanged(self) -> None:
        """ImageError where a file that is read by seeking is no longer the one that was digested."""
        if not self._held:
            _check_stamp(self.path, self.stamp)

    def close(self) -> None:
        """Let go of the file and its bytes."""
        self.stream.close()
        self.data = None


class FileSet:
    """A slide that a library opens by its name: one file or several, digested, not held, and watched for change.

    Attributes
    ----------
    path, size : the file that was named, and the bytes of all files.
    sha256 : hex digest. Of one file: of its bytes. Of several: of what `sha256sum` prints for them, a line a file in
        the order of their names, which are relative to the folder of `path`.
    """

    def __init__(self, path: str | os.PathLike[str], companions: Iterable[Path] = (), known: Content | None = None):
        """Digest `path` and its `companions`. known : what has been digested before. ImageError where that cannot be
        done.
        """
        self.path = Path(path)
        self._known = {} if known is None else {known.path: (known.stamp, known.sha256)}
        self._stamps: dict[Path, tuple[int, int]] = {}
        files = {file.relative_to(self.path.parent).as_posix(): file for file in (self.path, *companions)}
        if len(files) > MAX_SLIDE_FILES:
            raise ImageError(f"{len(files):,} files belong to this slide", where=self.path, fix="check its folder")
        digests = {name: self._digest(files[name]) for name in sorted(files, key=os.fsencode)}
        self.size = sum(size for size, _ in self._stamps.values())
        self.sha256 = digests.popitem()[1] if len(digests) == 1 else _digest_of_list(digests)

    def _digest(self, file: Path) -> str:
        if file in self._known:
            self._stamps[file], digest = self._known[file]
            return digest
        try:
            with open_regular(file) as stream:
                self._stamps[file] = _stamp(os.fstat(stream.fileno()))
                return sha256_of(stream)
        except (OSError, ValueError) as error:
            raise _unreadable(file, error) from error

    def check_unchanged(self) -> None:
        """ImageError where a file is no longer the one that was digested."""
        for file, stamp in self._stamps.items():
            _check_stamp(file, stamp)

    def close(self) -> None:
        """Nothing: no file is held open."""


def _digest_of_list(digests: dict[str, str]) -> str:
    return hashlib.sha256(b"".join(os.fsencode(f"{digest}  {name}\n") for name, digest in digests.items())).hexdigest()


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _check_stamp(path: Path, stamp: tuple[int, int]) -> None:
    try:
        status = os.stat(path)
    except OSError as error:
        raise _changed(path) from error
    if _stamp(status) != stamp:
        raise _changed(path)


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
