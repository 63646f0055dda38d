"""From arguments on the command line to the list of images, each with the name its outputs get."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from histoseg_fast.errors import HistosegError, UsageError
from histoseg_fast.images import SLIDE_SUFFIXES, SUFFIXES, ImageSource, Resolution, open_image
from histoseg_fast.images.array import ArraySource
from histoseg_fast.images.companions import OF_SEVERAL_FILES, Folders
from histoseg_fast.pipeline.records import MANIFEST, OUTPUT_FOLDERS

if TYPE_CHECKING:
    from histoseg_fast.pipeline.remote import Remote

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Path makes one slash of two. Windows has drives of one letter."""
T = TypeVar("T")
READ_SUFFIXES = SUFFIXES | SLIDE_SUFFIXES
FOREIGN, FOREIGN_FIX = "holds {} that no run wrote", "choose another --out"


@dataclass(frozen=True)
class Source:
    """One input: `path` to read, `name` (relative, posix) in manifest and summary, `stem` that its outputs share.

    pixels : the image itself, RGB uint8 (H, W, 3), where it is no file. place, bytes : where it lies, and its size, if
    that is behind a URL; `path` is then its copy here, once there is one. fetched : waits for that, unless what it is
    given says that it is no longer wanted; whether it is there. Raises ImageError.
    """

    path: Path
    name: str
    stem: str
    pixels: np.ndarray | None = field(default=None, compare=False, repr=False)
    place: Remote | None = None
    bytes: int = 0
    fetched: Callable[[Callable[[], bool]], bool] | None = field(default=None, compare=False, repr=False)

    @property
    def url(self) -> str:
        """Its URL, "" where it has none."""
        return "" if self.place is None else self.place.url

    @property
    def shown(self) -> str:
        """Its absolute path, or URL, for people and records."""
        return self.url or os.path.abspath(self.path)

    def open(self, resolution: Resolution, given_up: Callable[[], bool]) -> ImageSource | None:
        """The image; None if it was `given_up` while it was fetched. Raises ImageError."""
        if self.pixels is not None:
            return ArraySource(self.pixels, resolution)
        if self.fetched is not None and not self.fetched(given_up):
            return None
        return open_image(self.path, resolution)

    def renamed(self, error: HistosegError) -> HistosegError:
        """`error` as of the URL, where it is one of the copy of it."""
        if not self.url or error.where != os.fspath(self.path):
            return error
        return type(error)(error.what, where=self.url, fix=error.fix)


def find_sources(
    inputs: Sequence[str], out: Path, remote: Callable[[str], Sequence[Source]] | None = None
) -> list[Source]:
    """Every image that `inputs` (files, folders, glob patterns) name, sorted by name, each file once.

    remote : lists what a URL names; None where they are refused.

    Folders are searched recursively for the known suffixes (hidden files, `out` and results in it left out) and
    do not follow links to folders; names are relative to the folder, to the part of a pattern before its
    first wildcard, or a file's own name. Of the files that make up one slide (see `companions`) the first is the
    input. An image's outputs are called by its name without suffix, unless two
    images share that; then both keep their suffix. Raises UsageError if an input names nothing, or two inputs would
    share an output.
    """
    found: dict[str, Source] = {}
    for text in inputs:
        if not is_url(text):
            matches = [Source(path, name, short_stem(name)) for path, name in _expand(text, out)]
        elif remote is not None:
            matches = list(remote(text))
        else:
            raise UsageError("URLs are read by infer alone", where=presentable(text), fix="copy what is needed")
        if not matches:
            raise UsageError(
                "no image found", where=presentable(text), fix="known suffixes: " + ", ".join(sorted(READ_SUFFIXES))
            )
        for source in matches:
            found.setdefault(source.shown, source)
    leave_out_companions(found, Folders())
    stems = Counter(source.stem.casefold() for source in found.values())
    sources = [
        source if stems[source.stem.casefold()] == 1 else replace(source, stem=source.name) for source in found.values()
    ]
    sources.sort(key=lambda source: source.name)
    seen: dict[str, Source] = {}
    for source in sources:
        if (other := seen.setdefault(source.stem.casefold(), source)) is not source:
            raise UsageError(
                f"{other.url or other.path} and {source.url or source.path} would write the same mask",
                fix="give their common parent folder, or run them into two --out folders",
            )
    return sources


