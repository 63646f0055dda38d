"""What commands check of their arguments before any work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from histoseg_fast.errors import LabelError, UsageError
from histoseg_fast.files import probe

if TYPE_CHECKING:
    from histoseg_fast.labels import Palette


def check_target(path: Path, *sources: str | Path) -> None:
    """UsageError where the file `path` cannot be written, or is one of the `sources` that it is made of."""
    if any(os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source) for source in sources):
        raise UsageError("is the input itself", where=path, fix="write another file")
    try:
        probe(path)
    except OSError as error:
        raise UsageError(f"cannot be written ({error.strerror or error})", where=path) from error


def refuse(options: dict[str, bool], need: str) -> None:
    """UsageError if any of `options` (whether each was given, by its name) was given without the option `need`."""
    if given := [name for name, there in options.items() if there]:
        raise UsageError(f"{', '.join(given)} would do nothing without {need}", fix="leave out what does nothing")


def parse_palette(option: str, text: str) -> Palette:
    """The palette that `text`, the value of `option`, describes; UsageError where it is none."""
    from histoseg_fast.labels import Palette

    try:
        return Palette.parse(text)
    except LabelError as error:
        raise UsageError(error.what, where=option, fix=error.fix) from None
