"""What a TIFF says of itself as a slide: whose it is, its resolution levels, the size of its pixels."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, cast

from histoseg_fast.images.content import Content
from histoseg_fast.images.source import DECODE_ERRORS
from histoseg_fast.images.tiff import load_tifffile
from histoseg_fast.plan import MAX_MPP, MIN_MPP

if TYPE_CHECKING:
    import tifffile

MAX_PAGES = 64
"""Most pages that are looked at; slides have about ten."""

MAX_DESCRIPTION = 2**20
"""Most characters of a description that are searched."""

_MICROMETRES = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
_OF_RESOLUTION_UNIT = {2: 25_400.0, 3: 10_000.0}
_NUMBER = r"([0-9]{1,6}(?:\.[0-9]{1,20})?)"


def open_pages(content: Content) -> tifffile.TiffFile:
    """The directory of a TIFF. Raises any of `DECODE_ERRORS`."""
    file: tifffile.TiffFile = load_tifffile().TiffFile(content.stream)
    file.pages.first  # noqa: B018 - read here, where errors are expected
    return file


def vendor(page: tifffile.TiffPage) -> str | None:
    """Whose format this is, where its pages alone do not make the slide: overlaps, offsets, tiles of its own kind."""
    for name, found in (
        ("Hamamatsu NDPI", page.is_ndpi),
        ("Leica SCN", page.is_scn),
        ("Ventana BIF", page.is_bif),
        ("Philips TIFF", page.is_philips),
        ("Trestle TIFF", str(page.software).startswith("MedScan")),
    ):
        if found:
            return name
    return None


def level_pages(file: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """The first page and those that hold the same in less detail, finest first.

    They are tiled, and follow the first page (marked as reduced, or Aperio's) or hang below it (as in OME-TIFF).
    """
    first = file.pages.first
    levels = [first]
    if not first.is_tiled:
        return levels
    further = [page for page in _some(file.pages) if page.is_tiled and (page.subfiletype & 1 or first.is_svs)]
    for page in further or _some(first.pages, 0):
        if _is_smaller(page, levels[-1], first):
            levels.append(page)
    return levels


def _some(pages: tifffile.TiffPages | None, start: int = 1) -> list[tifffile.TiffPage]:
    """Pages from `start` on, as many as can be read: a damaged thumbnail or label costs nothing."""
    found: list[tifffile.TiffPage] = []
    try:
        while pages is not None and len(found) < MAX_PAGES:
            found.append(cast("tifffile.TiffPage", pages[start + len(found)]))
    except DECODE_ERRORS:
        pass
    return found


def _is_smaller(page: tifffile.TiffPage, last: tifffile.TiffPage, first: tifffile.TiffPage) -> bool:
    """Whether `page` is `first` shrunk to less than `last`: the same shape, but for rounding."""
    width, height = page.imagewidth, page.imagelength
    if not (0 < width < last.imagewidth and 0 < height < last.imagelength):
        return False
    ratio = first.imagelength / first.imagewidth
    return (width - 1) * ratio - 1 <= height <= (width + 1) * ratio + 1


def stated_mpp(page: tifffile.TiffPage) -> tuple[float, float] | None:
    """Micrometres a pixel (down, across), or None where the file does not say, or says what no microscope has."""
    text = page.description[:MAX_DESCRIPTION]
    if page.is_svs:
        found = re.search(r"\|\s*MPP\s*=\s*" + _NUMBER, text)
        return plausible_mpp(float(found[1]), float(found[1])) if found else None
    if page.is_ome and (pixels := re.search(r"<(?:\w+:)?Pixels\b[^>]*>", text)):
        return plausible_mpp(_ome_size(pixels[0], "Y"), _ome_size(pixels[0], "X"))
    unit = _OF_RESOLUTION_UNIT.get(int(page.tags.valueof(296, 2)))
    if unit is None:
        return None
    return plausible_mpp(_resolution(page, 283, unit), _resolution(page, 282, unit))


def _ome_size(pixels: str, axis: str) -> float:
    size = re.search(rf'\bPhysicalSize{axis}="{_NUMBER}"', pixels)
    unit = re.search(rf'\bPhysicalSize{axis}Unit="([^"]{{1,20}})"', pixels)
    return float(size[1]) * _MICROMETRES.get(unit[1] if unit else "µm", math.nan) if size else math.nan


def _resolution(page: tifffile.TiffPage, tag: int, unit: float) -> float:
    value = page.tags.valueof(tag)
    return unit * value[1] / value[0] if isinstance(value, tuple) and len(value) == 2 and value[0] else math.nan


def plausible_mpp(down: float, across: float) -> tuple[float, float] | None:
    """Both, if a microscope may have them: 300 dots an inch, which programs write without knowing, would be 85."""
    return (down, across) if MIN_MPP <= down <= MAX_MPP and MIN_MPP <= across <= MAX_MPP else None
