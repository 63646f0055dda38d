"""A whole slide through `infer`, with the tissue mask and without: seconds, peak memory, megapixels of tissue a second.

    python benchmarks/bench_slide.py [--side 20000] [--tissue 0.3] [--engine fast] [--precision auto] [--json FILE]
        [--codec jpeg] [--no-ratio] [--slide FILE]

Makes a synthetic slide (tiled, with levels of 1/4, 1/16 and 1/64, as scanners write them, 0.5 micrometres a pixel;
glass with round patches of tissue) in bounded memory, then runs the command line on it, each run in a process of its
own, so that peak memory is that run's. `--no-ratio` leaves the run without the mask out: on a slide of 100,000 pixels
a side it takes long.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile

from histoseg_fast.images.overview import shrink
from histoseg_fast.machine import cpu_name
from histoseg_fast.synthetic import GLASS_RGB, make_field

TILE = 512
VARIANTS = 8
"""Different tiles of tissue and of glass; a slide is made of these."""
STEPS = 4, 16, 64
PATCHES = 3
"""Round patches of tissue, all of one size: a slide bears a few sections."""
MPP = 0.5


def tissue_map(side: int, share: float, seed: int = 0) -> np.ndarray:
    """bool, one a tile: patches of tissue side by side that cover `share` of the slide, or a little less."""
    count = -(-side // TILE)
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[:count, :count]
    tissue = np.zeros((count, count), bool)
    radius, placed = count * np.sqrt(share / (np.pi * PATCHES)), 0
    for _ in range(1000):
        top, left = rng.uniform(radius, count - radius, 2)
        patch = (y + 0.5 - top) ** 2 + (x + 0.5 - left) ** 2 <= radius**2
        if placed < PATCHES and not (tissue & patch).any():
            tissue, placed = tissue | patch, placed + 1
    return tissue


def make_slide(path: Path, side: int, share: float, codec: str) -> float:
    """Write the slide; the share of its tiles that hold tissue."""
    rng = np.random.default_rng(1)
    field, _ = make_field(0, TILE * 4, TILE * 2)
    tissue = [field[i // 4 * TILE :, i % 4 * TILE :][:TILE, :TILE] for i in range(VARIANTS)]
    glass = [np.clip(GLASS_RGB + rng.normal(0, 2, (TILE, TILE, 3)), 0, 255).astype(np.uint8) for _ in range(VARIANTS)]
    holds, pick = tissue_map(side, share), rng.integers(0, VARIANTS, (-(-side // TILE),) * 2)
    resolution = 10_000 / MPP
    options = {"tile": (TILE, TILE), "dtype": np.uint8, "compression": codec, "resolutionunit": "CENTIMETER"}
    options |= {"photometric": "rgb" if codec == "deflate" else "ycbcr", "metadata": None}
    if codec == "jpeg":
        options["subsampling"] = (1, 1)

    def encode(pixels: np.ndarray) -> bytes:
        pixels = np.ascontiguousarray(pixels)
        return imagecodecs.jpeg8_encode(pixels, 85, subsampling="444") if codec == "jpeg" else _deflate(pixels)

    def level_0() -> Iterator[bytes]:
        packed = [[encode(tile) for tile in tiles] for tiles in (glass, tissue)]
        for row in range(len(holds)):
            for column in range(len(holds)):
                yield packed[int(holds[row, column])][pick[row, column]]

    def level(step: int) -> Iterator[bytes]:
        small = np.stack([np.stack([shrink(tile, step) for tile in tiles]) for tiles in (glass, tissue)])
        per_tile = TILE // step
        tiles = -(-side // step // TILE) if side // step else 1
        for row in range(tiles):
            for column in range(tiles):
                out = np.full((TILE, TILE, 3), 255, np.uint8)
                for i in range(step):
                    for j in range(step):
                        at = row * step + i, column * step + j
                        if max(at) < len(holds):
                            place = out[i * per_tile :, j * per_tile :][:per_tile, :per_tile]
                            place[...] = small[int(holds[at]), pick[at]]
                yield encode(out)

    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(level_0(), shape=(side, side, 3), resolution=(resolution, resolution), **options)
        for step in STEPS:
            if side // step >= 64:
                scaled = (resolution / step, resolution / step)
                shape = (side // step, side // step, 3)
                file.write(level(step), shape=shape, subfiletype=1, resolution=scaled, **options)
    return float(holds.mean())


def _deflate(pixels: np.ndarray) -> bytes:
    return imagecodecs.deflate_encode(pixels.tobytes(), level=3)


def run(slide: Path, out: Path, arguments: list[str]) -> dict:
    """One `infer` in a process of its own: run.json, and the seconds from start to end as `seconds`."""
    command = [sys.executable, "-m", "histoseg_fast", "infer", str(slide), "--out", str(out), *arguments]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return json.loads((out / "run.json").read_text()) | {"seconds": time.perf_counter() - started}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--tissue", type=float, default=0.3, help="share of the slide")
    parser.add_argument("--codec", choices=["jpeg", "deflate"], default="jpeg")
    parser.add_argument("--engine", default="fast")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--slide", type=Path, help="keep the slide here, and use it if it is there")
    parser.add_argument("--no-ratio", action="store_true", help="leave the run without the mask out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        slide = options.slide or Path(name, "slide.tif")
        if not slide.exists():
            started = time.perf_counter()
            share = make_slide(slide, options.side, options.tissue, options.codec)
            seconds = time.perf_counter() - started
            print(f"{options.side} a side, {share:.0%} of it tissue: {slide.stat().st_size:,} bytes, {seconds:.0f} s")
        common = ["--engine", options.engine, "--precision", options.precision, "--level", "0"]
        result = {"side": options.side, "cpu": cpu_name(), "runs": {}}
        for kind, more in (("mask", []), ("no mask", ["--no-tissue-mask"])):
            if kind == "no mask" and options.no_ratio:
                continue
            record = run(slide, Path(name, kind), [*common, *more])
            segmented = record["megapixels"] - record["glass_megapixels"]
            result["runs"][kind] = {
                "seconds": record["seconds"],
                "peak_rss_bytes": record["peak_rss_bytes"],
                "segmented_megapixels": segmented,
                "segmented_megapixels_per_second": segmented / record["seconds"],
                "stage_seconds": record["stage_seconds"],
            }
            print(
                f"{kind:8} {record['seconds']:8.1f} s  peak RSS {record['peak_rss_bytes'] / 2**20:6.0f} MiB  "
                f"{segmented:.0f} of {record['megapixels']:.0f} megapixels segmented, "
                f"{segmented / record['seconds']:.2f} a second"
            )
        runs = result["runs"]
        if len(runs) == 2:
            result["ratio"] = runs["no mask"]["seconds"] / runs["mask"]["seconds"]
            print(f"{result['ratio']:.2f} times faster with the mask")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
