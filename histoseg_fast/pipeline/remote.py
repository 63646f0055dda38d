"""Folders behind URLs that fsspec knows (s3://, gs://, abfs://, ...): what is read is copied here, what is written is
copied there.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from histoseg_fast.errors import HistosegError, ImageError, UsageError
from histoseg_fast.extras import need
from histoseg_fast.images.companions import OF_SEVERAL_FILES
from histoseg_fast.pipeline.records import MANIFEST, OUTPUT_FOLDERS, RUN, SUMMARY, drop_run
from histoseg_fast.pipeline.sources import (
    FOREIGN,
    FOREIGN_FIX,
    READ_SUFFIXES,
    Listed,
    Source,
    is_url,
    refuse_foreign,
)

FETCHERS = 4
"""Copies that are made at a time."""
AHEAD = 8
"""Images that are copied before a reader asks for them."""
BLOCK_BYTES = 8 << 20
PREFIX = "histoseg-fast-"
"""Of the temporary folder."""
SYNC_SECONDS = 10.0
"""The manifest is copied to its URL at most this often,"""
SYNC_SHARE = 0.1
"""and for no more than this share of the time."""


@contextlib.contextmanager
def _asking(url: str, doing: str, *passed: type[Exception]) -> Iterator[None]:
    """Make ImageError of whatever a file system raises, but for what is `passed` on: each has errors of its own."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (HistosegError, *passed)):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ImageError(f"cannot be {doing}: {reason}", where=url, fix="check address, rights and network") from error


@dataclass(frozen=True)
class Remote:
    """What a URL names. fs : its fsspec file system. root : its path there, without a slash at the end."""

    url: str
    fs: Any
    root: str

    @classmethod
    def open(cls, url: str) -> Remote:
        """Raises UsageError where fsspec, or what it needs for this kind of URL, is not installed."""
        need("cloud", "fsspec")
        import fsspec

        if "://" not in url:
            raise UsageError("is no whole URL", where=url, fix="write it with two slashes, as s3://bucket/folder")
        try:
            fs, root = fsspec.url_to_fs(url)
        except Exception as error:  # an unknown protocol, a package that is missing, no credentials
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(f"cannot be opened: {reason}", where=url, fix="pip install what it names") from error
        return cls(url.rstrip("/"), fs, root.rstrip("/"))

    def files(self, out: Remote | None) -> list[Listed]:
        """The images that it names: a file, a folder (searched as `walk` does), or a pattern; `out` is left out.

        Raises ImageError where it cannot be listed.
        """
        with _asking(self.url, "listed"):
            fixed = self.root
            if glob.has_magic(self.root):
                fixed = "/".join(_until_magic(self.root.split("/")))
                found = self.fs.glob(self.root, detail=True)
            elif self.fs.isfile(self.root):
                fixed = self.root.rpartition("/")[0]
                return [self._listed(self.root, fixed, self.fs.info(self.root))]
            else:
                found = self.fs.find(self.root, detail=True)
        runs = {path.rpartition("/")[0] for path in found if path.rpartition("/")[2] == MANIFEST}
        results = tuple(f"{run}/{name}/" for run in runs for name in OUTPUT_FOLDERS)
        if out is not None and type(out.fs) is type(self.fs):
            results += (f"{out.root}/",)
        return [
            self._listed(path, fixed, info)
            for path, info in sorted(found.items())
            if info.get("type") == "file" and _wanted(path[len(fixed) :]) and not path.startswith(results)
        ]

    def _listed(self, path: str, fixed: str, info: Mapping[str, Any]) -> Listed:
        name = path[len(fixed) :].lstrip("/")
        return Listed(Path(name), name, self.fs.unstrip_protocol(path), int(info.get("size") or 0))

    def read(self, name: str = "") -> Iterator[bytes]:
        """The bytes of a file below it, or of itself, in blocks. Raises FileNotFoundError, ImageError."""
        path = f"{self.root}/{name}" if name else self.root
        url = f"{self.url}/{name}" if name else self.url
        with _asking(url, "read", FileNotFoundError), self.fs.open(path, "rb", block_size=BLOCK_BYTES) as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block

    def digest(self, name: str) -> str | None:
        """Hex SHA-256 of a file below it; None where it cannot be read."""
        digest = hashlib.sha256()
        try:
            for block in self.read(name):
                digest.update(block)
        except (FileNotFoundError, ImageError):
            return None
        return digest.hexdigest()

    def put(self, file: Path, name: str) -> None:
        """Copy a file there; stores of objects show it whole or not at all. Raises ImageError."""
        with _asking(f"{self.url}/{name}", "written"):
            path = f"{self.root}/{name}"
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.fs.put_file(os.fspath(file), path)

    def remove(self, name: str) -> None:
        """Delete a file that may be there. Raises ImageError."""
        with _asking(f"{self.url}/{name}", "removed"), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{name}")  # stores of objects take it well where there is none

    def refuse_foreign(self) -> None:
        """As `sources.refuse_foreign`, for what lies there without a manifest.

        UsageError also where there is no such bucket, as a file system might make one.
        """
        bucket = self.root.partition("/")[0]
        with _asking(self.url, "listed"):
            if bucket and not self.fs.exists(bucket):
                raise UsageError(f"there is no {bucket}", where=self.url, fix="make it first, or see to your rights")
            foreign = [name for name in OUTPUT_FOLDERS if self.fs.isdir(f"{self.root}/{name}")]
        if foreign:
            raise UsageError(FOREIGN.format(", ".join(foreign)), where=self.url, fix=FOREIGN_FIX)


