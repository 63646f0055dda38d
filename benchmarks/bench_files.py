"""Reading a PNG and writing a mask of 1128x720, against imagecodecs and OpenCV: pytest benchmarks/bench_files.py

The limits are the bare file operations: a copy of the decoded pixels behind a read of the file, and a write of as many
bytes as the mask has pixels. Files are warm in the page cache. Prints the ratios at the end (run with -s) and asserts
nothing about time.
"""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
from micro import measure_into, one_thread_of_opencv

from histoseg_fast.files import atomic_write
from histoseg_fast.images import MaskWriter, read_image, write_png
from histoseg_fast.labels import PAPER_PALETTE
from histoseg_fast.synthetic import make_field

seconds: dict[str, float] = {}
sizes: dict[str, int] = {}
measure = measure_into(seconds)


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """A made-up field as a file and as pixels, its class ids, and a folder."""
    rgb, ids = make_field(0)
    folder = tmp_path_factory.mktemp("files")
    write_png(folder / "field.png", rgb)
    return folder, rgb, ids


@pytest.fixture(scope="module", autouse=True)
def summary():
    yield
    for topic in ("decode", "write"):
        if f"{topic}, ours" not in seconds:
            continue
        print(f"\nPNG {topic}: {seconds[f'{topic}, ours'] * 1e3:.2f} ms", end="")
        for name, taken in seconds.items():
            if name.startswith(topic) and not name.endswith("ours"):
                print(f", {taken / seconds[f'{topic}, ours']:.2f} times {name.partition(', ')[2]}", end="")
    if sizes:
        print("\nbytes of the mask: " + ", ".join(f"{name} {size}" for name, size in sizes.items()))


def write_mask(path, ids):
    with MaskWriter(path, ids.shape[1], ids.shape[0], PAPER_PALETTE.array) as writer:
        writer.write_rows(ids)
        writer.finish()


def test_decode(benchmark, field):
    folder, rgb, _ = field
    np.testing.assert_array_equal(measure(benchmark, "decode, ours", read_image, folder / "field.png"), rgb)


@pytest.mark.parametrize("codec", ["png", "spng"])
def test_decode_by_imagecodecs(benchmark, field, codec):
    folder, rgb, _ = field
    decode = getattr(imagecodecs, f"{codec}_decode")
    found = measure(benchmark, f"decode, {codec}", lambda: decode((folder / "field.png").read_bytes()))
    np.testing.assert_array_equal(found, rgb)


def test_decode_by_opencv(benchmark, field):
    cv2 = one_thread_of_opencv()
    folder, rgb, _ = field
    found = measure(benchmark, "decode, OpenCV", cv2.imread, str(folder / "field.png"), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(found[..., ::-1], rgb)


def test_decode_limit(benchmark, field):
    folder, rgb, _ = field
    pixels = np.empty_like(rgb)

    def copy() -> None:
        (folder / "field.png").read_bytes()
        pixels[...] = rgb

    measure(benchmark, "decode, read and copy", copy)


def test_write(benchmark, field):
    folder, _, ids = field
    measure(benchmark, "write, ours", write_mask, folder / "mask.png", ids)
    np.testing.assert_array_equal(imagecodecs.png_decode((folder / "mask.png").read_bytes()), PAPER_PALETTE.array[ids])
    sizes["ours"] = (folder / "mask.png").stat().st_size


def test_write_by_imagecodecs(benchmark, field):
    folder, _, ids = field
    path = folder / "codec.png"
    measure(benchmark, "write, png", lambda: path.write_bytes(imagecodecs.png_encode(ids, level=1)))
    sizes["png"] = path.stat().st_size


def test_write_by_opencv(benchmark, field):
    cv2 = one_thread_of_opencv()
    folder, _, ids = field
    path = folder / "opencv.png"
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    assert measure(benchmark, "write, OpenCV", cv2.imwrite, str(path), ids, options)
    sizes["OpenCV"] = path.stat().st_size


def test_write_limit(benchmark, field):
    folder, _, ids = field

    def write() -> None:
        with atomic_write(folder / "raw") as stream:
            stream.write(ids.data)

    measure(benchmark, "write, raw bytes", write)
    sizes["raw"] = ids.size
