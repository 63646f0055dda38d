"""The palette: class ids, names and colours, and label images to class ids and back.

A label image is RGB, one colour a class. Here it becomes a map of class ids (uint8, the position in the palette),
which everything else works on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from histoseg_fast import _core
from histoseg_fast.errors import LabelError

MIN_CLASSES = 2
MAX_CLASSES: int = _core.max_classes
UNMATCHED: int = _core.unmatched
"""The id of a pixel whose colour is too far from every palette colour (only where `strict=False`)."""

SHOWN_OFFENDERS = 3


@dataclass(frozen=True)
class Palette:
    """Classes in the order of their ids; the first one is the background.

    Parameters
    ----------
    names : class names, unique, 2 to 32 of them.
    colours : as many unique (red, green, blue) colours, each 0 to 255.

    Raises
    ------
    LabelError
        If any of this does not hold.
    """

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if not MIN_CLASSES <= len(self.names) <= MAX_CLASSES:
            raise LabelError(f"a palette has {MIN_CLASSES} to {MAX_CLASSES} classes, not {len(self.names)}")
        if len(self.names) != len(self.colours):
            raise LabelError(f"a palette needs a colour for each class: {len(self.names)} names, "
                             f"{len(self.colours)} colours")  # fmt: skip
        for name in self.names:
            if not isinstance(name, str) or not name:
                raise LabelError(f"a class name is a text that is not empty, not {name!r}")
        for name, colour in zip(self.names, self.colours, strict=True):
            check_colour(name, colour)
        for what, values in (("name", self.names), ("colour", self.colours)):
            if len(set(values)) != len(values):
                twice = next(value for value in values if values.count(value) > 1)
                raise LabelError(f"two classes of a palette have the {what} {twice!r}")

    @classmethod
    def parse(cls, text: str) -> Palette:
        """The palette that `text` describes, such as ``"background=0,0,0;tumour=255,0,0;stroma=0,255,0"``.

        Raises
        ------
        LabelError
            If the text is not a list of ``name=red,green,blue`` separated by semicolons, or no valid palette.
        """
        names, colours = [], []
        for entry in text.split(";"):
            name, _, numbers = entry.partition("=")
            parts = [part.strip() for part in numbers.split(",")]
            if len(parts) != 3 or not all(part.isascii() and part.isdigit() and len(part) <= 3 for part in parts):
                raise LabelError(f"palette entry {entry.strip()!r} is not name=red,green,blue",
                                 fix="write it like background=0,0,0;tumour=255,0,0")  # fmt: skip
            names.append(name.strip())
            colours.append((int(parts[0]), int(parts[1]), int(parts[2])))
        return cls(tuple(names), tuple(colours))

    @cached_property
    def array(self) -> npt.NDArray[np.uint8]:
        """The colours, uint8 (classes, 3), read-only."""
        colours = np.array(self.colours, np.uint8)
        colours.flags.writeable = False
        return colours

    def __len__(self) -> int:
        return len(self.names)


def check_colour(name: str, colour: tuple[int, int, int]) -> None:
    """Raises LabelError unless `colour` is a tuple of three integers from 0 to 255."""
    if not isinstance(colour, tuple) or len(colour) != 3:
        raise LabelError(f"the colour of {name!r} is not a tuple of red, green, blue: {colour!r}")
    for value in colour:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 255:
            raise LabelError(f"the colour of {name!r} has {value!r}, which is no integer from 0 to 255")


PAPER_PALETTE = Palette(("background", "cancer", "stroma"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)))


class Decoded(NamedTuple):
    """A decoded label image.

    Attributes
    ----------
    ids : uint8 (height, width), class ids; UNMATCHED where no colour is near enough.
    approximate : pixels off the palette, but within the tolerance.
    unmatched : pixels farther off.
    offenders : int64 (k, 5), rows y, x, red, green, blue of the first unmatched pixels (at most 16).
    """

    ids: npt.NDArray[np.uint8]
    approximate: int
    unmatched: int
    offenders: npt.NDArray[np.int64]


def decode(
    rgb: npt.NDArray[np.uint8],
    palette: Palette = PAPER_PALETTE,
    *,
    tolerance: float = 0.0,
    strict: bool = True,
    threads: int = 0,
) -> Decoded:
    """The class ids of a label image.

    A pixel of exactly a palette colour is that class. Any other takes the nearest colour (Euclidean distance in RGB,
    0 to 441.7; the lower id on a tie) if it is no farther than `tolerance`.

    Parameters
    ----------
    rgb : uint8 (height, width, 3), or 4 with an alpha channel that is ignored; any strides.
    palette : the classes.
    tolerance : largest accepted distance; 0 accepts exact colours only.
    strict : raise if a pixel is farther off; otherwise its id is UNMATCHED and the result reports it.
    threads : 0 chooses by the size of the image.

    Raises
    ------
    LabelError
        If an argument is wrong, or, when strict, if a pixel has no class.
    """
    try:
        decoded = Decoded(*_core.decode_labels(rgb, palette.array, tolerance, threads))
    except (TypeError, ValueError) as error:
        raise LabelError(first_line(error)) from error
    if strict and decoded.unmatched:
        raise LabelError(
            f"{decoded.unmatched} of {decoded.ids.size} label pixels are off the palette ({describe(decoded)})",
            fix="save labels without lossy compression or smoothing, pass the palette they were drawn with, or raise "
            f"the tolerance (now {tolerance:g})",
        )
    return decoded


def encode(ids: npt.NDArray[np.uint8], palette: Palette = PAPER_PALETTE) -> npt.NDArray[np.uint8]:
    """The colours of class ids.

    Parameters
    ----------
    ids : uint8 (height, width), each below ``len(palette)``; any strides.
    palette : the classes.

    Returns
    -------
    uint8 (height, width, 3)

    Raises
    ------
    LabelError
        If the array is of another type or shape, or an id has no colour; it names the first one.
    """
    try:
        return _core.encode_labels(ids, palette.array)
    except ValueError as error:
        raise LabelError(first_line(error)) from error


def describe(decoded: Decoded) -> str:
    """The first offenders as text: where they are and their colours."""
    shown = [f"x={x}, y={y} is {r},{g},{b}" for y, x, r, g, b in decoded.offenders[:SHOWN_OFFENDERS].tolist()]
    more = decoded.unmatched - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")


def first_line(error: Exception) -> str:
    """What the core says: its TypeErrors go on with a listing of signatures."""
    return str(error).partition("\n")[0]