def leave_out_companions(found: dict[str, T], folders: Folders) -> None:
    """Leave the first file of each slide of several in `found`, by absolute paths."""
    for path in sorted(map(Path, found)):
        if path.suffix.lower() in OF_SEVERAL_FILES and str(path) in found:
            for companion in folders.companions(path):
                found.pop(str(companion), None)


def is_url(text: str) -> bool:
    """Whether `text` is a URL, and no file's or folder's name."""
    return _URL.match(text) is not None and not os.path.lexists(text.split("/", 1)[0])


def presentable(text: str) -> str:
    """`text` for people and records: a URL without passwords and signatures."""
    if not is_url(text):
        return text
    if text.startswith(("http://", "https://")):
        text = text.partition("?")[0]
    return re.sub(r"//[^/@:]*:[^/@]*@", "//", text, count=1)


def refuse_foreign(out: Path) -> None:
    """UsageError where `out` holds folders that are called like results and that no run wrote."""
    foreign = [name for name in OUTPUT_FOLDERS if (out / name).is_dir()]
    if foreign and not (out / MANIFEST).exists():
        raise UsageError(FOREIGN.format(", ".join(foreign)), where=out, fix=FOREIGN_FIX)


def _expand(text: str, out: Path) -> Iterable[tuple[Path, str]]:
    path, results = Path(text), _results(out)
    if _inside(path, results):
        raise UsageError("holds results of this very --out", where=text, fix="use another --out")
    if os.path.isdir(path):
        yield from walk(path, out, _unlisted)
    elif os.path.lexists(path):
        yield path, path.name
    elif glob.has_magic(text):
        for match in sorted(glob.glob(text, recursive=True)):
            if _inside(Path(match), results):
                continue
            if os.path.isdir(match):
                yield from walk(Path(match), out, _unlisted)
            elif Path(match).suffix.lower() in READ_SUFFIXES:
                name = Path(match).relative_to(_fixed_part(text))
                if ".." in name.parts:
                    raise UsageError("goes up behind a wildcard", where=text, fix="give the folder it ends in")
                yield Path(match), name.as_posix()
    else:
        raise UsageError("no such file or folder", where=text)


def walk(root: Path, out: Path, onerror: Callable[[OSError], None]) -> Iterator[tuple[Path, str]]:
    """The images below `root` as `find_sources` sees them: path and name. onerror : gets what cannot be listed."""
    skip = {os.path.realpath(out), *_results(out)}
    for folder, folders, files in os.walk(root, onerror=onerror):
        if MANIFEST in files:  # what another run wrote is no input
            folders[:] = [f for f in folders if f not in OUTPUT_FOLDERS]
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and os.path.realpath(os.path.join(folder, f)) not in skip
        )
        for file in sorted(files):
            if os.path.splitext(file)[1].lower() in READ_SUFFIXES and not file.startswith("."):
                path = Path(folder, file)
                yield path, path.relative_to(root).as_posix()


def _fixed_part(pattern: str) -> Path:
    """The folder that a glob pattern names before its first wildcard; the names of its matches start there."""
    parts = Path(pattern).parts
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))


def _unlisted(error: OSError) -> None:
    raise UsageError(f"folder cannot be read: {error.strerror}", where=error.filename) from error


def _results(out: Path) -> set[str]:
    return {os.path.realpath(out / name) for name in OUTPUT_FOLDERS}


def _inside(path: Path, folders: set[str]) -> bool:
    real = Path(os.path.realpath(path))
    return any(str(parent) in folders for parent in (real, *real.parents))


def short_stem(name: str) -> str:
    """`name` without its suffix (.ome.tif is one), which its outputs are called where no other image shares it."""
    path = PurePosixPath(name)
    stem = path.with_suffix("")
    ome = path.suffix.lower() in (".tif", ".tiff") and stem.suffix.lower() == ".ome"
    return str(stem.with_suffix("") if ome else stem)
