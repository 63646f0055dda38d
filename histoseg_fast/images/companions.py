"""Which files make up a slide that is more than one."""

from __future__ import annotations

import functools
import os
import re
import threading
from pathlib import Path

BY_NAME = {".mrxs", ".vms", ".vmu"}
"""Slides whose named file is an index: a thumbnail or a text, so that only its suffix tells what it is."""

OF_SEVERAL_FILES = {*BY_NAME, ".dcm"}
"""Suffixes of slides that may be more than one file."""

MAX_INDEX_BYTES = 2**20
_ENTRY = re.compile(r"^\s*\w+(?:\(\d+(?:,\d+)*\))?\s*=\s*(\S.*?)\s*$", re.MULTILINE)
_SERIES, _AFTER = 0x0020000E, 0x0020000F


def companions(path: str | os.PathLike[str]) -> list[Path]:
    """The files that belong to the slide `path` beside itself, in the order of their names; none for most.

    Of MRXS all files in the folder of its name; of VMS and VMU those that it lists and that lie beside it; of DICOM
    those of the same series beside it, with the same suffix (none where pydicom is not installed).
    """
    return Folders().companions(Path(path))


class Folders:
    """`companions` of many slides, as things stand: each folder is listed, and its series told apart, once.

    For any number of threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[Path, list[Path]] = {}
        self._series: dict[tuple[Path, str], dict[str, list[Path]]] = {}

    def companions(self, path: Path) -> list[Path]:
        """See the function of this name."""
        suffix = path.suffix.lower()
        found: list[Path] = []
        with self._lock:
            if suffix == ".mrxs":
                found = self._list(path.with_suffix(""))
            elif suffix in BY_NAME:
                names = _listed(path)
                found = [file for file in self._list(path.parent) if file.name in names]
            elif (series := dicom_series(path)) is not None:
                found = self._group(path.parent, suffix).get(series, [])
        return [file for file in found if file.name != path.name or file.parent != path.parent]

    def _list(self, folder: Path) -> list[Path]:
        if folder not in self._files:
            try:
                with os.scandir(folder) as entries:
                    self._files[folder] = sorted(folder / entry.name for entry in entries if _is_file(entry))
            except OSError:
                self._files[folder] = []
        return self._files[folder]

    def _group(self, folder: Path, suffix: str) -> dict[str, list[Path]]:
        """The files of each series in `folder`."""
        if (folder, suffix) not in self._series:
            groups = self._series[folder, suffix] = {}
            for file in self._list(folder):
                if file.suffix.lower() == suffix and (series := dicom_series(file)) is not None:
                    groups.setdefault(series, []).append(file)
        return self._series[folder, suffix]


def _listed(path: Path) -> set[str]:
    """The names that the index `path` lists, without those of other folders."""
    try:
        with open(path, "rb") as stream:
            text = stream.read(MAX_INDEX_BYTES).decode("utf-8", "surrogateescape")
    except OSError:
        return set()
    return {name for name in _ENTRY.findall(text) if name == os.path.basename(name)}


def dicom_series(path: Path) -> str | None:
    """The series (its UID) that a DICOM file belongs to; None for any other file, or without pydicom."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return _series(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=2**16)
def _series(path: Path, size: int, modified: int) -> str | None:
    """`dicom_series` of the file while it has this size and date."""
    try:
        with open(path, "rb") as stream:
            if stream.read(132)[128:] != b"DICM":
                return None
            from pydicom.filereader import read_partial

            stream.seek(0)
            head = read_partial(stream, lambda tag, representation, length: tag >= _AFTER)
            return str(head[_SERIES].value)
    except Exception:  # no such file, no pydicom, or whatever a damaged file makes it raise
        return None


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself
        return False
