"""What the tests of the pipeline and of `infer` share: images on disk, runs in and out of process, a fake engine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from histoseg_fast.engines.base import Engine, Slot
from histoseg_fast.images import write_png
from histoseg_fast.labels import PAPER_PALETTE
from histoseg_fast.pipeline.outputs import Outputs
from histoseg_fast.pipeline.records import Manifest
from histoseg_fast.pipeline.sources import find_sources
from histoseg_fast.pipeline.stream import Stream
from histoseg_fast.pipeline.totals import Totals
from histoseg_fast.postprocess import PostProcessing
from histoseg_fast.tiling import Tiling

PATIENCE = 120
"""Seconds after which a run that should be over counts as hanging."""


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Random patches a few pixels wide, RGB uint8 (height, width, 3): every class, and edges everywhere."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), np.uint8)
    return np.ascontiguousarray(coarse.repeat(5, 0).repeat(5, 1)[:height, :width])


def make_pictures(folder: Path, count: int, height: int = 40, width: int = 50) -> list[Path]:
    """`count` different pictures, image_000.png and so on."""
    paths = [folder / f"image_{i:03}.png" for i in range(count)]
    for i, path in enumerate(paths):
        write_png(path, picture(i, height, width))
    return paths


def make_mixed_pictures(folder: Path, count: int) -> None:
    """`count` pictures of one size, each a tile of 24 pixels, and some of others, of one such tile and of many."""
    make_pictures(folder, count, 20, 24)
    for i, (height, width) in enumerate([(60, 70), (1, 1), (24, 100), (90, 10)]):
        write_png(folder / f"other_{i}.png", picture(i, height, width))


def results(out: Path) -> dict[str, bytes]:
    """All that must not depend on how a run went: every output and the summary, by relative name."""
    files = [p for p in out.rglob("*") if p.is_file() and p.name not in (".lock", "manifest.jsonl", "run.json")]
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in files}


def entries(out: Path) -> dict[str, dict[str, Any]]:
    """The manifest: the last line of each image."""
    lines = (out / "manifest.jsonl").read_text("ascii").splitlines()
    return {entry["input"]: entry for entry in map(json.loads, lines)}


def partials(out: Path) -> list[Path]:
    """Half-written files."""
    return list(out.rglob("*.partial"))


def command(*arguments: object) -> list[str]:
    """The command line of `histoseg-fast ARGUMENTS...`."""
    return [sys.executable, "-m", "histoseg_fast", *map(str, arguments)]


def run_command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `histoseg-fast ARGUMENTS...` to its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, errors="backslashreplace", timeout=PATIENCE, **options
    )


class FakeEngine(Engine):
    """The red, green and blue of a pixel are its logits. `on_submit` and `on_wait` get the number of the call."""

    device, precision, name = "cpu", "fp32", "fake 1"

    def __init__(
        self,
        on_submit: Callable[[int], None] = lambda call: None,
        on_wait: Callable[[int], None] = lambda call: None,
        broken: int = -1,
    ):
        self.on_submit, self.on_wait, self.broken = on_submit, on_wait, broken
        self.submits = self.waits = 0

    def slots(self, count: int) -> list[Slot]:
        return [Slot() for _ in range(count)]

    def submit(self, slot: Slot) -> None:
        self.submits += 1
        self.on_submit(self.submits)

    def wait(self, slot: Slot) -> None:
        self.waits += 1
        self.on_wait(self.waits)
        slot.logits = np.ascontiguousarray(slot.input.transpose(0, 3, 1, 2)).astype(np.float32)
        slot.logits[slot.logits == self.broken] = np.nan

    def close(self) -> None:
        pass


def make_stream(engine: Engine, folder: Path, out: Path, manifest: Manifest, **options: Any) -> Stream:
    """A stream over the images in `folder`, for engines without a halo unless told otherwise."""
    steps = PostProcessing.parse(options.pop("postprocess", "none"))
    wanted = {k: options.pop(k) for k in ("overlay", "geojson", "probabilities", "tissue_threshold") if k in options}
    outputs = Outputs(out, PAPER_PALETTE, postprocess=steps, **wanted)
    sources = options.pop("sources", None) or find_sources([str(folder)], out)
    tile, halo, stride = options.pop("tile", 64), options.pop("halo", 0), options.pop("stride", 1)
    tiling = Tiling(tile, options.pop("large", tile), halo, stride, options.pop("fitted", False))
    return Stream(engine, sources, outputs, manifest, **{"tiling": tiling, "key": "k", **options})


def finish(stream: Stream, poll: Callable[[], None] = lambda: None) -> Totals:
    """`stream.run`, which must end, and leave no thread behind, whether it succeeds or not."""
    before, outcome = set(threading.enumerate()), []

    def work() -> None:
        try:
            outcome.append(stream.run(poll))
        except BaseException as error:
            outcome.append(error)

    runner = threading.Thread(target=work, daemon=True)
    runner.start()
    runner.join(PATIENCE)
    assert not runner.is_alive(), "the run hangs"
    assert set(threading.enumerate()) <= before, "the run left threads behind"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def run_stream(engine: Engine, folder: Path, out: Path, **options: Any) -> Totals:
    """A whole run of `make_stream`; its manifest is closed also when it fails."""
    manifest = Manifest(out)
    try:
        return finish(make_stream(engine, folder, out, manifest, **options))
    finally:
        manifest.close()
