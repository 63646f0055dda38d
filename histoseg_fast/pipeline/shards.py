"""Shards: a run's images dealt out to several runs, each of which works out its own part alone."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from histoseg_fast.errors import UsageError
from histoseg_fast.images.companions import Folders
from histoseg_fast.images.sizes import PIXELS_A_BYTE, image_pixels
from histoseg_fast.pipeline.sources import Source

MAX_SHARDS = 100_000
HEADER_READERS = 8
"""Threads that read headers: on a network's file system each waits for the answer to a few small reads."""
NAMES_SHOWN = 3


@dataclass(frozen=True)
class Shard:
    """Part `number`, from 1, `of` so many."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "2/8". Raises UsageError."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        number, of = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= of <= MAX_SHARDS:
            fix = f"write I/N, as 2/8: I from 1 to N, N at most {MAX_SHARDS:,}"
            raise UsageError(f"--shard {text!r} is no share of the images", fix=fix)
        return cls(number, of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class Share:
    """The images of one shard. found, found_pixels : images and pixels of all shards. guessed : those of `sources`, by
    name, whose pixels were guessed from their bytes.
    """

    shard: Shard
    sources: list[Source]
    pixels: int
    found: int
    found_pixels: int
    guessed: list[str]

    def __str__(self) -> str:
        told = (
            f"shard {self.shard}: {len(self.sources)} of {self.found} image(s), "
            f"{self.pixels / 1e6:.1f} of {self.found_pixels / 1e6:.1f} megapixels"
        )
        if self.guessed:
            names = ", ".join(self.guessed[:NAMES_SHOWN]) + (", ..." if len(self.guessed) > NAMES_SHOWN else "")
            told += f"; {len(self.guessed)} by bytes, as no header tells their size: {names}"
        return told

    def as_json(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "number": self.shard.number,
            "of": self.shard.of,
            "images": len(self.sources),
            "megapixels": round(self.pixels / 1e6, 3),
            "sized_by_bytes": self.guessed,
        }


def take_share(sources: Sequence[Source], shard: Shard) -> Share:
    """Those of `sources` that `shard` has to do, in their order. Reads a few bytes of every file."""
    folders = Folders()
    with ThreadPoolExecutor(HEADER_READERS, "headers") as pool:
        sizes = list(pool.map(lambda source: _pixels(source, folders), sources))
    parts = deal(((source.name, pixels) for source, (pixels, _) in zip(sources, sizes, strict=True)), shard.of)
    mine = [(source, *size) for source, size in zip(sources, sizes, strict=True) if parts[source.name] == shard.number]
    return Share(
        shard,
        [source for source, _, _ in mine],
        sum(pixels for _, pixels, _ in mine),
        len(sources),
        sum(pixels for pixels, _ in sizes),
        [source.name for source, _, known in mine if not known],
    )


def _pixels(source: Source, folders: Folders) -> tuple[int, bool]:
    """As `image_pixels`; what is behind a URL goes by its bytes, and is no exception."""
    return image_pixels(source.path, folders) if source.place is None else (PIXELS_A_BYTE * source.bytes, True)


def deal(weights: Iterable[tuple[str, int]], of: int) -> dict[str, int]:
    """The part, 1 to `of`, of each name: the heaviest first, each to the part that is lightest by then.

    The same for any order of `weights`, whose names differ. No two parts are further apart than the heaviest weight.
    """
    parts = [(0, 0, number) for number in range(1, of + 1)]  # weight, names, number
    dealt: dict[str, int] = {}
    for name, weight in sorted(weights, key=lambda item: (-item[1], item[0])):
        total, count, number = parts[0]
        dealt[name] = number
        heapq.heapreplace(parts, (total + weight, count + 1, number))
    return dealt
