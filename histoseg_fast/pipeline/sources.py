"""From arguments on the command line to the list of images, each with the name its outputs get."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from histoseg_fast.errors import UsageError
from histoseg_fast.images import SLIDE_SUFFIXES, SUFFIXES
from histoseg_fast.images.companions import OF_SEVERAL_FILES, Folders
from histoseg_fast.pipeline.records import MANIFEST, OUTPUT_FOLDERS

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Path makes one slash of two. Windows has drives of one letter."""
T = TypeVar("T")
READ_SUFFIXES = SUFFIXES | SLIDE_SUFFIXES


@dataclass(frozen=True)
class Source:
    """One input: `path` to read, `name` (relative, posix) in manifest and summary, `stem` that its outputs share.

    pixels : the image itself, RGB uint8 (H, W, 3), where it is no file.
    """

    path: Path
    name: str
    stem: str
    pixels: np.ndarray | None = field(default=None, compare=False, repr=False)


def find_sources(inputs: Sequence[str], out: Path) -> list[Source]:
    """Every image that `inputs` (files, folders, glob patterns) name, sorted by name, each file once.

    Folders are searched recursively for the known suffixes (hidden files, `out` and results in it left out) and
    do not follow links to folders; names are relative to the folder, to the part of a pattern before its
    first wildcard, or a file's own name. Of the files that make up one slide (see `companions`) the first is the
    input. An image's outputs are called by its name without suffix, unless two
    images share that; then both keep their suffix. Raises UsageError if an input names nothing, or two inputs would
    share an output.
    """
    found: dict[str, tuple[Path, str]] = {}
    for text in inputs:
        matches = list(_expand(text, out))
        if not matches:
            raise UsageError("no image found", where=text, fix="known suffixes: " + ", ".join(sorted(READ_SUFFIXES)))
        for path, name in matches:
            found.setdefault(os.path.abspath(path), (path, name))
    leave_out_companions(found, Folders())
    stems = Counter(short_stem(name).casefold() for _, name in found.values())
    sources = [
        Source(path, name, short_stem(name) if stems[short_stem(name).casefold()] == 1 else name)
        for path, name in found.values()
    ]
    sources.sort(key=lambda source: source.name)
    seen: dict[str, Source] = {}
    for source in sources:
        if (other := seen.setdefault(source.stem.casefold(), source)) is not source:
            raise UsageError(
                f"{other.path} and {source.path} would write the same mask",
                fix="give their common parent folder, or run them into two --out folders",
            )
    return sources


def leave_out_companions(found: dict[str, T], folders: Folders) -> None:
    """Leave the first file of each slide of several in `found`, by absolute paths."""
    for path in sorted(map(Path, found)):
        if path.suffix.lower() in OF_SEVERAL_FILES and str(path) in found:
            for companion in folders.companions(path):
                found.pop(str(companion), None)


def refuse_urls(inputs: Sequence[str], out: Path) -> None:
    """UsageError where one of these is a URL, and no file's or folder's name."""
    for text in (*inputs, str(out)):
        if _URL.match(text) and not os.path.lexists(text.split("/", 1)[0]):
            fix = "mount it as a folder, or copy what is needed"
            raise UsageError("URLs are neither read nor written", where=text, fix=fix)


def refuse_foreign(out: Path) -> None:
    """UsageError where `out` holds folders that are called like results and that no run wrote."""
    foreign = [name for name in OUTPUT_FOLDERS if (out / name).is_dir()]
    if foreign and not (out / MANIFEST).exists():
        raise UsageError(f"holds {', '.join(foreign)} that no run wrote", where=out, fix="choose another --out")


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
