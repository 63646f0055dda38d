"""Throughput by tile size and batch: the same images and engine, once for each point of a grid."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from histoseg_fast.benchmarking.runs import EngineAlone, Shape, Work, batches, run_stream
from histoseg_fast.pipeline.run import open_stream_engine
from histoseg_fast.plan import MAX_TILE
from histoseg_fast.tiling import TileGrid, least_tile

TILES = (256, 512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8)
POINT_SECONDS = 3.0
"""A run of a point takes about this long: fewer images than the rows have where those take longer."""
POINT_IMAGES = 4
"""But so many at least."""
MAX_BATCH_PIXELS = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Points whose batches have more pixels are left out: memory, and nothing is gained by then."""


def sweep(
    work: Work, shapes: Sequence[Shape], row: dict[str, Any], repeats: int, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A point for each tile size and batch, end to end and engine alone, as JSON values.

    `shapes` are the images' sizes and `row` what was measured of them. A tile or batch that the options fix is the only
    one. Tiles that cut no image are one point, the least of them.
    """
    images = min(len(work.sources), max(POINT_IMAGES, math.ceil(POINT_SECONDS * row["images_per_second"])))
    work, shapes = replace(work, sources=work.sources[:images]), shapes[:images]
    tiles = [work.options.tile] if work.options.tile else tile_sizes(work, shapes)
    sizes = [work.options.batch] if work.options.batch else list(BATCHES)
    widest = work.with_tile(max(tiles), max(sizes))
    most = MAX_BATCH_PIXELS[row["device"].partition(":")[0]]
    points = []
    with open_stream_engine(widest.plan, images, widest.options, report) as engine:
        for tile in tiles:
            for batch in sizes:
                point = work.with_tile(tile, batch)
                wanted = batches(point, row["device"], shapes, batch)
                if batch > 1 and max(n * h * w for n, h, w in wanted) > most:
                    continue
                report(f"tile {tile}, batch {batch}: {images} image(s), {repeats} time(s)")
                run_stream(replace(point, sources=point.sources[:POINT_IMAGES]), engine)  # warms up
                walls, alone_seconds = [], []
                with EngineAlone(engine, wanted, point.outputs.wants, point.poll) as alone:
                    for _ in range(repeats):
                        alone_seconds.append(alone.run())
                        run, _ = run_stream(point, engine)
                        walls.append(run.watch.wall)
                points.append(_point(tile, batch, wanted, images, run.pixels, walls, alone_seconds))
    return points


def _point(
    tile: int,
    batch: int,
    wanted: Sequence[tuple[int, int, int]],
    images: int,
    pixels: int,
    walls: Sequence[float],
    alone_seconds: Sequence[float],
) -> dict[str, Any]:
    wall, alone = statistics.median(walls), statistics.median(alone_seconds)
    return {
        "tile": tile,
        "batch": batch,
        "images": images,
        "images_per_second": images / wall,
        "megapixels_per_second": pixels / 1e6 / wall,
        "engine_megapixels_per_second": pixels / 1e6 / alone,
        "engine_seconds_per_megapixel": alone / (pixels / 1e6),
        "computed_over_kept": sum(n * h * w for n, h, w in wanted) / pixels,
        "spread": (max(walls) - min(walls)) / wall,
    }


def tile_sizes(work: Work, shapes: Sequence[Shape]) -> list[int]:
    """Those of `TILES` and the plan's that this network can run, down to the first that cuts none of the images."""
    plan, kept = work.plan, []
    for tile in sorted({*TILES, plan.tile}):
        if least_tile(plan.halo, plan.stride) <= tile <= MAX_TILE:
            kept.append(tile)
            grids = [TileGrid.cover(*shape, tile, plan.halo, plan.stride) for shape in shapes]
            if all(grid.tiles == 1 for grid in grids):
                break
    return kept
