"""Charts as HTML and SVG text without a line of script. Labels come in escaped."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

BINS = 20
WIDTH, HEIGHT = 300, 96
"""Of a histogram's plot, in SVG units."""


def composition(names: Sequence[str], pixels: Sequence[int]) -> str:
    """A bar of the classes' shares of all pixels, and its legend."""
    total = sum(pixels)
    parts, legend, x = [], [], 0.0
    for i, (name, count) in enumerate(zip(names, pixels, strict=True)):
        share = 100 * count / total
        parts.append(f'<rect class="fill class-{i}" x="{x:.3f}" y="0" width="{share:.3f}" height="4"/>')
        legend.append(f'<li><span class="swatch class-{i}"></span>{name} <b>{share:.1f} %</b></li>')
        x += share
    return (
        '<figure class="composition"><svg viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
        f'{"".join(parts)}</svg><figcaption><ul class="legend">{"".join(legend)}</ul></figcaption></figure>'
    )


def counts(values: Sequence[float]) -> list[int]:
    """How many of `values`, 0 to 1, lie in each of `BINS` equal bins; the last one is closed."""
    bins = [0] * BINS
    for value in values:
        bins[min(BINS - 1, int(round(value * BINS, 7)))] += 1
    return bins


def histogram(title: str, column: str, values: Sequence[float], unit: str) -> str:
    """A histogram of `values`, 0 to 1, shown in per cent or as they are; `column` is what the script filters by."""
    bins, scale = counts(values), 100 if unit else 1
    most, step = max(bins), WIDTH / BINS
    bars = []
    for i, count in enumerate(bins):
        if count:
            height = max(2.0, HEIGHT * count / most)
            low, high = (f"{scale * edge / BINS:g}" for edge in (i, i + 1))
            below = high if i + 1 < BINS else ""
            bars.append(
                f'<rect class="bar" data-column="{column}" data-low="{low}" data-high="{below}" '
                f'x="{i * step + 0.5:.1f}" y="{HEIGHT - height:.1f}" width="{step - 1:.1f}" height="{height:.1f}">'
                f"<title>{low} to {high}{' %' if unit else ''}: {count}</title></rect>"
            )
    median = statistics.median(values)
    at = WIDTH * median
    said = f"median {100 * median:.1f} %" if unit else f"median {median:.2f}"
    ends = ("0", "50", "100 %") if unit else ("0", "0.5", "1")
    axis = "".join(f"<span>{end}</span>" for end in ends)
    swatch = f'<span class="swatch {column}"></span>' if column.startswith("class-") else ""
    return (
        f'<figure class="histogram"><figcaption><b>{swatch}{title}</b>'
        f"<span>{said}; highest bar {most}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="Histogram of {title}: '
        f'{said}">{"".join(bars)}<line class="median" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{HEIGHT}"/></svg>'
        f'<p class="axis">{axis}</p></figure>'
    )
