"""What an output folder of `infer` says of its run: settings, and a row an image. Nothing in the folder is trusted."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from histoseg_fast.errors import DataError, ImageError, UsageError
from histoseg_fast.images.content import Content
from histoseg_fast.images.source import DECODE_ERRORS, MAX_SIDE
from histoseg_fast.images.tiff_slide import open_pages
from histoseg_fast.labels import MAX_CLASSES
from histoseg_fast.pipeline.outputs import SLIDE_MASK_SUFFIX
from histoseg_fast.pipeline.records import MANIFEST, read_entries, read_run, tumour_stroma_ratio

UNKNOWN_COLOUR = (128, 128, 128)
"""Of a class where no mask is left to tell."""

MAX_SECONDS = 1e9
"""More than that for a stage of one image is nonsense."""

MAX_PALETTE_OFFSET = 1 << 16
"""The palette of a mask is looked for in this many bytes; the masks of `infer` have it at the front."""


@dataclass(frozen=True)
class Row:
    """One image of the run. Of a failed one only name and error are known.

    name : as in the manifest. path : where the image lay, or None. mask, overlay : relative to the folder, inside it.
    pixels : by class, in the order of the ids. ratio : cancer / (cancer + stroma), or None. confidence : 0 to 1,
    or None where nothing was segmented: a slide of clean glass.
    """

    name: str
    error: str | None = None
    path: str | None = None
    sha256: str = ""
    mask: str = ""
    mask_sha256: str = ""
    overlay: str | None = None
    width: int = 0
    height: int = 0
    pixels: tuple[int, ...] = ()
    ratio: float | None = None
    confidence: float | None = None
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether there are results."""
        return self.error is None


@dataclass(frozen=True)
class Cohort:
    """A run's rows, sorted by name, and what ran.

    record : run.json, empty where there is none (the run goes on, or was cut off). classes, colours : of the plan.
    others : images in the folder that an earlier run did with another plan or other options; unreadable : manifest
    lines that make no sense. Neither has a row.
    """

    folder: Path
    record: Mapping[str, Any]
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    rows: tuple[Row, ...]
    others: int
    unreadable: int

    @property
    def done(self) -> list[Row]:
        """The rows with results."""
        return [row for row in self.rows if row.done]

    @property
    def failed(self) -> list[Row]:
        """The rows without."""
        return [row for row in self.rows if not row.done]


def read_cohort(folder: Path) -> Cohort:
    """Read manifest and run.json of `folder`. UsageError where no run wrote it, DataError where it is damaged."""
    if not (folder / MANIFEST).is_file():
        fix = "give the --out folder of infer"
        raise UsageError(f"holds no run: there is no {MANIFEST}", where=folder, fix=fix)
    try:
        entries, _ = read_entries(folder / MANIFEST)
        record = read_run(folder)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=error.filename or folder) from error
    key = record.get("key") or next((e["key"] for e in reversed(entries.values()) if e.get("key")), None)
    mine = [entry for entry in entries.values() if entry.get("key", key) == key]
    classes = _classes(mine)
    rows = [row for entry in mine if (row := _row(entry, classes)) is not None]
    rows.sort(key=lambda row: row.name)
    others, unreadable = len(entries) - len(mine), len(mine) - len(rows)
    return Cohort(folder, record, classes, _colours(folder, rows, len(classes)), tuple(rows), others, unreadable)


def _classes(entries: list[dict[str, Any]]) -> tuple[str, ...]:
    """The class names that most done images agree on."""
    found = Counter(
        tuple(entry["pixels"])
        for entry in entries
        if isinstance(entry.get("pixels"), dict) and 0 < len(entry["pixels"]) <= MAX_CLASSES
    )
    return found.most_common(1)[0][0] if found else ()


def _row(entry: dict[str, Any], classes: tuple[str, ...]) -> Row | None:
    """The row of a manifest line; None where the line makes no sense."""
    name, path = entry["input"], _text(entry.get("path")) or None
    if entry.get("status") == "failed":
        return Row(name, _text(entry.get("error")) or "no reason was recorded", path)
    try:
        pixels = tuple(_number(entry["pixels"][name], MAX_SIDE**2, whole=True) for name in classes)
        width, height = (_number(entry[side], MAX_SIDE, whole=True) for side in ("width", "height"))
        confidence = None if entry["mean_confidence"] is None else _number(entry["mean_confidence"], 1.0)
        warnings = tuple(map(str, entry.get("warnings") or ()))
        seconds = {str(stage): _number(value, MAX_SECONDS) for stage, value in dict(entry.get("seconds", {})).items()}
    except (KeyError, TypeError, ValueError):
        return None
    mask = _inside(entry.get("mask"), "masks")
    if entry.get("status") != "done" or mask is None or sum(pixels) != width * height or not pixels:
        return None
    return Row(
        name,
        None,
        path,
        _text(entry.get("sha256")),
        mask,
        _text(entry.get("mask_sha256")),
        _inside(entry.get("overlay"), "overlays"),
        width,
        height,
        pixels,
        tumour_stroma_ratio(dict(zip(classes, pixels, strict=True))),
        confidence,
        warnings,
        seconds,
    )


def _number(value: Any, most: float, *, whole: bool = False) -> Any:
    """`value` if it is a (whole) number from 0 to `most`. ValueError otherwise, NaN included."""
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 <= value <= most:
        raise ValueError(f"{value!r} is no such number")
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _inside(value: Any, folder: str) -> str | None:
    """A relative path below `folder`, or None: a manifest must not name files elsewhere."""
    parts = PurePosixPath(_text(value)).parts
    inside = len(parts) > 1 and parts[0] == folder and ".." not in parts and "\0" not in value
    return os.path.join(*parts) if inside else None


def _colours(folder: Path, rows: list[Row], count: int) -> tuple[tuple[int, int, int], ...]:
    """The plan's colours, from the palette of the first mask that is still there."""
    for row in rows:
        if not row.done:
            continue
        palette = slide_palette if row.mask.endswith(SLIDE_MASK_SUFFIX) else mask_palette
        if len(colours := palette(folder / row.mask, count)) == count:
            return colours
    return (UNKNOWN_COLOUR,) * count


def slide_palette(path: Path, count: int) -> tuple[tuple[int, int, int], ...]:
    """The first `count` colours of a palette TIFF, none where the file is no such TIFF or cannot be read."""
    try:
        with contextlib.closing(Content(path)) as content:
            table = open_pages(content).pages.first.colormap
            return () if table is None else tuple((int(r), int(g), int(b)) for r, g, b in table[:, :count].T >> 8)
    except (*DECODE_ERRORS, ImageError):
        return ()


def mask_palette(path: Path, count: int) -> tuple[tuple[int, int, int], ...]:
    """The first `count` colours of a palette PNG, none where the file is no such PNG or cannot be read."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(MAX_PALETTE_OFFSET)
    except OSError:
        return ()
    position = 8
    while len(kind := head[position + 4 : position + 8]) == 4:
        size = int.from_bytes(head[position : position + 4], "big")
        body = head[position + 8 : position + 8 + size]
        if kind == b"PLTE":
            return tuple(zip(body[::3], body[1::3], body[2::3], strict=False))[:count]
        position += 12 + size
    return ()
