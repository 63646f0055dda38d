"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".partial"
"""Ends the name of every file that is still being written; whatever carries it may be deleted."""

DIGEST_BLOCK_BYTES = 1 << 20
"""Files are digested in pieces of this size."""

NO_LINK_ERRNO = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS})
"""How systems say that a hard link cannot be made here, or not to this file."""

_numbers = itertools.count()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing and rename it to `path` when the block succeeds.

    On any error the temporary file is removed and `path` stays as it was. With `durable` the bytes are
    flushed to the disk before the rename (checkpoints and plans; a mask is checked by digest on resume
    instead). Missing parent folders are made. Raises OSError as the file system does.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    stream = open(partial, "wb")  # noqa: SIM115 (closed below, where a full disk may refuse its last bytes)
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


def _partial(target: Path) -> Path:
    """A name beside `target` for what is not whole yet, another one on every call."""
    # 40 characters are at most 160 bytes, so that the whole name stays under the usual limit of 255.
    return target.with_name(f".{target.name[:40]}.{os.getpid()}-{next(_numbers)}{TEMPORARY_SUFFIX}")


def atomic_link(source: Path, target: Path, check: Callable[[Path], None]) -> bool:
    """Make `target` a hard link to the regular file `source`; False where the file system cannot link them.

    check : called with a link to the bytes that `target` will have; what it raises leaves `target` as it was. Missing
    parent folders are made. Raises OSError as the file system does, FileNotFoundError where there is no `source`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    try:
        os.link(source, partial)
    except OSError as error:
        if error.errno in NO_LINK_ERRNO:
            return False
        raise
    try:
        check(partial)
        os.replace(partial, target)
    finally:  # renaming one link to a file over another one leaves both
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    return True


def sha256_of(file: BinaryIO) -> str:
    """Hex SHA-256 of what is left of a binary file opened for reading."""
    digest, block = hashlib.sha256(), memoryview(bytearray(DIGEST_BLOCK_BYTES))
    while count := file.readinto(block):  # type: ignore[attr-defined]
        digest.update(block[:count])
    return digest.hexdigest()
