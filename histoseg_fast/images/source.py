"""The one interface behind which every raster format is read, and what the formats share."""

from __future__ import annotations

import abc
import contextlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np

from histoseg_fast.errors import ImageError
from histoseg_fast.images.content import MORE_MEMORY, OUT_OF_MEMORY, Content, FileSet

MAX_SIDE = 2**20
"""Longest side of an image, in pixels."""

MAX_DECODED_PIXELS = 2**28
"""Most pixels of an image that has to be decoded whole (PNG, JPEG)."""

CONVERTED_ROWS_BYTES = 4 * 2**20
"""Samples are converted to RGB in blocks of about this size, so that temporaries stay in the cache."""

SIXTEEN_BITS = "16-bit samples scaled to 8 bits"

DECODE_ERRORS = (
    RuntimeError,  # every error class of imagecodecs; NotImplementedError of tifffile
    ValueError,  # TiffFileError, shapes that do not fit, text that is no UTF-8
    TypeError,  # tifffile: a tag whose value has another type than the standard asks for
    AttributeError,  # the same
    LookupError,  # tifffile: unknown enumeration members, lists that are too short
    ArithmeticError,  # tifffile: division by a zero side; numbers that fit no integer type
    AssertionError,  # tifffile
    EOFError,
    OSError,  # a disk that fails while it is read
    MemoryError,  # sizes that no machine has
    struct.error,
    zlib.error,
)
"""What the decoders raise for bad data. All else (a programming error, an interrupt) passes through."""


class OverLimit(ImageError):
    """An image that claims more than any reader here may take; no other reader is asked."""


