"""What `infer --geojson` makes of class maps, and what it costs: masks that `infer` wrote, or label images.

    python benchmarks/measure_geojson.py FOLDER... [--min-area 4] [--exact]

Prints, over all images: pixels that are of the same class when the polygons are rasterised again (a pixel is what its
centre lies in), pieces, points, bytes, and the writer's CPU time in milliseconds a megapixel (fastest of three rounds).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from histoseg_fast.images import GeojsonWriter, OutlineOptions, read_image
from histoseg_fast.labels import PAPER_PALETTE, decode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from rasterise import rasterise

ROUNDS = 3


def write(path: Path, ids: np.ndarray, options: OutlineOptions) -> float:
    """Seconds of CPU time."""
    started = time.process_time()
    height, width = ids.shape
    with GeojsonWriter(path, width, height, PAPER_PALETTE.names, PAPER_PALETTE.array, options) as writer:
        writer.write_rows(ids)
        writer.finish()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--min-area", type=int, default=OutlineOptions.min_area)
    parser.add_argument("--exact", action="store_true")
    arguments = parser.parse_args()
    options = OutlineOptions(arguments.min_area, arguments.exact)
    paths = sorted(path for folder in arguments.folders for path in folder.rglob("*.png"))
    same = pixels = pieces = points = size = 0
    seconds, worst = 0.0, 1.0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.geojson")
        for path in paths:
            ids = decode(read_image(path)).ids
            seconds += min(write(file, ids, options) for _ in range(ROUNDS))
            size += file.stat().st_size
            found = [
                (PAPER_PALETTE.names.index(f["properties"]["classification"]["name"]), f["geometry"]["coordinates"])
                for f in json.loads(file.read_bytes())["features"]
            ]
            agreed = int(np.count_nonzero(rasterise(found, *ids.shape) == ids))
            same, pixels, worst = same + agreed, pixels + ids.size, min(worst, agreed / ids.size)
            pieces, points = pieces + len(found), points + sum(len(ring) for _, rings in found for ring in rings)
    print(
        f"{len(paths)} images, {pixels / 1e6:.1f} megapixels: {same / pixels:.2%} of pixels agree (worst image "
        f"{worst:.2%}), {pieces} pieces, {points} points, {size / 1e6:.1f} MB, "
        f"{seconds / pixels * 1e9:.1f} ms a megapixel"
    )


if __name__ == "__main__":
    main()
