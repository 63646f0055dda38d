"""What is fuzzed: for each kind of untrusted bytes what reads them, and seeds of our own making.

A target takes any bytes. It returns, or raises HistosegError; all else is a finding.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from mutations import Mutation, json_of_records, json_value, png_sums, tiff_tag
from PIL import Image
from slide_files import halves, noise, write_ome, write_philips, write_pyramid, write_svs
from tiny_plans import tiny_manifest, tiny_model

from histoseg_fast import _core
from histoseg_fast.errors import HistosegError, ImageError
from histoseg_fast.images import jpeg, open_image, openslide_source, png, reading, tiff
from histoseg_fast.images.sizes import image_pixels
from histoseg_fast.images.slide import NATIVE, Resolution
from histoseg_fast.labels import UNMATCHED, Palette, decode, encode
from histoseg_fast.onnx_graph import check_graph
from histoseg_fast.pipeline.merge import merge
from histoseg_fast.pipeline.parts import read_part
from histoseg_fast.pipeline.records import MANIFEST as LINES
from histoseg_fast.pipeline.records import RUN, read_entries
from histoseg_fast.plan import MANIFEST, MODEL, Plan, pack, unpack
from histoseg_fast.reporting.page import write_report

SMALL_PIXELS, SMALL_SEGMENT = 1 << 20, 1 << 22
"""The limits on images, lowered, so that all that passes them decodes in little time and memory."""


@dataclass(frozen=True)
class Target:
    """read : takes the bytes. seeds : sound inputs. mutate : a mutation that knows the format, if there is one."""

    read: Callable[[bytes], object]
    seeds: Callable[[], Iterator[bytes]]
    mutate: Mutation | None = None
    max_bytes: int = 1 << 14


# -- plans --------------------------------------------------------------------------------------------


def read_plan(data: bytes) -> None:
    use_plan(unpack(data, Path("x.plan")))


def use_plan(plan: Plan) -> None:
    """All that a sound plan promises."""
    assert plan.name.isprintable() and plan.stride > 0 and plan.halo >= 0 and plan.tile > 0
    for precision in ("fp32", "int8", *plan.manifest["precisions"]):
        plan.passes(precision)
    str(plan.postprocess), plan.ranges, plan.mpp, plan.palette.array


def plan_seeds() -> Iterator[bytes]:
    yield pack(tiny_manifest(), {MODEL: tiny_model()})
    yield pack(full_manifest(), {MODEL: tiny_model(1), "engines/x": b"123"})


def full_manifest() -> dict[str, object]:
    """A manifest with every field that there may be."""
    return tiny_manifest(
        mpp=0.5,
        gate={"agreement": 0.9, "mean_iou": 0.1},
        int8={"inputs": {"x0": 1.0}, "outputs": {"x1": 2.0}},
        precisions={"fp32": {"agreement": 1.0, "mean_iou": 0.5}, "int8": {"agreement": 0.99, "mean_iou": None}},
        postprocess={"min_island": 64, "majority_radius": 2, "crf": None},
    )


def read_manifest(data: bytes) -> None:
    """`data` as the manifest of a plan that is sound otherwise: whatever it says, the digests are right."""
    try:
        fields = json.loads(data)
        packed = pack(fields, {MODEL: TINY})
    except (ValueError, TypeError, RecursionError):  # `pack` is for writers; what it does not take goes in as it is
        packed = pack_text(data)
    use_plan(unpack(packed, Path("x.plan")))


def pack_text(manifest: bytes) -> bytes:
    import zipfile

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in ((MANIFEST, manifest), (MODEL, TINY)):
            archive.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


def manifest_seeds() -> Iterator[bytes]:
    for manifest in (tiny_manifest(), full_manifest()):
        yield json.dumps(manifest).encode()


def model_seeds() -> Iterator[bytes]:
    yield from (tiny_model(seed) for seed in range(2))


# -- labels -------------------------------------------------------------------------------------------

_LABELS = struct.Struct("<BBBBBBfB")
_LEVELS = ("baseline", "avx2", "avx512")
_TYPES = (np.uint8, np.uint8, np.uint8, np.int8, np.uint16, np.float32, np.bool_)


def read_labels(data: bytes) -> None:
    """A shape, strides, type, palette and tolerance, and pixels; every set of instructions must say the same."""
    head, rest = data[: _LABELS.size].ljust(_LABELS.size, b"\0"), data[_LABELS.size :]
    height, width, channels, classes, layout, kind, tolerance, threads = _LABELS.unpack(head)
    classes, channels, dtype = classes % 40, channels % 6, np.dtype(_TYPES[kind % len(_TYPES)])
    colours = [tuple(rest[3 * i : 3 * i + 3]) for i in range(classes)]
    count = height * width * channels * dtype.itemsize
    pixels = np.frombuffer(rest[3 * classes :].ljust(1, b"\0"), np.uint8)
    image = np.resize(pixels, count).view(dtype).reshape(height, width, channels)
    image = (image, image[::-1, ::-1], image[::2, ::3], image.swapaxes(0, 1), np.asfortranarray(image))[layout % 5]
    palette = Palette(tuple(map(str, range(classes))), tuple(colours))  # type: ignore[arg-type]
    results = []
    for level in _LEVELS[: _LEVELS.index(_core.best_simd_level()) + 1]:
        _core.set_simd_level(level)
        results.append(decode(image, palette, tolerance=tolerance, strict=False, threads=threads % 4))
    for other in results[1:]:
        assert (other.ids == results[0].ids).all() and other[1:3] == results[0][1:3]
        assert (other.offenders == results[0].offenders).all()
    ids = results[0].ids
    if not results[0].approximate and not results[0].unmatched:
        assert (encode(ids, palette) == image[..., :3]).all()
    assert (ids[ids != UNMATCHED] < classes).all()
    decode(image, palette, tolerance=tolerance)


def label_seeds() -> Iterator[bytes]:
    colours = [b"\0\0\0", b"\xff\0\0", b"\0\xff\0"]
    for layout in range(5):
        for channels, tolerance in ((3, 0.0), (4, 50.0)):
            pixels = b"".join(colour.ljust(channels, b"\0") for colour in colours)
            yield _LABELS.pack(9, 70, channels, 3, layout, 0, tolerance, layout) + b"".join(colours) + pixels


# -- images -------------------------------------------------------------------------------------------


def lower_limits(patch: pytest.MonkeyPatch) -> None:
    """OpenSlide, which runs in processes of its own, is left out as well."""

    def refuse(path: object, content: object = None) -> Any:
        raise ImageError("OpenSlide is left out", where=str(path))

    for module, name in ((png, "MAX_DECODED_PIXELS"), (jpeg, "MAX_DECODED_PIXELS"), (tiff, "MAX_PIXELS")):
        patch.setattr(module, name, SMALL_PIXELS)
    patch.setattr(tiff, "MAX_SEGMENT_BYTES", SMALL_SEGMENT)
    patch.setattr(tiff, "MAX_ROW_BYTES", 2 * SMALL_SEGMENT)
    patch.setattr(openslide_source, "open_levels", refuse)
    patch.setattr(reading, "has", lambda package: False)


def read_image(data: bytes, resolution: Resolution = NATIVE) -> None:
    """In two bands that overlap, and from the overview; the size alone comes first."""
    if not data:
        return
    path = Path(FOLDER.name, "image")
    path.write_bytes(data)
    pixels, _ = image_pixels(path)
    assert pixels >= 0
    with open_image(path, resolution) as image:
        assert image.width > 0 and image.height > 0
        if image.width * image.height > SMALL_PIXELS:
            return
        half = image.height // 2
        for y0, y1 in ((0, half + 1), (half, image.height)):
            rows = np.empty((y1 - y0, image.width, 3), np.uint8)
            image.read_rows(y0, y1, rows, [(image.width // 3, image.width)] if y0 else None)
        image.overview(16)


def read_slide(data: bytes) -> None:
    read_image(data, Resolution(mpp=0.8))


def saved(kind: str, pixels: np.ndarray, mode: str = "", **options: Any) -> bytes:
    stream, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()


def png_seeds() -> Iterator[bytes]:
    for mode in ("RGB", "L", "P", "RGBA", "LA", "1"):
        yield saved("PNG", noise(9, 13), mode)
    yield saved("PNG", noise(9, 13), "RGB", transparency=(1, 2, 3))
    yield saved("PNG", np.arange(99, dtype=np.uint16).reshape(9, 11) * 500)
    yield bytes(imagecodecs.png_encode(noise(9, 13).astype(np.uint16) * 257))


def jpeg_seeds() -> Iterator[bytes]:
    for mode in ("RGB", "L", "CMYK"):
        for progressive in (False, True):
            yield saved("JPEG", noise(17, 19), mode, progressive=progressive, quality=60)
    yield saved("JPEG", noise(17, 19), subsampling=2, restart_marker_blocks=1)


def tiff_seeds() -> Iterator[bytes]:
    codecs = [None, "deflate", "lzw", "packbits", "lzma", "zstd", "jpeg", "webp", "jpeg2000"]
    for codec in codecs:
        yield written(noise(20, 24), tile=(16, 16), compression=codec, photometric="rgb", metadata=None)
    yield written(noise(9, 13), rowsperstrip=4, photometric="rgb", metadata=None)
    planes = np.moveaxis(noise(9, 13), 2, 0)
    yield written(planes, rowsperstrip=4, photometric="rgb", planarconfig="separate", byteorder=">")
    yield written(noise(16, 16)[..., 0], tile=(16, 16), predictor=True, compression="lzw", bigtiff=True)
    yield written(noise(16, 16)[..., 0].astype(np.uint16), rowsperstrip=5)
    yield saved("TIFF", noise(9, 13), "P")
    if hasattr(imagecodecs, "ccittfax4_decode"):  # not for Python 3.10
        yield saved("TIFF", noise(9, 13), "1", compression="group4")
        yield saved("TIFF", noise(9, 13), "1", compression="group3")
    yield saved("TIFF", noise(9, 13), "RGBA", compression="tiff_lzw")


def written(pixels: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, **options)
    return stream.getvalue()


def slide_seeds() -> Iterator[bytes]:
    path, levels = Path(FOLDER.name, "seed.tif"), halves(96, 80, 3)
    for write, content in ((write_pyramid, levels), (write_ome, levels), (write_svs, levels)):
        yield write(path, content).read_bytes()
    yield write_philips(path, noise(64, 64)).read_bytes()


# -- results and checkpoints --------------------------------------------------------------------------


def read_records(data: bytes) -> None:
    """run.json, a zero byte, manifest.jsonl: as `report` and `merge` take them."""
    folder, merged = Path(FOLDER.name, "out"), Path(FOLDER.name, "merged")
    record, _, lines = data.partition(b"\0")
    for name, content in ((RUN, record), (LINES, lines), ("masks/a.png", MASK)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    shutil.rmtree(merged, ignore_errors=True)
    write_report(folder)
    merge([folder], merged)
    assert len(read_entries(merged / LINES)[0]) == len(read_part(folder).entries)


def record_seeds() -> Iterator[bytes]:
    run = {
        "key": "k", "plan": "tiny", "plan_sha256": "0" * 64, "device": "CPU: x", "precision": "fp32",
        "arguments": {"tile": 128}, "classes": ["background", "cancer", "stroma"], "images_found": 2, "images_done": 1,
        "images_failed": 1, "images_skipped": 0, "shard": {"number": 1, "of": 2}, "wall_seconds": 1.5,
        "stage_seconds": {"read": 1.0}, "peak_rss_bytes": 1000,
    }  # fmt: skip
    done = {
        "input": "a", "path": "in/a.png", "sha256": "0" * 64, "key": "k", "status": "done", "mask": "masks/a.png",
        "mask_sha256": hashlib.sha256(MASK).hexdigest(), "width": 3, "height": 2,
        "pixels": {"background": 3, "cancer": 2, "stroma": 1},
        "mean_confidence": 0.5, "mpp": 0.5, "glass_pixels": 1, "seconds": {"read": 0.5}, "warnings": ["w"],
    }  # fmt: skip
    failed = {"input": "b", "path": "in/b.png", "key": "k", "status": "failed", "error": "no"}
    for shard in (run["shard"], None):
        texts = [json.dumps({**run, "shard": shard}) + "\0", json.dumps(done) + "\n", json.dumps(failed) + "\n"]
        yield "".join(texts).encode()


def read_checkpoint_file(data: bytes) -> None:
    from histoseg_fast.training.checkpoint import read_checkpoint

    path = Path(FOLDER.name, "x.safetensors")
    path.write_bytes(data)
    read_checkpoint(path)


def checkpoint_seeds() -> Iterator[bytes]:
    import torch

    from histoseg_fast.training.checkpoint import REQUIRED, write_checkpoint

    path = Path(FOLDER.name, "seed.safetensors")
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.int64), "c": torch.ones(2, dtype=torch.float16)}
    write_checkpoint(path, tensors, dict.fromkeys(REQUIRED, "x"))
    yield path.read_bytes()


FOLDER = tempfile.TemporaryDirectory(prefix="histoseg-fuzz-")
TINY = tiny_model()
MASK = b"mask"
TARGETS: Mapping[str, Target] = {
    "plan": Target(read_plan, plan_seeds),
    "manifest": Target(read_manifest, manifest_seeds, json_value, max_bytes=1 << 12),
    "model": Target(check_graph, model_seeds),
    "labels": Target(read_labels, label_seeds, max_bytes=1 << 10),
    "png": Target(read_image, png_seeds, png_sums, max_bytes=1 << 12),
    "jpeg": Target(read_image, jpeg_seeds, max_bytes=1 << 12),
    "tiff": Target(read_image, tiff_seeds, tiff_tag, max_bytes=1 << 13),
    "slide": Target(read_slide, slide_seeds, tiff_tag, max_bytes=1 << 16),
    "records": Target(read_records, record_seeds, json_of_records, max_bytes=1 << 12),
    "checkpoint": Target(read_checkpoint_file, checkpoint_seeds, max_bytes=1 << 12),
}


def check(target: Target, data: bytes) -> None:
    """Any error must be ours, one line, and not for want of memory."""
    try:
        target.read(data)
    except HistosegError as error:
        text = str(error)
        assert text.isprintable() and len(text) < 1000 + 10 * len(data), text
        assert "not enough memory" not in text, text
