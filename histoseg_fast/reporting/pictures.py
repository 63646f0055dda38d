"""Small pictures for the report: the image as JPEG and its class map as palette PNG, in bounded memory and bytes."""

from __future__ import annotations

import contextlib
import math
import os
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np

from histoseg_fast.errors import ImageError, LabelError
from histoseg_fast.images import ImageSource, Resolution, open_image
from histoseg_fast.images.pyramid import level_count
from histoseg_fast.labels import Palette, decode
from histoseg_fast.machine import available_cores
from histoseg_fast.pipeline.outputs import SLIDE_MASK_SUFFIX
from histoseg_fast.reporting.cohort import Cohort, Row

MAX_PICTURE_BYTES = 24 * 2**20
"""Most bytes of all pictures of a report together, before base64 makes a third more of them."""

MAX_SIDE, MIN_SIDE = 1024, 64
"""Longest side of a picture in pixels: where there is room, and where there is little."""

JPEG_BYTES_A_PIXEL = 0.3
"""About what H&E takes at the first quality; only the first guess at a size that fits."""

QUALITIES = (82, 68, 54)

BAND_BYTES = 16 * 2**20
"""About what is decoded at a time from formats that are read by bands."""

BIG_IMAGE_PIXELS = 1 << 24
"""Images above this are read one at a time."""

MAX_WORKERS = 4

VANISHED = "the image is no longer where it was read"
CHANGED = "the image has changed since the run"
UNREADABLE = "the image cannot be read any more"
NO_MASK = "the mask is missing, damaged, or not the one that the run wrote"
NO_ROOM = "there is no room for a picture: too many images in one report"


@dataclass(frozen=True)
class Picture:
    """The pictures of one image. image : JPEG, or empty. mask : PNG, or empty. notes : why one is missing."""

    image: bytes = b""
    mask: bytes = b""
    notes: tuple[str, ...] = ()


def make_pictures(cohort: Cohort, most: int = MAX_PICTURE_BYTES) -> Iterator[tuple[Row, Picture]]:
    """Each row with its pictures, in order, a few at a time in threads; all together at most `most` bytes.

    Every image with results gets the same share of them: the more there are, the smaller their pictures.
    """
    share = most // max(1, len(cohort.done))
    palette = Palette(cohort.classes, cohort.colours) if _distinct(cohort) else None
    big = threading.Lock()

    def work(row: Row) -> Picture:
        return picture(cohort.folder, row, palette, share, big) if row.done else Picture()

    workers = min(MAX_WORKERS, available_cores())
    pool = ThreadPoolExecutor(workers, "pictures")
    waiting: deque[tuple[Row, Future[Picture]]] = deque()
    try:
        for row in cohort.rows:
            waiting.append((row, pool.submit(work, row)))
            if len(waiting) > 2 * workers:
                first, made = waiting.popleft()
                yield first, made.result()
        while waiting:
            first, made = waiting.popleft()
            yield first, made.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _distinct(cohort: Cohort) -> bool:
    return len(cohort.classes) > 1 and len(set(cohort.colours)) == len(cohort.colours)


def picture(folder: Path, row: Row, palette: Palette | None, share: int, big: threading.Lock) -> Picture:
    """The pictures of `row`, at most `share` bytes together; `big` is held while a big image is read."""
    with big if row.width * row.height > BIG_IMAGE_PIXELS else contextlib.nullcontext():
        return _picture(folder, row, palette, share)


def _picture(folder: Path, row: Row, palette: Palette | None, share: int) -> Picture:
    notes = []
    side = int(min(MAX_SIDE, max(MIN_SIDE, math.sqrt(share / JPEG_BYTES_A_PIXEL))))
    rgb = ids = None
    try:
        if palette is None:
            raise LabelError("no mask is left")
        level = _mask_level(row, side)
        with open_image(folder / row.mask, Resolution(level=level)) as mask:
            _check(mask, row.mask_sha256, (-(-row.width >> level), -(-row.height >> level)))
            ids = shrink(mask, _factor(mask, side), _majority(palette))
    except (ImageError, LabelError):
        notes.append(NO_MASK)
    try:
        if not row.path or not os.path.exists(row.path):  # False, too, for a name that no file can have
            raise ImageError(VANISHED)
        with open_image(row.path) as image:
            _check(image, row.sha256)
            rgb = image.overview(_factor(image, side))
            rgb = shrink(image, _factor(image, side), _mean) if rgb is None else rgb
    except ImageError as error:
        notes.append(error.what if error.what in (VANISHED, CHANGED) else UNREADABLE)
    made = _fit(rgb, ids, palette, share)
    return Picture(notes=(*notes, NO_ROOM)) if made is None else Picture(made[0], made[1], tuple(notes))


