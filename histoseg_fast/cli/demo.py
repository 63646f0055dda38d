"""`histoseg-fast demo`: see it work, on made-up fields or on one's own folder."""

from __future__ import annotations

from pathlib import Path

import typer

NAME = "demo"


def command(
    folder: str = typer.Argument("", metavar="[DIR]", help="Segment this folder (default: fields made for the demo)."),
    out: Path = typer.Option(Path("demo"), help="Folder for everything the demo writes."),
    images: int = typer.Option(4, min=1, max=1000, help="How many fields to make."),
) -> int:
    """Make H&E-like fields with known labels, segment them with the shipped plan, and say where to look."""
    from histoseg_fast.cli import infer

    fields = out / "images"
    if not folder:
        make_fields(out, images)
    code = infer.command(
        [folder or str(fields)],
        engine="final",
        out=out / "results",
        device="auto",
        precision="auto",
        tile=0,
        batch=1,
        threads=0,
        overlay=True,
        probabilities=False,
    )
    if not folder:
        print(f"against the known labels of the made-up fields: {score_fields(out):.1%} of pixels right")
    results = out / "results"
    print(f"look at {results / 'overlays'} and {results / 'masks'} (red cancer, green stroma, black background)")
    return code


def make_fields(out: Path, count: int) -> None:
    """Write `count` fields to out/images and their RGB labels to out/labels."""
    from histoseg_fast.images import write_png
    from histoseg_fast.labels import encode
    from histoseg_fast.synthetic import make_field

    print(f"making {count} H&E-like fields of 1128x720 in {out / 'images'}")
    for seed in range(count):
        rgb, ids = make_field(seed)
        write_png(out / "images" / f"field_{seed}.png", rgb)
        write_png(out / "labels" / f"field_{seed}.png", encode(ids))


def score_fields(out: Path) -> float:
    """Pixel accuracy of the masks of the made-up fields against their labels."""
    import numpy as np

    from histoseg_fast.images import read_image

    right = total = 0
    for label in sorted((out / "labels").glob("field_*.png")):
        mask = out / "results" / "masks" / label.name
        if mask.exists():
            same = (read_image(mask) == read_image(label)).all(axis=-1)
            right, total = right + int(np.count_nonzero(same)), total + same.size
    return right / total if total else float("nan")
