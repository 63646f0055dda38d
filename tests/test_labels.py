"""Labels: the C++ decoder and encoder against a slow plain twin, and the palette's rules."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoseg_fast import _core
from histoseg_fast.errors import LabelError
from histoseg_fast.labels import MAX_CLASSES, PAPER_PALETTE, UNMATCHED, Palette, decode, encode

LEVELS = ["baseline", "avx2", "avx512"]
LEVELS = LEVELS[: LEVELS.index(_core.best_simd_level()) + 1]


@pytest.fixture(autouse=True)
def restore_simd_level():
    yield
    _core.set_simd_level(_core.best_simd_level())


def twin(rgb, colours, tolerance):
    """Ids, approximate, unmatched and offenders the slow way: all distances, float64."""
    pixels = rgb[..., :3].astype(np.int64)
    squared = ((pixels[:, :, None, :] - colours.astype(np.int64)) ** 2).sum(-1)
    nearest, least = squared.argmin(-1), squared.min(-1)
    known = np.sqrt(least.astype(np.float64)) <= tolerance
    ids = np.where(known, nearest, UNMATCHED).astype(np.uint8)
    where = np.argwhere(~known)[:16]
    offenders = np.concatenate([where, pixels[where[:, 0], where[:, 1]]], 1)
    return ids, int((known & (least > 0)).sum()), int((~known).sum()), offenders


@st.composite
def views(draw, image):
    """`image` seen through other strides: the same pixels, another layout."""
    layout = draw(st.sampled_from(["plain", "reversed", "turned", "padded", "fortran"]))
    if layout == "reversed":
        return np.ascontiguousarray(image[::-1, ::-1])[::-1, ::-1]
    if layout == "turned":
        return np.ascontiguousarray(image.swapaxes(0, 1)).swapaxes(0, 1)
    if layout == "padded":
        wide = np.full((image.shape[0] * 2, image.shape[1] + 3, *image.shape[2:]), 77, np.uint8)
        wide[::2, 1:-2] = image
        return wide[::2, 1:-2]
    return np.asfortranarray(image) if layout == "fortran" else image


@st.composite
def palettes(draw):
    colour = st.tuples(*[st.integers(0, 255)] * 3)
    colours = draw(st.lists(colour, min_size=1, max_size=draw(st.sampled_from([3, 5, 17, MAX_CLASSES]))))
    return np.array(colours, np.uint8).reshape(-1, 3)


@st.composite
def labels(draw):
    colours = draw(palettes())
    height, width = draw(st.integers(0, 9)), draw(st.integers(0, 200))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rgb = colours[random.integers(0, len(colours), (height, width))]
    noisy = random.random((height, width, 1)) < draw(st.sampled_from([0, 0.01, 0.5]))
    rgb = np.where(noisy, rgb + random.integers(-6, 7, rgb.shape), rgb).astype(np.uint8)
    if draw(st.booleans()):
        rgb = np.concatenate([rgb, random.integers(0, 256, (height, width, 1)).astype(np.uint8)], 2)
    return draw(views(rgb)), colours


@given(labels(), st.sampled_from([0, 1, 2, 3**0.5, 5.5, 60, 500, float("inf")]), st.integers(0, 5))
def test_decode_equals_the_twin_at_every_level(label, tolerance, threads):
    rgb, colours = label
    ids, approximate, unmatched, offenders = twin(rgb, colours, tolerance)
    for level in LEVELS:
        _core.set_simd_level(level)
        got = _core.decode_labels(rgb, colours, tolerance, threads)
        np.testing.assert_array_equal(got[0], ids)
        assert got[1:3] == (approximate, unmatched)
        np.testing.assert_array_equal(got[3], offenders)
        assert got[3].dtype == np.int64
        assert got[3].shape == (min(16, unmatched), 5)


@given(st.data(), palettes(), st.integers(0, 9), st.integers(0, 200), st.integers(0, 5))
def test_encode_equals_indexing_at_every_level(data, colours, height, width, threads):
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ids = data.draw(views(random.integers(0, len(colours), (height, width)).astype(np.uint8)))
    for level in LEVELS:
        _core.set_simd_level(level)
        np.testing.assert_array_equal(_core.encode_labels(ids, colours, threads), colours[ids])


@pytest.mark.parametrize("threads", [1, 4])
def test_long_rows_with_gaps_are_read_in_spans(threads):
    random = np.random.default_rng(1)
    colours = PAPER_PALETTE.array
    rgb = colours[random.integers(0, 3, (3, 9001))]
    rgb[2, 8999] = 9, 8, 7
    spaced = np.zeros((3, 9001, 5), np.uint8)[:, :, :3]
    spaced[:] = rgb
    for view in (rgb, spaced):
        got = _core.decode_labels(view, colours, 0, threads)
        np.testing.assert_array_equal(got[0], twin(rgb, colours, 0)[0])
        assert got[3].tolist() == [[2, 8999, 9, 8, 7]]
    ids = random.integers(0, 3, (9001, 3)).astype(np.uint8).T
    np.testing.assert_array_equal(_core.encode_labels(ids, colours, threads), colours[ids])


@pytest.mark.parametrize("level", LEVELS)
def test_a_colour_listed_twice_is_its_first_id(level):
    _core.set_simd_level(level)
    colours = np.array([[1, 2, 3], [4, 5, 6], [1, 2, 3]], np.uint8)
    rgb = np.broadcast_to(colours[2], (2, 100, 3))
    assert not _core.decode_labels(rgb, colours)[0].any()


def test_strict_names_pixels_and_colours():
    rgb = np.zeros((4, 5, 3), np.uint8)
    rgb[2, 3] = 10, 20, 30
    with pytest.raises(LabelError, match=r"1 of 20 .*x=3, y=2 is 10,20,30.*tolerance \(now 5\)"):
        decode(rgb, tolerance=5)
    loose = decode(rgb, tolerance=5, strict=False)
    assert loose.ids[2, 3] == UNMATCHED
    assert (loose.approximate, loose.unmatched) == (0, 1)
    assert decode(rgb, tolerance=38).approximate == 1
    rgb[:] = 90
    with pytest.raises(LabelError, match="and 17 more"):
        decode(rgb)


@pytest.mark.parametrize(
    ("rgb", "options", "words"),
    [
        (np.zeros((2, 2)), {}, "float64"),
        (np.zeros((2, 2), np.uint8), {}, "3 axes"),
        (np.zeros((2, 2, 2), np.uint8), {}, "3 or 4"),
        ([[[0, 0, 0]]], {}, "NumPy array"),
        (np.zeros((2, 2, 3), np.uint8), {"tolerance": -1}, "tolerance"),
        (np.zeros((2, 2, 3), np.uint8), {"tolerance": float("nan")}, "tolerance"),
        (np.zeros((2, 2, 3), np.uint8), {"tolerance": "wide"}, "argument"),
        (np.zeros((2, 2, 3), np.uint8), {"threads": -1}, "threads"),
        (np.zeros((2, 2, 3), np.uint8), {"threads": 65}, "threads"),
    ],
)
def test_decode_refuses(rgb, options, words):
    with pytest.raises(LabelError, match=words) as caught:
        decode(rgb, **options)
    assert "\n" not in str(caught.value)


def test_encode_names_the_first_bad_id():
    ids = np.zeros((6, 70), np.uint8)
    ids[4, 65] = 3
    ids[5, 0] = 255
    for threads in (1, 3):
        with pytest.raises(ValueError, match="id 3 at x=65, y=4"):
            _core.encode_labels(ids, PAPER_PALETTE.array, threads)
    with pytest.raises(LabelError, match="id 3 at x=65, y=4 has no colour; the palette ends at 2"):
        encode(ids)
    with pytest.raises(LabelError, match="int64"):
        encode(ids.astype(np.int64))


def test_core_checks_palettes_and_levels():
    rgb = np.zeros((1, 1, 3), np.uint8)
    for shape in ((0, 3), (33, 3), (2, 4)):
        with pytest.raises(ValueError, match="palette"):
            _core.decode_labels(rgb, np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="level"):
        _core.set_simd_level("sse9")
    assert _core.simd_level() == _core.best_simd_level()


def test_round_trip():
    ids = np.random.default_rng(0).integers(0, 3, (720, 1128)).astype(np.uint8)
    decoded = decode(encode(ids), threads=3)
    np.testing.assert_array_equal(decoded.ids, ids)
    assert (decoded.approximate, decoded.unmatched, len(decoded.offenders)) == (0, 0, 0)


def test_palette_parses():
    palette = Palette.parse("background=0,0,0; tumour = 255, 0,0;stroma=0,255,0")
    assert palette.names == ("background", "tumour", "stroma")
    assert palette.colours == PAPER_PALETTE.colours
    assert palette.array.dtype == np.uint8
    assert not palette.array.flags.writeable
    assert len(palette) == 3
    assert hash(palette) != hash(PAPER_PALETTE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a=1,2,3",
        "a=1,2,3;",
        "a=1,2;b=3,4,5",
        "a=1,2,3;b=1,2,3",
        "a=1,2,3;a=4,5,6",
        "a=1,2,256;b=0,0,0",
        "a=1,2,x;b=0,0,0",
        "a=-1,0,0;b=1,1,1",
        "=1,2,3;b=4,5,6",
        ";".join(f"c{i}={i},0,0" for i in range(33)),
    ],
)
def test_palette_refuses_text(text):
    with pytest.raises(LabelError):
        Palette.parse(text)


@pytest.mark.parametrize(
    ("names", "colours"),
    [
        (("a", "b"), ((0, 0, 0),)),
        (("a", 5), ((0, 0, 0), (1, 1, 1))),
        (("a", "b"), ((0, 0, 0), [1, 1, 1])),
        (("a", "b"), ((0, 0, 0), (1, 1, 1.0))),
        (("a", "b"), ((0, 0, 0), (0, 0, True))),
        (("a", "b"), ((0, 0, 0), (0, 0))),
    ],
)
def test_palette_refuses_values(names, colours):
    with pytest.raises(LabelError):
        Palette(names, colours)


def test_import_is_light():
    code = "import sys, histoseg_fast.labels; print([m for m in ('torch', 'openvino', 'scipy') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
