"""H&E histology images to cancer / stroma / background maps: a tiled inference engine.

    segmentation = histoseg_fast.segment("field.png")

What it offers to Python is in `histoseg_fast.api`, which is imported when it is first used: this import costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["HistosegError", "Plan", "Segmentation", "__version__", "load_plan", "segment", "stream"]

if TYPE_CHECKING:
    from histoseg_fast.api import HistosegError, Plan, Segmentation, load_plan, segment, stream


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from histoseg_fast import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
