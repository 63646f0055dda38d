"""`histoseg-fast demo`: see it work, on made-up fields or on one's own folder."""

from __future__ import annotations

from pathlib import Path

import typer

from histoseg_fast.errors import UsageError

NAME = "demo"
FIELDS = 4


def command(
    folder: str = typer.Argument("", metavar="[DIR]", help="Segment this folder (default: fields made for the demo)."),
    out: Path = typer.Option(Path("demo"), help="Folder for everything the demo writes."),
    images: int = typer.Option(None, min=1, max=1000, help="How many fields to make (4)."),
) -> int:
    """Segment H&E-like fields with known labels with each shipped plan; compare speed and score, say where to look."""
    from histoseg_fast.cli import infer
    from histoseg_fast.pipeline.run import InferOptions
    from histoseg_fast.plans import SHIPPED

    fields = out / "images"
    if folder and images is not None:
        raise UsageError("--images is of the fields that are made", fix="leave it out, or DIR")
    if not folder:
        make_fields(out, FIELDS if images is None else images)
    told, code = [], 0
    for name in SHIPPED:
        results = out / name
        ended = infer.run([folder or str(fields)], name, str(results), InferOptions(overlay=True))
        if ended >= 128:
            return ended
        code = code or ended
        score = "" if folder else f"; {score_fields(out, results):.1%} of the made-up fields' pixels right"
        told.append(f"{name}: {speed(results)}{score}; look at {results / 'overlays'} and {results / 'masks'}")
    print("\n".join([*told, "red cancer, green stroma, black background; docs/networks.md says when to use which"]))
    return code


def speed(results: Path) -> str:
    """Images a second of the run in `results`, engine start included; "already done" where there was nothing to do."""
    import json

    record = json.loads((results / "run.json").read_text())
    if not record["images_done"]:
        return "already done" if record["images_skipped"] else "nothing done"
    return f"{record['images_done'] / record['wall_seconds']:.2f} images/s"


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


def score_fields(out: Path, results: Path) -> float:
    """Pixel accuracy of the masks in `results` against the labels of the made-up fields in `out`."""
    import numpy as np

    from histoseg_fast.images import read_image

    right = total = 0
    for label in sorted((out / "labels").glob("field_*.png")):
        mask = results / "masks" / label.name
        if mask.exists():
            same = (read_image(mask) == read_image(label)).all(axis=-1)
            right, total = right + int(np.count_nonzero(same)), total + same.size
    return right / total if total else float("nan")
