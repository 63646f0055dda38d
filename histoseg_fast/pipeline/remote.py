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
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from histoseg_fast.errors import HistosegError, ImageError, UsageError
from histoseg_fast.extras import need
from histoseg_fast.images.companions import OF_SEVERAL_FILES
from histoseg_fast.pipeline.records import MANIFEST, OUTPUT_FOLDERS, RUN, SUMMARY, drop_run, writing
from histoseg_fast.pipeline.sources import (
    FOREIGN,
    FOREIGN_FIX,
    READ_SUFFIXES,
    Source,
    presentable,
    refuse_foreign,
    short_stem,
)

FETCHERS = 4
"""Copies that are made at a time."""
AHEAD = 8
"""Images that are copied before a reader asks for them."""
WAIT_SECONDS = 0.2
"""So often who waits for a copy looks whether it is still wanted."""
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
    """What a URL names. url : for people. fs : its fsspec file system. root : its path there."""

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
        if "::" in url:
            raise UsageError("is a chain of URLs", where=presentable(url), fix="give one")
        try:
            fs, root = fsspec.url_to_fs(url)
        except Exception as error:  # an unknown protocol, a package that is missing, no credentials
            reason = str(error).strip().partition("\n")[0]
            fix = "see whether the package for it is installed, and the rights are there"
            raise UsageError(f"cannot be opened: {reason}", where=presentable(url), fix=fix) from error
        return cls(presentable(url).rstrip("/"), fs, root.rstrip("/") or root)

    def files(self, out: Remote | None) -> list[Source]:
        """The images that it names: a file, a folder (searched as `walk` does), or a pattern.

        Results of other runs, and `out`, are left out. Raises ImageError where it cannot be listed.
        """
        above, url = self.root, self.url
        with _asking(self.url, "listed"):
            if self.fs.isfile(self.root):
                path = self.root.partition("?")[0] if self._of_the_web else self.root
                name = path.rpartition("/")[2]
                return [_listed(name, self, self.fs.size(self.root))]
            if glob.has_magic(self.root) and not self.fs.isdir(self.root):
                above, url = ("/".join(_until_magic(text.split("/"))) for text in (self.root, self.url))
                found = self.fs.glob(self.root, detail=True)
                for folder in [path for path, info in found.items() if info["type"] == "directory"]:
                    found |= self.fs.find(folder, detail=True)
            else:
                found = self.fs.find(self.root, detail=True)
        results = self._results(found, out)
        images = []
        for path, info in sorted(found.items()):
            name = path[len(above) :].removeprefix("/")
            if info["type"] != "directory" and _wanted(name) and not path.startswith(results):
                images.append(_listed(name, Remote(f"{url}/{name}", self.fs, path), info.get("size")))
        return images

    def _results(self, found: Iterable[str], out: Remote | None) -> tuple[str, ...]:
        """What paths of results start with: those of runs whose manifest was found, and those in `out`.

        All of `out` where it lies below this folder.
        """
        runs = {path.rpartition("/")[0] for path in found if path.rpartition("/")[2] == MANIFEST}
        if out is not None and out.fs == self.fs:
            if out.root.startswith(f"{self.root}/"):
                return f"{out.root}/", *(f"{run}/{name}/" for run in runs for name in OUTPUT_FOLDERS)
            runs.add(out.root)
        return tuple(f"{run}/{name}/" for run in runs for name in OUTPUT_FOLDERS)

    @property
    def _of_the_web(self) -> bool:
        return self.url.startswith(("http://", "https://"))

    def in_this_thread(self) -> Remote:
        """The same with a file system of this thread's own: few can be shared."""
        return replace(self, fs=type(self.fs)(*self.fs.storage_args, **self.fs.storage_options))

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
        path = f"{self.root}/{name}"
        with _asking(f"{self.url}/{name}", "written"):
            try:
                self.fs.put_file(os.fspath(file), path)
            except FileNotFoundError:  # a file system with folders; but no bucket is made
                bucket = path.partition("/")[0]
                if bucket and not self.fs.exists(bucket):
                    raise
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                self.fs.put_file(os.fspath(file), path)

    def remove(self, name: str) -> None:
        """Delete a file that may be there. Raises ImageError."""
        with _asking(f"{self.url}/{name}", "removed"), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{name}")  # stores of objects take it well where there is none

    def refuse_foreign(self) -> None:
        """As `sources.refuse_foreign`, for what lies there without a manifest."""
        with _asking(self.url, "listed"):
            foreign = [name for name in OUTPUT_FOLDERS if self.fs.isdir(f"{self.root}/{name}")]
        if foreign:
            raise UsageError(FOREIGN.format(", ".join(foreign)), where=self.url, fix=FOREIGN_FIX)


def _listed(name: str, place: Remote, size: int | None) -> Source:
    return Source(Path(name), name, short_stem(name), place=place, bytes=size or 0)


def _until_magic(parts: list[str]) -> list[str]:
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return parts[:first]