class ImageSource(abc.ABC):
    """One opened image, read as 8-bit RGB from top to bottom. A context manager.

    Alpha is composited over white, which is what glass looks like. Grey is replicated, palettes are
    resolved, 16-bit samples become (v + 128) // 257 and `warnings` says so. Orientation tags (EXIF,
    TIFF) are ignored on purpose: masks share the grid of the stored pixels. Embedded colour profiles
    and gamma are ignored as well: networks are trained on stored values.

    Attributes
    ----------
    path, size_bytes, sha256 : the file, its size, and the hex digest of its bytes.
    format : "png", "jpeg", "tiff" or "openslide" (what that library alone reads).
    width, height : size in pixels.
    slide : whether this is a whole slide: resolution levels, or a format that slide scanners write.
    level : the resolution level that is read, or resampled from; 0 is the finest.
    scale : pixels of level 0 (down, across) in one pixel of the grid that `read_rows` gives.
    mpp : micrometres a pixel of the grid that `read_rows` gives, or None where the file does not say.
    warnings : what a reader of the results should know, one clause each.
    """

    format: str
    slide: bool = False
    level: int = 0
    scale: tuple[float, float] = (1.0, 1.0)
    mpp: float | None = None
    width: int
    height: int

    def __init__(self, content: Content | FileSet):
        self._content = content
        self.path = content.path
        self.size_bytes = content.size
        self.sha256 = content.sha256
        self.warnings: list[str] = []

    def read_rows(self, y0: int, y1: int, out: np.ndarray, columns: Sequence[tuple[int, int]] | None = None) -> None:
        """Fill `out` with the rows y0 to y1 (exclusive), or at least with their pixels in `columns`.

        columns : disjoint spans (first, end) from left to right; what lies outside of them may be left undefined,
        and formats that store tiles do not decode it.

        `out` is uint8 of shape (y1 - y0, width, 3), of any strides. Bands may come in any order and may
        overlap; they are cheap when y0 never falls and overlaps are at most a few hundred rows. Raises
        ImageError where the data is damaged, ValueError where the arguments make no sense.
        """
        if not 0 <= y0 <= y1 <= self.height:
            raise ValueError(f"rows {y0} to {y1} are outside of an image of {self.height} rows")
        if out.dtype != np.uint8 or out.shape != (y1 - y0, self.width, 3):
            raise ValueError(f"out is {out.dtype} {out.shape}, not uint8 {(y1 - y0, self.width, 3)}")
        if y0 < y1:
            with self._told():
                if columns is None:
                    self._read(y0, y1, out)
                else:
                    self._read_columns(y0, y1, out, columns)

    def overview(self, step: int) -> np.ndarray | None:
        """The image shrunk by `step` (whole, from 1): uint8 (ceil(height / step), ceil(width / step), 3).

        Read in bounded memory from the coarsest level that is fine enough; None where there are no levels. Not while
        another thread reads rows. Raises ImageError where the data is damaged.
        """
        return None

    @abc.abstractmethod
    def _read(self, y0: int, y1: int, out: np.ndarray) -> None:
        """`read_rows` with checked arguments; may raise any of `DECODE_ERRORS`."""

    def _read_columns(self, y0: int, y1: int, out: np.ndarray, columns: Sequence[tuple[int, int]]) -> None:
        """`_read` where only the pixels in `columns` matter; formats that can leave the others out override it."""
        self._read(y0, y1, out)

    def close(self) -> None:
        """Let go of the file. ImageError where it changed while it was read (only files over 256 MiB)."""
        self._content.close()
        self._content.check_unchanged()

    def __enter__(self) -> ImageSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # the error that is under way says more than a second one would
            with contextlib.suppress(ImageError):
                self.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what decoders raise into an ImageError."""
        try:
            yield
        except ImageError:
            raise
        except MemoryError as error:
            raise ImageError(OUT_OF_MEMORY, where=self.path, fix=MORE_MEMORY) from error
        except DECODE_ERRORS as error:
            reason = str(error).strip() or type(error).__name__
            raise ImageError(
                f"damaged {self.format.upper()} data ({reason[:200]})", where=self.path, fix="copy or export it again"
            ) from error

    def _refuse(self, what: str, fix: str = "save it as 8-bit RGB", kind: type[ImageError] = ImageError) -> NoReturn:
        raise kind(what, where=self.path, fix=fix)

    def _check_size(self, width: int, height: int, max_pixels: int, fix: str) -> None:
        """Take the size that the header claims, before anything is allocated for it."""
        if width <= 0 or height <= 0:
            self._refuse(f"the header claims a size of {width} x {height}", "copy or export it again")
        if width > MAX_SIDE or height > MAX_SIDE or width * height > max_pixels:
            self._refuse(f"{width} x {height} pixels are over the limit of {max_pixels:,}", fix, OverLimit)
        self.width, self.height = width, height


class WholeSource(ImageSource):
    """A format that only decodes whole: straight into `out` where that is the whole image, else once."""

    def __init__(self, content: Content):
        super().__init__(content)
        assert content.data is not None
        self._data = content.data
        content.close()  # the bytes are held here alone, until they are decoded
        self._samples: np.ndarray | None = None

    @abc.abstractmethod
    def _decode_rgb(self, out: np.ndarray) -> bool:
        """Decode into (height, width, 3) `out`, rows packed and any distance apart; False where the codec cannot."""

    @abc.abstractmethod
    def _decode_samples(self) -> np.ndarray:
        """Decode to (height, width, channels), channels as stored."""

    @abc.abstractmethod
    def _convert(self, samples: np.ndarray, out: np.ndarray) -> None:
        """Turn rows of what `_decode_samples` gave into RGB."""

    def _read(self, y0: int, y1: int, out: np.ndarray) -> None:
        if self._samples is None:
            whole = y0 == 0 and y1 == self.height and out.strides[1:] == (3, 1) and out.flags.writeable
            if whole and self._decode_rgb(out):
                return
            samples = self._decode_samples()
            if samples.shape[:2] != (self.height, self.width):
                raise ValueError(f"decoded to {samples.shape}, the header said {(self.height, self.width)}")
            self._samples = samples
        step = max(1, CONVERTED_ROWS_BYTES // (self.width * 8))
        for y in range(y0, y1, step):
            end = min(y + step, y1)
            self._convert(self._samples[y:end], out[y - y0 : end - y0])

    def close(self) -> None:
        self._data, self._samples = b"", None
        super().close()


def to_rgb(samples: np.ndarray, out: np.ndarray, *, alpha: bool = False, premultiplied: bool = False) -> None:
    """Write samples as 8-bit RGB into `out`.

    samples : uint8 or uint16, (h, w, c): grey or RGB, followed by alpha if `alpha` is set.
    out : uint8 (h, w, 3).
    """
    if samples.dtype != np.uint8:
        samples = ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)
    opacity = None
    if alpha:
        samples, opacity = samples[..., :-1], samples[..., -1:]
    out[...] = samples  # one grey channel is repeated by broadcasting
    if opacity is None or (opacity == 255).all():
        return
    clear = 255 - opacity.astype(np.uint16)
    if premultiplied:
        out[...] = np.minimum(out + clear, 255)
    else:
        out[...] = (out * (255 - clear) + 255 * clear + 127) // 255
