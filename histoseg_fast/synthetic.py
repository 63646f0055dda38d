"""H&E-like fields with known labels, drawn from a seed: for the demo and for tests, which ship no real tissue.

A field is built the way a section is made. A layout of smooth noise says where tumour, stroma and glass lie; each
class is filled with its own texture as amounts of two dyes; nuclei are stamped on top; and the two dye maps are
exposed with Beer-Lambert, so colours mix as dyes do. The scale is that of a 10x to 20x scan: tumour nuclei are about
10 pixels across. All sizes below are in pixels and all amounts of dye are optical densities.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

BACKGROUND, CANCER, STROMA = 0, 1, 2

# Absorption of the two dyes in red, green and blue, and the lamp seen through bare glass.
HAEMATOXYLIN = np.array([0.59, 0.74, 0.345])
EOSIN = np.array([0.17, 0.85, 0.49])
GLASS_RGB = np.array([243.0, 236.0, 241.0])

_STAMPS_AT_ONCE = 2048


@dataclass
class _Layout:
    """Where things are. All arrays are (height, width)."""

    labels: np.ndarray  # uint8 class ids
    nests: np.ndarray  # float32, grows from a nest's rim to its middle; its slope points across the epithelium
    apex: np.ndarray  # float32: 0 far from a lumen, 1 at its wall
    along: np.ndarray  # float32 coordinate along the collagen fibres
    across: np.ndarray  # float32 coordinate across them: its contours are the fibres


@dataclass
class _Nuclei:
    """One entry a nucleus, float32 or float64 (n,): centre, half axes, angle of the long axis, amount of dye."""

    y: np.ndarray
    x: np.ndarray
    long: np.ndarray
    short: np.ndarray
    angle: np.ndarray
    dye: np.ndarray


def make_field(seed: int, width: int = 1128, height: int = 720) -> tuple[np.ndarray, np.ndarray]:
    """Draw one field of tissue and its labels.

    The same seed, size and numpy build give the same bytes. All three classes are present in a field of the default
    size; a field of a few pixels may hold only one.

    :param seed: any non-negative integer
    :return: RGB image, uint8 (height, width, 3), and class ids, uint8 (height, width): 0 background, 1 cancer, 2 stroma
    :raises ValueError: a side is smaller than one pixel, or the seed is negative
    """
    if width < 1 or height < 1:
        raise ValueError(f"a field of {width}x{height} pixels has no pixels: give a width and a height of at least 1")
    rng = np.random.Generator(np.random.PCG64(seed))
    layout = _lay_out(rng, height, width)
    haematoxylin, eosin = _fill(rng, layout)
    _stamp_nuclei(rng, layout, haematoxylin, eosin)
    _scatter_red_cells(rng, layout, haematoxylin, eosin)
    return _expose(rng, haematoxylin, eosin), layout.labels


def _stretch(controls: np.ndarray, size: int, scale: float) -> np.ndarray:
    """Cubic B-spline surface, float32 (size, n), of float32 (m, n) controls that lie `scale` pixels apart.

    Four weighted gathers rather than a matrix product: BLAS threads stall on busy machines, and its sums differ by CPU.
    """
    position = np.arange(size) / scale
    first = position.astype(np.int64)
    t, s = position - first, 1 - position + first
    surface = np.zeros((size, controls.shape[1]), np.float32)
    for offset, tap in enumerate((s**3, 3 * t**3 - 6 * t**2 + 4, 3 * s**3 - 6 * s**2 + 4, t**3)):
        surface += (tap / 6).astype(np.float32)[:, None] * controls[first + offset]
    return surface


def _noise(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Smooth noise, float32 of this (height, width), about standard normal, with features of `scale` pixels."""
    controls = rng.standard_normal([int((size - 1) / scale) + 4 for size in shape], dtype=np.float32)
    controls *= np.float32(315 / 151)  # averaging in the spline makes the surface flatter than its controls by this
    return _stretch(_stretch(controls.T, shape[1], scale).T, shape[0], scale)


def _threshold(field: np.ndarray, share: float) -> float:
    """The value that the highest `share` of the numbers exceed; infinite if there are none."""
    return float(np.quantile(field, 1 - share)) if field.size else np.inf