def _until_magic(parts: list[str]) -> list[str]:
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return parts[:first]


def _wanted(name: str) -> bool:
    """Whether a path is an image's, and neither it nor a folder on the way is hidden.

    Keys of objects may hold what paths cannot: `..` is hidden, too, empty parts and zero bytes are no path.
    """
    *folders, file = name.strip("/").split("/")
    odd = "\0" in name or not all(folders) or any(part.startswith(".") for part in (*folders, file))
    return os.path.splitext(file)[1].lower() in READ_SUFFIXES and not odd


class Copies:
    """Images behind URLs as files in the folder `folder`, each from shortly before it is read until it is over."""

    def __init__(self, folder: Path):
        self._folder, self._stopped, self._count = folder, threading.Event(), 0
        self._pool = ThreadPoolExecutor(FETCHERS, "fetch")
        self._files: dict[str, Path] = {}

    def begin(self, source: Source) -> Source:
        """Begin to copy an image; `open` of what is returned waits for it. What is no URL is returned as it is."""
        if not source.url:
            return source
        self._count += 1
        file = self._folder / f"{self._count}{PurePosixPath(source.name).suffix}"
        self._files[source.name] = file
        copy: Future[None] = self._pool.submit(self._copy, source, file)
        return replace(source, path=file, fetched=copy.result)

    def _copy(self, source: Source, file: Path) -> None:
        if file.suffix.lower() in OF_SEVERAL_FILES:
            raise ImageError("a slide of several files is not read from a URL", where=source.url, fix="copy it")
        try:
            with open(file, "xb") as target:
                for block in Remote.open(source.url).read():
                    if self._stopped.is_set():
                        return
                    target.write(block)
        except OSError as error:
            if isinstance(error, ImageError):
                raise
            reason, fix = error.strerror or "no such file", "see whether TMPDIR has room, and the file is still there"
            raise ImageError(f"cannot be copied to {self._folder}: {reason}", where=source.url, fix=fix) from error

    def ahead(self, sources: Iterable[Source | None]) -> Iterator[Source | None]:
        """`sources`, each begun before it is asked for."""
        begun: deque[Source | None] = deque()
        for source in sources:
            begun.append(None if source is None else self.begin(source))
            if len(begun) > AHEAD:
                yield begun.popleft()
        yield from begun

    def over(self, entry: Mapping[str, Any]) -> None:
        """Remove the copy of an image that is over; called from any thread."""
        if (file := self._files.pop(entry["input"], None)) is not None:
            with contextlib.suppress(OSError):
                file.unlink()

    def close(self) -> None:
        """Make no more copies."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)


class Staging:
    """Where a run reads and writes: files and folders in place, URLs by way of a temporary folder.

    folder : where outputs and records are written. remote : where they go from there, None where they stay.
    copies : of the inputs.
    """

    def __init__(self, out: str, scratch: Path | None, copies: Copies):
        self.remote = Remote.open(out) if is_url(out) else None
        self.folder = Path(out) if self.remote is None or scratch is None else scratch / "out"
        self.copies = copies
        self._sent, self._next = 0, time.monotonic() + SYNC_SECONDS

    @classmethod
    @contextlib.contextmanager
    def open(cls, inputs: Sequence[str], out: str) -> Iterator[Staging]:
        """For a run, or an actor of one. Raises UsageError for a URL that makes no sense, ImageError: no TMPDIR."""
        urls = [text for text in (*inputs, out) if is_url(text)]
        with contextlib.ExitStack() as stack:
            scratch = None
            if urls:
                with _asking(urls[0], "copied to a temporary folder"):
                    scratch = Path(stack.enter_context(TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)))
            yield cls(out, scratch, stack.enter_context(contextlib.closing(Copies(scratch or Path()))))

    def list(self, url: str) -> list[Listed]:
        """The images that `url` names, as `Remote.files`."""
        return Remote.open(url).files(self.remote)

    def fetch_records(self, report: Callable[[str], None]) -> None:
        """Fetch the manifest of an earlier run. Raises UsageError where others wrote there, ImageError."""
        if self.remote is None:
            return refuse_foreign(self.folder)
        report(f"{self.remote.url}: nothing can be locked there; let no two runs write there at once")
        self.folder.mkdir()
        try:
            with open(self.folder / MANIFEST, "xb") as file:
                file.writelines(self.remote.read(MANIFEST))
            self._sent = (self.folder / MANIFEST).stat().st_size
        except FileNotFoundError:
            (self.folder / MANIFEST).unlink()
            self.remote.refuse_foreign()

    def begin(self) -> None:
        """Take the earlier run.json away: a run is going on. Raises ImageError."""
        if self.remote is None:
            drop_run(self.folder)
        else:
            self.remote.remove(RUN)

    def sync(self) -> None:
        """Copy the manifest there now and then: what it lacks after a kill is done again. Raises ImageError."""
        now = time.monotonic()
        if self.remote is None or now < self._next:
            return
        if (size := (self.folder / MANIFEST).stat().st_size) != self._sent:
            self.remote.put(self.folder / MANIFEST, MANIFEST)
            self._sent = size
        self._next = now + max(SYNC_SECONDS, (time.monotonic() - now) / SYNC_SHARE)

    def end(self) -> None:
        """Copy manifest, summary and run.json there. Raises ImageError."""
        if self.remote is not None:
            for name in (MANIFEST, SUMMARY, RUN):
                self.remote.put(self.folder / name, name)
