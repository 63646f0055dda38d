"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".partial"
"""Ends the name of every file that is still being written; whatever carries it may be deleted."""

BLOCK_BYTES = 1 << 20
"""Files are read and digested in pieces of this size."""


def refuse_irregular(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError where `path` is there and is no regular file: a folder, device, pipe, socket or link.

    A link is refused wherever it leads: a rename would replace the link and leave the file it names as it was, and
    writing through it would reach out of the folder that was asked for.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "it exists and is no regular file", os.fspath(path))


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing and rename it to `path` when the block succeeds.

    On any error the temporary file is removed and `path` stays as it was. With `durable` the bytes are
    flushed to the disk before the rename (checkpoints and plans; a mask is checked by digest on resume
    instead). Missing parent folders are made. Raises OSError as the file system does, and as `refuse_irregular`.
    """
    target = Path(path)
    refuse_irregular(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # 40 characters are at most 160 bytes, so that the whole name stays under the usual limit of 255. Nobody can guess
    # the rest, so in a folder that others may write to, no link waits there.
    partial = target.with_name(f".{target.name[:40]}.{os.urandom(8).hex()}{TEMPORARY_SUFFIX}")
    stream = open(partial, "xb")  # noqa: SIM115 (closed below, where a full disk may refuse its last bytes)
    try:
        yield stream
        stream.flush()
        if durable:
            os.fsync(stream.fileno())
        stream.close()
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            stream.close()
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def read_at_most(file: BinaryIO, limit: int) -> bytes:
    """What is left of `file`, at most `limit` bytes and one. Memory is taken for what there is, not for `limit`."""
    parts: list[bytes] = []
    left = limit + 1
    while left and (part := file.read(min(left, BLOCK_BYTES))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def sha256_of(file: BinaryIO) -> str:
    """Hex SHA-256 of what is left of a binary file opened for reading."""
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    while count := file.readinto(block):  # type: ignore[attr-defined]
        digest.update(block[:count])
    return digest.hexdigest()
