"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".partial"
_PARTIAL_NAME = re.compile(r"\.(.*\.)?[0-9a-f]{16}\.partial", re.DOTALL)
"""Ends the name of every file that is still being written; whatever carries it may be deleted."""

BLOCK_BYTES = 1 << 20
"""Files are read and digested in pieces of this size."""

NO_LINK_ERRNO = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS})
"""How systems say that a hard link cannot be made here, or not to this file."""


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
    partial = _partial(target)
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


def probe(path: str | os.PathLike[str]) -> None:
    """Raise what `atomic_write` would on opening `path`, before the work whose result goes there; leaves nothing."""
    target = Path(path)
    refuse_irregular(target)
    folder = next(parent for parent in target.absolute().parents if os.path.lexists(parent))  # others would be made
    partial = _partial(folder / target.name)
    open(partial, "xb").close()
    os.unlink(partial)


def read_at_most(file: BinaryIO, limit: int) -> bytes:
    """What is left of `file`, at most `limit` bytes and one. Memory is taken for what there is, not for `limit`."""
    parts: list[bytes] = []
    left = limit + 1
    while left and (part := file.read(min(left, BLOCK_BYTES))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def is_partial(name: str) -> bool:
    """Whether a file of that name is one that `atomic_write` had not finished."""
    return _PARTIAL_NAME.fullmatch(name) is not None


def _partial(target: Path) -> Path:
    """A name beside `target` for what is not whole yet, another one on every call."""
    # 40 characters are at most 160 bytes, so that the whole name stays under the usual limit of 255. Nobody can guess
    # the rest, so in a folder that others may write to, no link waits there.
    return target.with_name(f".{target.name[:40]}.{os.urandom(8).hex()}{TEMPORARY_SUFFIX}")


def atomic_link(source: Path, target: Path, check: Callable[[Path], None]) -> bool:
    """Make `target` a hard link to the regular file `source`; False where the file system cannot link them.

    check : called with a link to the bytes that `target` will have; what it raises leaves `target` as it was. Missing
    parent folders are made. Raises OSError as the file system does, FileNotFoundError where there is no `source`.
    """
    refuse_irregular(target)
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
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    while count := file.readinto(block):  # type: ignore[attr-defined]
        digest.update(block[:count])
    return digest.hexdigest()
