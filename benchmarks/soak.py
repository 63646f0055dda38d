"""Ten thousand small images in one run: do memory, open files and throughput stay where they are?

    python benchmarks/soak.py [--images 10000] [--engine fast] [--precision auto] [--seconds 0.5] [--json FILE]

Made-up fields of many sizes under many more names (hard links) go through one `infer` with overlays, in a temporary
folder and in a process of their own. Its memory (RSS), open files and finished images are read from /proc and from the
manifest while it runs. Printed: the first and the last quarter of the run, and the slope of a straight line through all
of it but the first tenth, in which caches and arenas fill. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from histoseg_fast.images import write_png
from histoseg_fast.pipeline.records import MANIFEST
from histoseg_fast.synthetic import make_field

FIELDS = 200
"""Different pictures, each of a size of its own; all images are links to them."""
SIDES = 40, 300
"""Of the pictures, in pixels: least and most."""
LINKS = 5000
"""Names for one file: file systems have a limit, ext4's is 65,000."""
WARM_UP = 0.1
"""Share of the run that the slope leaves out."""


@dataclass(frozen=True)
class Sample:
    """What was seen at a moment: seconds since the start, images over, RSS in bytes, open files, threads."""

    seconds: float
    images: int
    rss: int
    files: int
    threads: int


def make_links(folder: Path, images: int) -> None:
    """`images` names for a few made-up fields."""
    folder.mkdir()
    files = -(-images // LINKS) + FIELDS
    rng = np.random.default_rng(0)
    for i in range(files):
        width, height = rng.integers(*SIDES, 2).tolist()
        write_png(folder.parent / f"field{i}.png", make_field(i % FIELDS, width, height)[0])
    for i in range(images):
        os.link(folder.parent / f"field{i % files}.png", folder / f"{i:06}.png")


def watch(process: subprocess.Popen[str], manifest: Path, seconds: float) -> list[Sample]:
    """Samples of a running `infer` every so many `seconds`, from its first image to its end."""
    started, samples, lines, position = time.perf_counter(), [], 0, 0
    proc = Path("/proc") / str(process.pid)
    while process.poll() is None:
        time.sleep(seconds)
        try:
            with open(manifest, "rb") as stream:
                stream.seek(position)
                new = stream.read()
            lines, position = lines + new.count(b"\n"), position + len(new)
            fields = (proc / "statm").read_text().split()
            files, threads = (len(os.listdir(proc / name)) for name in ("fd", "task"))
        except (OSError, ValueError):  # not there yet, or over
            continue
        rss = int(fields[1]) * os.sysconf("SC_PAGESIZE")
        if lines and rss:  # none: it has ended
            samples.append(Sample(time.perf_counter() - started, lines, rss, files, threads))
    return samples


def summary(samples: Sequence[Sample], images: int) -> dict[str, Any]:
    """The figures of a run of `images`, from its samples."""
    found: dict[str, Any] = {"images": images, "samples": len(samples), "seconds": samples[-1].seconds}
    for name, low, high in (("first_quarter", 0.0, 0.25), ("last_quarter", 0.75, 1.0)):
        part = [s for s in samples if low * images <= s.images <= high * images]
        if len(part) < 2:
            raise SystemExit(f"only {len(samples)} samples: more images, or fewer --seconds")
        found[name] = {
            "rss_bytes": statistics.median(s.rss for s in part),
            "files": max(s.files for s in part),
            "threads": max(s.threads for s in part),
            "images_per_second": (part[-1].images - part[0].images) / (part[-1].seconds - part[0].seconds),
        }
    kept = [s for s in samples if s.images >= WARM_UP * images]
    done, seconds = (np.array([getattr(s, name) for s in kept], float) for name in ("images", "seconds"))
    speed, middle = np.diff(done) / np.diff(seconds), (seconds[1:] + seconds[:-1]) / 2
    found["rss_bytes_per_image"] = float(np.polyfit(done, [s.rss for s in kept], 1)[0])
    found["files_per_1000_images"] = 1000 * float(np.polyfit(done, [s.files for s in kept], 1)[0])
    found["speed_change_over_run"] = float(np.polyfit(middle, speed, 1)[0] * seconds[-1] / speed.mean())
    found["peak_rss_bytes"] = max(s.rss for s in samples)
    return found


def soak(images: int, engine: str, precision: str, seconds: float) -> dict[str, Any]:
    """Run it and return the figures; SystemExit where the run fails."""
    with tempfile.TemporaryDirectory(prefix="histoseg-soak-") as name:
        folder = Path(name)
        make_links(folder / "in", images)
        command = [sys.executable, "-m", "histoseg_fast", "infer", str(folder / "in"), "--engine", engine]
        command += ["--precision", precision, "--overlay", "--out", str(folder / "out")]
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
            try:
                samples = watch(process, folder / "out" / MANIFEST, seconds)
            finally:
                process.kill()
                process.wait()
        masks = len(os.listdir(folder / "out" / "masks")) if process.returncode == 0 else 0
        if masks != images:
            raise SystemExit(
                f"infer ended with {process.returncode}, {masks} masks: {(folder / 'log').read_text()[-500:]}"
            )
    return summary(samples, images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--engine", default="fast")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = soak(options.images, options.engine, options.precision, options.seconds)
    print(f"{found['images']} images of {FIELDS} sizes in {found['seconds']:.0f} s, {found['samples']} samples")
    for name in ("first_quarter", "last_quarter"):
        part = found[name]
        print(
            f"{name.replace('_', ' '):>14}: RSS {part['rss_bytes'] / 2**20:.1f} MiB, {part['files']} files, "
            f"{part['threads']} threads, {part['images_per_second']:.1f} images/s"
        )
    print(
        f"         slope: {found['rss_bytes_per_image']:+.0f} bytes an image, "
        f"{found['files_per_1000_images']:+.3f} files a thousand images, "
        f"speed {found['speed_change_over_run']:+.1%} over the run; "
        f"peak RSS {found['peak_rss_bytes'] / 2**20:.1f} MiB"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
