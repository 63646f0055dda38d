from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]

cuda_built: bool
max_classes: int
max_threads: int
unmatched: int
confidence_units: int
max_outline_side: int
max_region_pixels: int
resample_one: int
max_majority_radius: int
max_crf_pixels: int
max_crf_iterations: int
max_crf_weight: float
min_crf_sigma: float
max_crf_sigma: float

def decode_labels(
    rgb: U8, palette: U8, tolerance: float = 0.0, threads: int = 0
) -> tuple[U8, int, int, npt.NDArray[np.int64]]: ...
def encode_labels(ids: U8, palette: U8, threads: int = 0) -> U8: ...
def stitch(
    logits: npt.NDArray[np.float32],
    core: Sequence[int],
    classes: U8,
    counts: npt.NDArray[np.uint64],
    confidence: npt.NDArray[np.uint64],
    probabilities: U8 | None = None,
) -> int: ...
def tint(rgb: U8, ids: U8, above: U8 | None, palette: U8, alpha: int, out: U8) -> None: ...
def unfilter_rgb(rows: bytes, out: U8) -> bool: ...
def png_pixel_data(file: bytes, start: int) -> bytes | None: ...
def remove_islands(ids: U8, area: int) -> tuple[U8, int]: ...
def majority(ids: U8, radius: int, classes: int) -> U8: ...
def dense_crf(
    rgb: U8,
    logits: npt.NDArray[np.float32],
    iterations: int,
    smooth_weight: float,
    smooth_sigma: float,
    appearance_weight: float,
    appearance_sigma_xy: float,
    appearance_sigma_rgb: float,
    threads: int = 0,
) -> npt.NDArray[np.float32]: ...
def resample(
    source: U8,
    row_first: npt.NDArray[np.int32],
    row_weights: npt.NDArray[np.uint16],
    column_first: npt.NDArray[np.int32],
    column_weights: npt.NDArray[np.uint16],
    out: U8,
) -> None: ...

class Outlines:
    def __init__(self, width: int, min_area: int, simplify: bool, scale: tuple[float, float] = (1.0, 1.0)) -> None: ...
    def add_rows(self, ids: U8) -> list[tuple[int, bytes]]: ...
    def finish(self) -> list[tuple[int, bytes]]: ...

def simd_level() -> str: ...
def best_simd_level() -> str: ...
def set_simd_level(level: str) -> None: ...
def cuda_stitch(
    logits_ptr: int,
    dtype: Literal["fp32", "fp16"],
    layout: Literal["nchw", "nhwc"],
    n: int,
    classes: int,
    h: int,
    w: int,
    cores_ptr: int,
    ids_ptr: int,
    counts_ptr: int,
    confidence_ptr: int,
    broken_ptr: int,
    probabilities_ptr: int,
    stream: int,
    *,
    targets_ptr: int = 0,
) -> None: ...
def cuda_gather(
    image_ptr: int,
    image_h: int,
    image_w: int,
    image_stride: int,
    n: int,
    h: int,
    w: int,
    origins_ptr: int,
    tiles_ptr: int,
    stream: int,
) -> None: ...
def cuda_copy(to_ptr: int, from_ptr: int, bytes: int, stream: int) -> None: ...
def cuda_record(event: int, stream: int) -> None: ...
def cuda_wait(stream: int, event: int) -> None: ...
def cuda_decode_labels(
    rgb_ptr: int,
    h: int,
    w: int,
    channels: int,
    stride: int,
    palette: U8,
    tolerance: float,
    ids_ptr: int,
    counters_ptr: int,
    stream: int,
) -> None: ...
def cuda_first(
    rgb_ptr: int,
    n: int,
    h: int,
    w: int,
    kernel: int,
    scale: list[float],
    shift: list[float],
    weights_ptr: int,
    bias_ptr: int,
    to_ptr: int,
    stream: int,
) -> None: ...
def cuda_pool(from_ptr: int, n: int, h: int, w: int, channels: int, to_ptr: int, stream: int) -> None: ...
def cuda_join(low_ptr: int, skip_ptr: int, n: int, h: int, w: int, channels: int, to_ptr: int, stream: int) -> None: ...
def cuda_logits(
    from_ptr: int,
    n: int,
    h: int,
    w: int,
    weights_ptr: int,
    bias_ptr: int,
    outputs: int,
    shuffle: int,
    to_ptr: int,
    stream: int,
) -> None: ...

cuda_spread = cuda_pool
emulate_stitch = cuda_stitch
emulate_gather = cuda_gather
emulate_first = cuda_first
emulate_pool = cuda_pool
emulate_spread = cuda_spread
emulate_join = cuda_join
emulate_logits = cuda_logits
