"""A process of its own in which OpenSlide reads one slide: a damaged one may abort it, and must not take the run along.

Run as a script with the slide's path as its argument. It writes one line of JSON (what the slide is, or "error"), then
answers requests (`REQUEST`: x, y in pixels of the finest level, the level, width and height) with `ANSWER`, a number of
bytes, and those bytes: RGBA pixels, or where the number is negative, the error as text. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
from typing import Any

REQUEST, ANSWER = struct.Struct("<qqiii"), struct.Struct("<q")
MAX_LEVELS = 64
MAX_MEMORY_BYTES = 8 * 2**30
"""Address space of the process, so that no header can claim the machine's memory."""


def describe(slide: Any) -> dict[str, Any]:
    """Size, downsample and tile size of each level, and micrometres a pixel; numbers as the slide states them."""
    properties = slide.properties
    levels = [
        {
            "size": slide.level_dimensions[i],
            "downsample": slide.level_downsamples[i],
            "tile": [properties.get(f"openslide.level[{i}].tile-{side}") for side in ("width", "height")],
        }
        for i in range(min(slide.level_count, MAX_LEVELS))
    ]
    return {"levels": levels, "mpp": [properties.get(f"openslide.mpp-{axis}") for axis in "yx"]}


def limit() -> None:
    """Bound the memory of this process, and leave no core behind."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def serve(path: str) -> None:
    """Open the slide, say what it is, and answer until the input ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer

    def tell(head: dict[str, Any]) -> None:
        answers.write(json.dumps(head).encode() + b"\n")
        answers.flush()

    sys.path[:] = [folder for folder in sys.path if folder != os.path.dirname(__file__)]  # its modules are no packages
    try:
        import openslide
    except ImportError as error:
        return tell({"missing": str(error)})
    limit()
    try:
        slide = openslide.OpenSlide(path)
        tell(describe(slide))
    except (openslide.OpenSlideError, OSError, ValueError) as error:
        return tell({"error": str(error) or type(error).__name__})
    while len(request := requests.read(REQUEST.size)) == REQUEST.size:
        x, y, level, width, height = REQUEST.unpack(request)
        try:
            pixels = slide.read_region((x, y), level, (width, height)).tobytes()
            answers.write(ANSWER.pack(len(pixels)))
        except (openslide.OpenSlideError, MemoryError) as error:
            pixels = str(error).encode("utf-8", "backslashreplace") or b"out of memory"
            answers.write(ANSWER.pack(-len(pixels)))
        answers.write(pixels)
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