def _lay_out(rng: np.random.Generator, height: int, width: int) -> _Layout:
    """Decide the class of every pixel. Thresholds are quantiles, so the shares are drawn and not left to chance."""
    noise = functools.partial(_noise, rng, (height, width))
    rows, columns = (axis.astype(np.float32) for axis in np.ogrid[:height, :width])
    nests = noise(58) + 0.45 * noise(27) + 0.12 * noise(9)
    outline = _threshold(nests[::3, ::3], rng.uniform(0.42, 0.52))
    cancer = nests > outline

    # A lumen opens where a nest is deep; coarser noise keeps some nests closed.
    depth = nests - 0.35 * noise(110) + 0.09 * noise(5)
    wall = _threshold(depth[::3, ::3][cancer[::3, ::3]], rng.uniform(0.12, 0.26))

    # Glass comes in from one side and in pools; ridges of finer noise stay tissue and make the septa of airspaces.
    # Close to a nest it wins sooner: shrinkage tears tumour from stroma there.
    turn = rng.uniform(0, 2 * np.pi)
    slope = math.cos(turn) * columns / width + math.sin(turn) * rows / height
    airspace = noise(90) + 1.4 * slope + 0.10 * noise(6)
    septum = np.exp(-((noise(26) / 0.22) ** 2))
    tear = np.exp(-(((nests - outline + 0.06) / 0.05) ** 2)) * np.maximum(noise(40), 0)
    glass = airspace - 1.6 * septum + 0.9 * tear
    edge = _threshold(glass[::3, ::3][~cancer[::3, ::3]], rng.uniform(0.14, 0.32))

    labels = np.where(glass > edge, np.uint8(BACKGROUND), np.uint8(STROMA))
    labels[cancer] = CANCER
    labels[cancer & (depth > wall)] = BACKGROUND

    # The fibres' own coordinates: straight axes, turned at random and bent by noise, so that they flow and wave.
    turn = rng.uniform(0, 2 * np.pi)
    across = math.cos(turn) * columns + math.sin(turn) * rows + 75 * noise(150) + 7 * noise(28) + 1.2 * noise(10)
    along = math.cos(turn) * rows - math.sin(turn) * columns + 75 * noise(150)
    return _Layout(labels, nests, np.clip(1 - (wall - depth) / 0.45, 0, 1), along, across)


def _fibres(rng: np.random.Generator, layout: _Layout) -> np.ndarray:
    """Collagen, float32 (height, width), about standard normal: noise stretched along the fibres.

    The noise is a periodic table, fine enough that its nearest entry will do: a gather, not an integral along the flow.
    """
    shape = (1024, 256)
    blur_y, blur_x = 5.0 * np.fft.fftfreq(shape[0])[:, None], 7.0 * np.fft.rfftfreq(shape[1])
    low_pass = np.exp(-2 * np.pi**2 * (blur_y**2 + blur_x**2))
    table = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * low_pass, s=shape)
    table = (table / table.std()).astype(np.float32)

    def read(finer: float) -> np.ndarray:
        row = (layout.across * (4 * finer)).astype(np.int32) & (shape[0] - 1)
        column = (layout.along * (0.5 * finer)).astype(np.int32) & (shape[1] - 1)
        found: np.ndarray = table.ravel().take(row * shape[1] + column)
        return found

    return 0.45 * read(1.9) + 0.6 * read(0.9) + 0.66 * read(0.37)


