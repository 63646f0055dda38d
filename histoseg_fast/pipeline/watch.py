"""A folder that images are still being written to, as the sources of a stream.

The tree is listed and compared again and again: that works on every file system, also on network shares, where
notifications of changes do not arrive. What the program cannot know, whether a writer is done, shows in that a file
keeps its size and date for `SETTLE_SECONDS`, and that it can be decoded, which is the stream's business.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoseg_fast.errors import UsageError
from histoseg_fast.images.companions import OF_SEVERAL_FILES, Folders
from histoseg_fast.pipeline.sources import Source, leave_out_companions, short_stem, walk

SETTLE_SECONDS = 10.0
"""A file that has not changed for so long is complete, as far as can be seen: a scanner may pause, a share may lag."""
POLL_SECONDS = 1.0
"""The tree is listed at most this often,"""
POLL_SHARE = 0.1
"""and for no more than this share of the time."""
REST_SECONDS = 0.2
"""While there is nothing to do, the stream is told so this often."""

MASKS, MASK_SUFFIXES = "masks/", (".ome.tif", ".png")

Stamp = tuple[tuple[int, int], ...]
"""Size and date of each file of an image; dates are compared, never ordered, so that no clock matters."""


@dataclass
class _File:
    """What is known of an image: its name, its stamp, since when it has had it, and whether it was given."""

    name: str
    stamp: Stamp
    since: float
    given: bool = False


class Watcher:
    """The images in a folder, each when it is complete, and again when it has changed; for one stream.

    root : the folder. out : the folder of results, which may lie in it. idle : end after so many seconds in which no
    image came or changed; None: never. report : gets a line on a folder that cannot be listed, once.
    Raises UsageError where `inputs` is not one folder.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        out: Path,
        idle: float | None,
        report: Callable[[str], None],
        settle: float = SETTLE_SECONDS,
        poll: float = POLL_SECONDS,
    ):
        if len(inputs) != 1 or not os.path.isdir(inputs[0]):
            raise UsageError("--watch takes one folder", where=" ".join(inputs)[:200], fix="give the scanner's folder")
        self._root, self._out, self._idle, self._report = Path(inputs[0]), out, idle, report
        self._settle, self._poll = settle, poll
        self._files: dict[str, _File] = {}
        self._waiting: list[str] = []
        self._owners: dict[str, str] = {}
        self._in_flight: set[str] = set()
        self._unlisted: dict[str, str] = {}
        self._changed = self._next_scan = time.monotonic()

    def over(self, entry: Mapping[str, Any]) -> None:
        """Say that the stream is done with an image; called from any thread."""
        self._in_flight.discard(entry["input"])

    def sources(self, entries: Mapping[str, Mapping[str, Any]]) -> Iterator[Source | None]:
        """What the stream is to do; None several times a second while that is nothing.

        entries : the manifest's, by name: images keep the names of outputs that they have there.
        """
        for name, entry in entries.items():
            if (stem := _stem_of(entry)) is not None:
                self._owners[stem.casefold()] = name
        del entries  # which may be many
        while True:
            if time.monotonic() >= self._next_scan:
                self._scan()
            source = self._take()
            if source is not None:
                yield source
                continue
            if self._idle is not None and not self._waiting and time.monotonic() - self._changed >= self._idle:
                return
            yield None
            time.sleep(REST_SECONDS)

    def _scan(self) -> None:
        """Compare the tree with what is known of it."""
        started = time.monotonic()
        before, unlisted = self._unlisted, {}

        def note(error: OSError) -> None:
            unlisted[os.path.abspath(error.filename)] = error.strerror or str(error)

        found = {os.path.abspath(path): name for path, name in walk(self._root, self._out, note)}
        folders = Folders()
        leave_out_companions(found, folders)
        files: dict[str, _File] = {}
        for path, name in found.items():
            stamp, known = stamp_of(path, folders), self._files.get(path)
            if known is not None and known.stamp == stamp:
                files[path] = known
            elif stamp is not None:
                self._changed = time.monotonic()
                files[path] = _File(name, stamp, self._changed)
        for path, known in self._files.items():  # what is out of sight now is not gone
            if any(path.startswith(os.path.join(folder, "")) for folder in unlisted):
                files.setdefault(path, known)
        for folder, reason in unlisted.items():
            if folder not in before:
                self._report(f"{folder}: cannot be listed ({reason}); trying again")
        self._waiting = sorted((path for path in files if not files[path].given), key=lambda path: files[path].name)
        self._files, self._unlisted, now = files, unlisted, time.monotonic()
        self._next_scan = now + max(self._poll, (now - started) / POLL_SHARE)

    def _take(self) -> Source | None:
        """The next image that is complete, if any; in the order of names."""
        now = time.monotonic()
        for place, path in enumerate(self._waiting):
            file = self._files[path]
            if now - file.since < self._settle or file.name in self._in_flight:
                continue
            if stamp_of(path, Folders()) != file.stamp:  # the next listing takes it from there
                continue
            file.given = True
            del self._waiting[place]
            self._in_flight.add(file.name)
            return Source(Path(path), file.name, self._stem(file.name))
        return None

    def _stem(self, name: str) -> str:
        """What the outputs of image `name` are called: as before, else by the first name that no other image has."""
        names = (short_stem(name), name)
        for stem in names:
            if self._owners.get(stem.casefold()) == name:
                return stem
        more = (f"{name}.{number}" for number in itertools.count(2))
        stem = next(stem for stem in itertools.chain(names, more) if stem.casefold() not in self._owners)
        self._owners[stem.casefold()] = name
        return stem


def stamp_of(path: str, folders: Folders) -> Stamp | None:
    """The stamp of an image with all its files; None where it has gone, or is no file."""
    files = [path]
    if os.path.splitext(path)[1].lower() in OF_SEVERAL_FILES:
        files += map(str, folders.companions(Path(path)))
    try:
        return tuple((status.st_size, status.st_mtime_ns) for status in map(os.stat, files))
    except OSError:
        return None


def _stem_of(entry: Mapping[str, Any]) -> str | None:
    """What the outputs of an image are called by its manifest entry; None where it has none."""
    mask = entry.get("mask")
    if not isinstance(mask, str) or not mask.startswith(MASKS):
        return None
    suffix = next((suffix for suffix in MASK_SUFFIXES if mask.endswith(suffix)), "")
    return mask[len(MASKS) : -len(suffix)] if suffix else None
