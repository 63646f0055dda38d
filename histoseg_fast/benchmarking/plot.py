"""The grid of a benchmark as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from histoseg_fast.files import atomic_write


def draw_sweep(path: Path, found: Mapping[str, Any]) -> None:
    """Write a PNG of "sweep" in what `bench` returned: megapixels a second by tile size, a line for each batch.

    Needs matplotlib. Raises OSError.
    """
    from matplotlib.figure import Figure

    points = found["sweep"]
    figure = Figure(figsize=(9, 4), layout="constrained")
    shared: Any = None
    for place, (key, title) in enumerate(
        [("megapixels_per_second", "files to files"), ("engine_megapixels_per_second", "engine alone")]
    ):
        shared = axes = figure.add_subplot(1, 2, place + 1, sharey=shared)
        for batch in sorted({point["batch"] for point in points}):
            line = [point for point in points if point["batch"] == batch]
            axes.plot([p["tile"] for p in line], [p[key] for p in line], "o-", label=f"batch {batch}")
        axes.set(title=title, xlabel="tile, pixels a side with halo", xticks=sorted({p["tile"] for p in points}))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylim(bottom=0)  # both axes', now that all is drawn
    figure.axes[0].set_ylabel("megapixels/s")
    figure.axes[0].legend()
    figure.suptitle(
        f"{found['plan']}, {found['precision']} on {found['device']}, {found['cpu']}, {found['cores']} cores"
    )
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=150)