def _wanted(name: str) -> bool:
    """Whether a path is an image's, and neither it nor a folder on the way is hidden.

    Keys of objects may hold what paths cannot: `..` is hidden, too; empty parts and zero bytes are no path.
    """
    *folders, file = name.split("/")
    odd = "\0" in name or not all(folders) or any(part.startswith(".") for part in (*folders, file))
    odd |= os.sep != "/" and any(letter in name for letter in "\\:")
    return os.path.splitext(file)[1].lower() in READ_SUFFIXES and not odd


class Copies:
    """Images behind URLs as files in the folder `folder`, each from shortly before it is read until it is over."""

    def __init__(self, folder: Path):
        self._folder, self._stopped, self._count = folder, threading.Event(), 0
        self._pool = ThreadPoolExecutor(FETCHERS, "fetch")
        self._files: dict[str, Path] = {}

    def ahead(self, sources: Iterable[Source | None]) -> Iterator[Source | None]:
        """`sources`, as a stream takes them; copies of a few are begun before they are asked for."""
        begun: deque[Source] = deque()
        for source in sources:
            if source is not None:
                begun.append(self._begin(source))
            if source is None or len(begun) > AHEAD:
                yield begun.popleft() if begun else None
        yield from begun

    def _begin(self, source: Source) -> Source:
        """Begin to copy an image; what is no URL is returned as it is."""
        if source.place is None:
            return source
        self._count += 1
        file = self._folder / f"{self._count}{PurePosixPath(source.name).suffix}"
        self._files[source.name] = file
        copy = self._pool.submit(self._copy, source, file)

        def fetched(given_up: Callable[[], bool]) -> bool:
            while not given_up():
                if wait([copy], WAIT_SECONDS).done:
                    copy.result()
                    return True
            return False

        return replace(source, path=file, fetched=fetched)

    def _copy(self, source: Source, file: Path) -> None:
        assert source.place is not None
        if file.suffix.lower() in OF_SEVERAL_FILES:
            raise ImageError("a slide of several files is not read from a URL", where=source.url, fix="copy it")
        with _asking(source.url, "opened"):
            place = source.place.in_this_thread()
        try:
            with open(file, "xb") as target:
                for block in place.read():
                    if self._stopped.is_set():
                        raise ImageError("was not copied to its end", where=source.url)
                    target.write(block)
        except OSError as error:
            if isinstance(error, ImageError):
                raise
            reason, fix = error.strerror or "no such file", "see whether TMPDIR has room, and the file is still there"
            raise ImageError(f"cannot be copied to {self._folder}: {reason}", where=source.url, fix=fix) from error

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

    def __init__(self, folder: Path, remote: Remote | None, copies: Copies):
        self.folder, self.remote, self.copies = folder, remote, copies
        self._sent, self._next = 0, time.monotonic() + SYNC_SECONDS

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: Path | Remote, inputs: bool) -> Iterator[Staging]:
        """For a run, or an actor of one; `inputs` is whether any is behind a URL. ImageError: no temporary folder."""
        remote = out if isinstance(out, Remote) else None
        with contextlib.ExitStack() as stack:
            scratch = Path()
            if inputs or remote is not None:
                with writing(scratch):
                    scratch = Path(stack.enter_context(TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)))
            copies = stack.enter_context(contextlib.closing(Copies(scratch)))
            yield cls(scratch / "out" if isinstance(out, Remote) else out, remote, copies)

    def list(self, url: str) -> list[Source]:
        """The images that `url` names, as `Remote.files`."""
        return Remote.open(url).files(self.remote)

    def fetch_records(self, report: Callable[[str], None]) -> None:
        """Fetch the manifest of an earlier run. Raises UsageError where others wrote there, ImageError."""
        if self.remote is None:
            return refuse_foreign(self.folder)
        report(f"{self.remote.url}: nothing can be locked there; let no two runs write there at once")
        with writing(self.folder):
            self.folder.mkdir()
            try:
                with open(self.folder / MANIFEST, "xb") as file:
                    file.writelines(self.remote.read(MANIFEST))
            except FileNotFoundError:
                (self.folder / MANIFEST).unlink()
                self.remote.refuse_foreign()

    def begin(self) -> None:
        """Take the earlier run.json away: a run is going on; what it writes is its own. Raises ImageError."""
        if self.remote is None:
            return drop_run(self.folder)
        self._send()
        self.remote.remove(RUN)

    def sync(self, report: Callable[[str], None]) -> None:
        """Copy the manifest there now and then: what it lacks after a kill is done again."""
        now = time.monotonic()
        if self.remote is None or now < self._next:
            return
        try:
            if (self.folder / MANIFEST).stat().st_size != self._sent:
                self._send()
        except ImageError as error:  # the next time, or the end, may do better
            report(str(error))
        self._next = now + max(SYNC_SECONDS, (time.monotonic() - now) / SYNC_SHARE)

    def _send(self) -> None:
        assert self.remote is not None
        size = (self.folder / MANIFEST).stat().st_size
        self.remote.put(self.folder / MANIFEST, MANIFEST)
        self._sent = size

    def end(self) -> None:
        """Copy manifest, summary and run.json there, those that could be written. Raises ImageError."""
        if self.remote is not None:
            self._send()
            for name in (SUMMARY, RUN):
                if (self.folder / name).exists():
                    self.remote.put(self.folder / name, name)
