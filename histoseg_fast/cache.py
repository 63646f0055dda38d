"""The folder of the user's in which things are kept between runs; deleting it is always safe."""

from __future__ import annotations

import os
import sys
from pathlib import Path

FOLDER_VARIABLE = "HISTOSEG_CACHE"


def cache_folder() -> Path:
    """$HISTOSEG_CACHE, or histoseg-fast in the user's cache folder of this system."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        given = Path(os.environ.get("XDG_CACHE_HOME") or "")
        root = given if given.is_absolute() else Path.home() / ".cache"  # as the XDG specification has it
    return root / "histoseg-fast"