def _fill(rng: np.random.Generator, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    """Amounts of haematoxylin and eosin before any nucleus, both float32 (height, width)."""
    shape = layout.labels.shape
    patches, grain = _noise(rng, shape, 35), _noise(rng, shape, 2.2)
    # Collagen: pink strands; where it is loose, the gaps between strands let the lamp through.
    fibres = _fibres(rng, layout)
    loose = np.clip(0.5 + 0.45 * patches, 0.1, 1.2)
    strands = np.clip(0.61 + 0.20 * fibres - 0.16 * loose + 0.09 * grain, 0.05, None)
    pink = strands * np.clip(1 - loose * np.maximum(-fibres - 0.5, 0), 0.12, 1)

    # Cytoplasm: purple at the base of the cells, pinker towards the lumen; cracks along the zero lines of noise.
    cracks = np.exp(-((_noise(rng, shape, 8) / 0.17) ** 2)) * np.clip(0.5 + 0.6 * patches, 0, 1)
    body = (1 + 0.17 * grain + 0.10 * patches) * (1 - 0.85 * cracks)
    purple = np.clip((0.34 - 0.12 * layout.apex) * body, 0, None)
    cytoplasm = np.clip((0.47 + 0.06 * layout.apex) * body, 0, None)

    cancer, stroma = layout.labels == CANCER, layout.labels == STROMA
    haematoxylin = np.where(cancer, purple, (0.06 + 0.10 * pink) * stroma)
    return haematoxylin, np.where(cancer, cytoplasm, pink * stroma)


def _scatter(rng: np.random.Generator, allowed: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Centres (y, x), float32 (n,), `spacing` apart with jitter, where the mask `allowed` (height, width) is true.

    A jittered hexagonal grid packs cells side by side without clumps, as a sheet of cells is packed.
    """
    height, width = allowed.shape
    row = np.arange(height / (0.866 * spacing) + 1)[:, None]
    column = np.arange(width / spacing + 1) + 0.5 * (row % 2)
    jitter = rng.uniform(-0.35, 0.35, (2, *column.shape))
    y = ((0.866 * row + jitter[0]) * spacing).ravel().astype(np.float32)
    x = ((column + jitter[1]) * spacing).ravel().astype(np.float32)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    y, x = y[inside], x[inside]
    keep = allowed[y.astype(np.int64), x.astype(np.int64)]
    return y[keep], x[keep]


def _uphill(field: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Angle, float32 (n,), in which `field` (height, width) grows at the points given."""
    padded = np.pad(field, 4, mode="edge")
    row, column = y.astype(np.int64) + 4, x.astype(np.int64) + 4
    rise = padded[row + 4, column] - padded[row - 4, column]
    angle: np.ndarray = np.arctan2(rise, padded[row, column + 4] - padded[row, column - 4])
    return angle


def _stamp(canvas: np.ndarray, nuclei: _Nuclei, rim: float) -> None:
    """Draw nuclei as bent ellipses into `canvas`, float32 (height, width), keeping the darker where they overlap.

    :param rim: how much paler the middle is than the rim, as a share (open chromatin)
    """
    if not len(nuclei.y):
        return
    height, width = canvas.shape
    reach = int(np.ceil(nuclei.long.max())) + 2
    padded = np.zeros((height + 2 * reach, width + 2 * reach), np.float32)
    window = np.arange(-reach, reach + 1)
    for start in range(0, len(nuclei.y), _STAMPS_AT_ONCE):  # in blocks: the windows of a large field would not fit
        y, x, long, short, angle, dye = (v[start : start + _STAMPS_AT_ONCE, None, None] for v in vars(nuclei).values())
        row, column = y.astype(np.int32), x.astype(np.int32)
        dy, dx = window[:, None] - (y - row), window - (x - column)
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / long
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / short
        v += (u * u - 0.4) * (0.6 * np.sin(7 * angle + 3 * dye))  # bend each one its own way
        radius = np.sqrt(u * u + v * v)
        ink = np.clip((1 - radius) * short + 0.5, 0, 1) * (1 - rim + rim * radius * radius) * dye
        index = (row + reach + window[:, None]) * padded.shape[1] + (column + reach + window)
        drawn = ink > 0
        np.maximum.at(padded.reshape(-1), index[drawn], ink[drawn])
    np.maximum(canvas, padded[reach : reach + height, reach : reach + width], out=canvas)


def _cancer_nuclei(rng: np.random.Generator, layout: _Layout) -> _Nuclei:
    """Crowded, large and unlike each other; columnar (pointing at the lumen) where the nest is a gland."""
    size = rng.uniform(0.95, 1.15)
    y, x = _scatter(rng, (layout.labels == CANCER) & (layout.apex < 0.8), rng.uniform(9.5, 11.5) * size)
    n = len(y)
    scale = size * np.exp(rng.normal(0, 0.17, n))
    stretch = np.exp(np.abs(rng.normal(0.22, 0.18, n)))
    angle = _uphill(layout.nests, y, x) + rng.normal(0, 0.35, n)
    dye = np.clip(rng.normal(rng.uniform(1.0, 1.35), 0.30, n), 0.45, 2.1)
    return _Nuclei(y, x, 3.9 * scale * stretch, 3.9 * scale / stretch, angle, dye)


def _stroma_nuclei(rng: np.random.Generator, layout: _Layout) -> list[_Nuclei]:
    """Thin fibroblasts along the fibres, and small round dark lymphocytes in loose crowds."""
    stroma = layout.labels == STROMA
    y, x = _scatter(rng, stroma, 17.0)
    n = len(y)
    angle = _uphill(layout.across, y, x) + np.pi / 2 + rng.normal(0, 0.2, n)
    dye = np.clip(rng.normal(1.1, 0.25, n), 0.4, None)
    fibroblasts = _Nuclei(y, x, rng.uniform(4, 7.5, n), rng.uniform(1.2, 2.2, n), angle, dye)
    crowds = _noise(rng, stroma.shape, 45) + 0.5 * rng.standard_normal(stroma.shape, dtype=np.float32)
    y, x = _scatter(rng, stroma & (crowds > 1.6), 7.5)
    n = len(y)
    radius = rng.uniform(2.4, 3.3, n)
    dye = np.clip(rng.normal(1.6, 0.2, n), 1, None)
    return [fibroblasts, _Nuclei(y, x, radius * 1.1, radius * 0.95, rng.uniform(0, np.pi, n), dye)]


def _stamp_nuclei(rng: np.random.Generator, layout: _Layout, haematoxylin: np.ndarray, eosin: np.ndarray) -> None:
    """Add the nuclei to both dye maps. A nucleus that juts out of its tissue takes its label with it."""
    labels = layout.labels
    tumour, connective = np.zeros_like(haematoxylin), np.zeros_like(haematoxylin)
    _stamp(tumour, _cancer_nuclei(rng, layout), rim=rng.uniform(0.15, 0.45))  # chromatin: each tumour has its own
    for nuclei in _stroma_nuclei(rng, layout):
        _stamp(connective, nuclei, rim=0.1)
    connective[tumour > 0] = 0
    labels[(connective > 0.3) & (labels == BACKGROUND)] = STROMA
    labels[tumour > 0.3] = CANCER

    chromatin = 1 + 0.20 * _noise(rng, labels.shape, 1.6)
    haematoxylin += np.maximum(tumour, connective) * chromatin
    eosin *= 1 - 0.4 * np.minimum(tumour + connective, 1)  # a nucleus displaces the cytoplasm


def _scatter_red_cells(rng: np.random.Generator, layout: _Layout, haematoxylin: np.ndarray, eosin: np.ndarray) -> None:
    """Add a few crowds of red blood cells on the glass: eosin discs, paler in the middle. They stay background."""
    glass = layout.labels == BACKGROUND
    y, x = _scatter(rng, glass & (_noise(rng, glass.shape, 30) > 1.9), 6.5)
    n = len(y)
    radius = rng.uniform(2.3, 3.0, n)
    short, angle, dye = radius * rng.uniform(0.8, 1, n), rng.uniform(0, np.pi, n), rng.uniform(0.5, 0.9, n)
    discs = np.zeros_like(eosin)
    _stamp(discs, _Nuclei(y, x, radius, short, angle, dye), rim=0.35)
    eosin += np.where(glass, discs, 0)
    haematoxylin += np.where(glass, 0.05 * discs, 0)


def _blur(field: np.ndarray) -> np.ndarray:
    """The softness of the optics: a 1-2-1 kernel both ways, edges repeated; float32 (height, width)."""
    padded = np.pad(field, 1, mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    blurred: np.ndarray = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16
    return blurred


def _expose(rng: np.random.Generator, haematoxylin: np.ndarray, eosin: np.ndarray) -> np.ndarray:
    """RGB, uint8 (height, width, 3), of the two dye maps, float32 (height, width), seen through one lab's stain."""
    # Labs and batches differ in the hue and in the strength of each dye.
    first = HAEMATOXYLIN * rng.normal(1, 0.04, 3) * rng.uniform(0.85, 1.15)
    second = EOSIN * rng.normal(1, 0.04, 3) * rng.uniform(0.80, 1.20)
    glass = GLASS_RGB + rng.normal(0, 2, 3)
    haematoxylin, eosin = _blur(haematoxylin), _blur(eosin)
    image: np.ndarray = rng.standard_normal((*eosin.shape, 3), dtype=np.float32) * np.float32(1.6)  # the sensor's noise
    for channel in range(3):
        density = haematoxylin * np.float32(first[channel]) + eosin * np.float32(second[channel])
        image[..., channel] += np.float32(glass[channel]) * np.exp(-density)
    exposed: np.ndarray = np.clip(image + 0.5, 0, 255)
    return exposed.astype(np.uint8)