def _factor(image: ImageSource, side: int) -> int:
    """How many pixels go into one of a picture of at most `side` a side."""
    return -(-max(image.width, image.height) // side)


def _mask_level(row: Row, side: int) -> int:
    """The level of the mask to shrink: of a slide's pyramid the smallest that is at least `side`, else the only one."""
    if not row.mask.endswith(SLIDE_MASK_SUFFIX):
        return 0
    longest, last = max(row.width, row.height), level_count(row.width, row.height) - 1
    return next((k for k in range(last, 0, -1) if longest >> k >= side), 0)


def _check(image: ImageSource, sha256: str, size: tuple[int, int] | None = None) -> None:
    """size : width and height, where they are known: an image itself may have been read at another resolution."""
    if image.sha256 != sha256 or size not in (None, (image.width, image.height)):
        raise ImageError(CHANGED)


def shrink(image: ImageSource, factor: int, reduce: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """The image in blocks of `factor` x `factor` pixels, each `reduce`d to one; read by bands."""
    rows = max(1, BAND_BYTES // (image.width * 3 * factor)) * factor
    parts = []
    for y in range(0, image.height, rows):
        band = np.empty((min(rows, image.height - y), image.width, 3), np.uint8)
        image.read_rows(y, y + len(band), band)
        parts.append(reduce(band, factor))
    return np.concatenate(parts)


def block_sums(values: np.ndarray, factor: int) -> np.ndarray:
    """Sums over blocks, uint32 (ceil(h / factor), ceil(w / factor), c); at the far edges of fewer pixels."""
    down = np.add.reduceat(values, np.arange(0, values.shape[0], factor), axis=0, dtype=np.uint32)
    return np.add.reduceat(down, np.arange(0, values.shape[1], factor), axis=1, dtype=np.uint32)


def _mean(rgb: np.ndarray, factor: int) -> np.ndarray:
    """Rounded mean colours, uint8 (h, w, 3)."""
    if factor == 1:
        return rgb
    counts = block_sums(np.ones((*rgb.shape[:2], 1), np.uint8), factor)
    means: np.ndarray = (block_sums(rgb, factor) + counts // 2) // counts
    return means.astype(np.uint8)


def _majority(palette: Palette) -> Callable[[np.ndarray, int], np.ndarray]:
    """The most frequent class of each block, the lowest id on a tie, uint8 (h, w)."""

    def reduce(rgb: np.ndarray, factor: int) -> np.ndarray:
        return majority(decode(rgb, palette).ids, factor, len(palette))

    return reduce


def majority(ids: np.ndarray, factor: int, classes: int) -> np.ndarray:
    """The most frequent id of each block of uint8 (h, w) ids, the lowest on a tie."""
    if factor == 1:
        return ids
    counts = [block_sums((ids == i).view(np.uint8)[..., None], factor)[..., 0] for i in range(classes)]
    winners: np.ndarray = np.argmax(counts, axis=0)
    return winners.astype(np.uint8)


def _fit(
    rgb: np.ndarray | None, ids: np.ndarray | None, palette: Palette | None, share: int
) -> tuple[bytes, bytes] | None:
    """JPEG and PNG of at most `share` bytes together: at lower quality, then at half the size; None where none fits."""
    while True:
        mask = b"" if ids is None or palette is None else palette_png(ids, palette.colours)
        for quality in QUALITIES:
            image = b"" if rgb is None else bytes(imagecodecs.jpeg8_encode(rgb, level=quality))
            if len(image) + len(mask) <= share:
                return image, mask
        sides = [max(array.shape[:2]) for array in (rgb, ids) if array is not None]
        if max(sides) <= MIN_SIDE:
            return None
        rgb = None if rgb is None else _mean(rgb, 2)
        ids = None if ids is None or palette is None else majority(ids, 2, len(palette))


def palette_png(ids: np.ndarray, colours: Sequence[tuple[int, int, int]]) -> bytes:
    """A palette PNG of class ids, uint8 (h, w), in which class 0, the background, is transparent."""
    rows = np.zeros((ids.shape[0], ids.shape[1] + 1), np.uint8)  # a leading zero a row says "no filter"
    rows[:, 1:] = ids
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], 8, 3, 0, 0, 0)),
        (b"PLTE", bytes(value for colour in colours for value in colour)),
        (b"tRNS", b"\0"),
        (b"IDAT", zlib.compress(rows.tobytes())),
        (b"IEND", b""),
    ]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
        for kind, body in chunks
    ]
    return b"".join([b"\x89PNG\r\n\x1a\n", *parts])
