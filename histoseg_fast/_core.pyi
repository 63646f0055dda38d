from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]

cuda_built: bool
max_classes: int
max_threads: int
unmatched: int
confidence_units: int

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
def simd_level() -> str: ...
def best_simd_level() -> str: ...
def set_simd_level(level: str) -> None: ...
