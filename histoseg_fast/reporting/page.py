"""The report: one HTML file that loads nothing from anywhere. File names and messages are hostile until escaped."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import statistics
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from histoseg_fast import __version__
from histoseg_fast.errors import HistosegError, one_line
from histoseg_fast.files import atomic_write
from histoseg_fast.reporting.charts import composition, histogram
from histoseg_fast.reporting.cohort import Cohort, Row, read_cohort
from histoseg_fast.reporting.pictures import Picture, make_pictures

REPORT = "report.html"
FOLDER = Path(__file__).parent
MAX_SHOWN = 1e18
"""Larger figures of run.json are nonsense, and not shown."""
STAGES = {"read": "reading", "engine": "engine", "stitch": "stitching", "write": "writing"}


@dataclass(frozen=True)
class Written:
    """What `write_report` did: images by fate, those with results but without the image or the mask, bytes."""

    path: Path
    done: int
    failed: int
    without_image: int
    without_mask: int
    size: int


def write_report(
    folder: Path, target: Path | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Written:
    """Write the report of the run in `folder` to `target` (default: report.html in it), whole or not at all.

    `progress` is called after each image with how many are over, and how many there are. Raises UsageError (`folder`
    holds no run), DataError (run.json is damaged), HistosegError (`target` cannot be written, or is a folder, link or
    device).
    """
    cohort = read_cohort(folder)
    target = target or folder / REPORT
    without_image = without_mask = 0
    head, tail = _page(cohort)
    rows = []
    try:
        with atomic_write(target) as stream:
            stream.write(head.encode())
            for i, (row, picture) in enumerate(make_pictures(cohort)):
                without_image += row.done and not picture.image
                without_mask += row.done and not picture.mask
                stream.write(_picture_block(i, picture))
                rows.append(_row_data(row, picture, _links(cohort.folder, row, target)))
                progress(i + 1, len(cohort.rows))
            data = {"classes": [one_line(name) for name in cohort.classes], "rows": rows}
            stream.write(f'<script type="application/json" id="data">{script_json(data)}</script>\n'.encode())
            stream.write(tail.encode())
            size = stream.tell()
    except OSError as error:
        fix = "choose another place with -o, or free space"
        raise HistosegError(f"cannot be written: {error.strerror or error}", where=target, fix=fix) from error
    return Written(target, len(cohort.done), len(cohort.failed), without_image, without_mask, size)


# -- escaping --------------------------------------------------------------------------------------------


def text(value: object) -> str:
    """`value` for HTML text and quoted attributes; control and bidi characters are shown as escapes."""
    return html.escape(one_line(str(value)), quote=True)


def script_json(value: object) -> str:
    """JSON that is safe inside a <script> element: no "<", so neither an end tag nor a comment can stand in it."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")


def link(path: str) -> str:
    """A relative URL of a relative file path, bytes that are no UTF-8 included."""
    return quote(os.fsencode(path.replace(os.sep, "/")))


# -- what the script gets --------------------------------------------------------------------------------


def _picture_block(index: int, picture: Picture) -> bytes:
    if not picture.image and not picture.mask:
        return b""
    pair = b"%s,%s" % (base64.b64encode(picture.image), base64.b64encode(picture.mask))
    return b'<script type="text/plain" id="p%d">%s</script>\n' % (index, pair)


def _row_data(row: Row, picture: Picture, links: Mapping[str, str]) -> dict[str, Any]:
    shown = {"name": one_line(row.name)}
    if row.error is not None:
        return {**shown, "error": one_line(row.error)}
    return {
        **shown,
        "width": row.width,
        "height": row.height,
        "pixels": row.pixels,
        "ratio": row.ratio,
        "confidence": row.confidence,
        "notes": [one_line(note) for note in (*row.warnings, *picture.notes)],
        "image": bool(picture.image),
        "mask": bool(picture.mask),
        "links": links,
    }


def _links(folder: Path, row: Row, target: Path) -> dict[str, str]:
    """Where the whole mask and overlay lie, seen from the report."""
    files = {"mask": row.mask, "overlay": row.overlay}
    try:
        start = os.path.relpath(folder, target.parent)
    except ValueError:  # Windows: on another drive
        return {}
    return {kind: link(os.path.normpath(os.path.join(start, file))) for kind, file in files.items() if file}


# -- the static parts ------------------------------------------------------------------------------------


def _page(cohort: Cohort) -> tuple[str, str]:
    """What comes before the pictures, and after them."""
    style = (FOLDER / "report.css").read_text("utf-8") + _class_colours(cohort)
    script = (FOLDER / "report.js").read_text("utf-8")
    name = cohort.folder.resolve().name
    parts = {
        "policy": "; ".join(
            (
                "default-src 'none'",
                "img-src data:",
                f"style-src '{_digest(style)}'",
                f"script-src '{_digest(script)}'",
                "base-uri 'none'",
                "form-action 'none'",
                "require-trusted-types-for 'script'",
                "trusted-types 'none'",
            )
        ),
        "style": style,
        "script": script,
        "title": text(name),
        "version": text(__version__),
        "subtitle": _subtitle(cohort),
        "notices": "".join(f'<p class="notice">{notice}</p>' for notice in _notices(cohort)),
        "figures": _figures(cohort),
        "failures": _failures(cohort),
        "histograms": _histograms(cohort),
        "run": _run(cohort),
    }
    page = string.Template((FOLDER / "report.html").read_text("utf-8")).substitute(parts, pictures="\0")
    head, _, tail = page.partition("\0")
    return head, tail


def _digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _class_colours(cohort: Cohort) -> str:
    rules = [f".class-{i}{{--class:rgb({r} {g} {b})}}" for i, (r, g, b) in enumerate(cohort.colours)]
    ground = "rgb({} {} {})".format(*cohort.colours[0]) if cohort.colours else "transparent"
    return f":root{{--ground:{ground}}}" + "".join(rules)


def _subtitle(cohort: Cohort) -> str:
    images = _count(len(cohort.rows), "image")
    plan = f", {text(cohort.record['plan'])} plan" if "plan" in cohort.record else ""
    return f"{images}{plan}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _notices(cohort: Cohort) -> list[str]:
    told = []
    if not cohort.record:
        told.append("The run is still going on, or was cut off: there is no run.json. What was complete is shown.")
    elif cohort.record.get("interrupted"):
        told.append("The run was interrupted. The same infer command goes on where it stopped.")
    if cohort.others:
        told.append(
            f"{_count(cohort.others, 'image')} of earlier runs with another plan or other options "
            f"{'is' if cohort.others == 1 else 'are'} left out."
        )
    if cohort.unreadable:
        told.append(f"{_count(cohort.unreadable, 'line')} of the manifest could not be understood.")
    if not cohort.rows:
        told.append("No image was finished.")
    return told


def _figures(cohort: Cohort) -> str:
    done, failed = cohort.done, cohort.failed
    pixels = [sum(row.pixels[i] for row in done) for i in range(len(cohort.classes))]
    figures = [("images segmented", f"{len(done):,}", "")]
    if failed:
        figures.append(("failed", f"{len(failed):,}", "bad"))
    ratios = [row.ratio for row in done if row.ratio is not None]
    if ratios:
        figures.append(("median tumour-stroma ratio", f"{statistics.median(ratios):.2f}", ""))
    if confidences := _confidences(cohort):
        median = f"{statistics.median(confidences):.1%}".replace("%", "\u00a0%")
        figures.append(("median confidence", median, ""))
    if done:
        figures.append(("megapixels", f"{sum(pixels) / 1e6:,.1f}", ""))
    cells = "".join(f'<div class="figure {kind}"><dt>{what}</dt><dd>{v}</dd></div>' for what, v, kind in figures)
    bar = composition([text(name) for name in cohort.classes], pixels) if done else ""
    return f'<dl class="figures">{cells}</dl>{bar}'


def _confidences(cohort: Cohort) -> list[float]:
    return [row.confidence for row in cohort.done if row.confidence is not None]


def _failures(cohort: Cohort) -> str:
    if not cohort.failed:
        return ""
    items = "".join(f"<li><bdi>{text(row.name)}</bdi><p>{text(row.error)}</p></li>" for row in cohort.failed)
    heading = f"{_count(len(cohort.failed), 'image')} failed"
    return (
        '<section id="failures" aria-labelledby="failures-title">'
        f'<h2 id="failures-title">{heading}</h2><ol>{items}</ol></section>'
    )


def _histograms(cohort: Cohort) -> str:
    done = cohort.done
    if not done:
        return ""
    charts = [
        histogram(f"{text(name)}, share of image", f"class-{i}", [r.pixels[i] / sum(r.pixels) for r in done], "%")
        for i, name in enumerate(cohort.classes)
    ]
    if ratios := [row.ratio for row in done if row.ratio is not None]:
        charts.append(histogram("tumour-stroma ratio", "ratio", ratios, ""))
    if confidences := _confidences(cohort):
        charts.append(histogram("mean confidence", "confidence", confidences, "%"))
    return (
        '<section id="cohort" aria-labelledby="cohort-title"><h2 id="cohort-title">Cohort</h2>'
        f'<p class="hint bars">Click a bar to see its images.</p>'
        f'<div class="histograms">{"".join(charts)}</div></section>'
    )


def _run(cohort: Cohort) -> str:
    record = cohort.record
    groups = [("Settings", _settings(record)), ("Versions", _pairs(record.get("versions")))]
    groups.append(("Time by stage, all images", _stages(cohort)))
    groups.append(("Last run", _last_run(record)))
    groups.append(("Arguments", _pairs(record.get("arguments"))))
    return "".join(
        f"<div><h3>{title}</h3><dl>"
        + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs)
        + "</dl></div>"
        for title, pairs in groups
        if pairs
    )


def _pairs(values: object) -> list[tuple[str, str]]:
    return [(str(name), _plain(value)) for name, value in values.items()] if isinstance(values, dict) else []


def _plain(value: object) -> str:
    """A JSON value for people."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items() if part) or "none"
    return str(value)


def _settings(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {
        "plan": "plan",
        "plan_sha256": "plan sha256",
        "device": "device",
        "engine": "engine",
        "precision": "precision",
        "tile": "tile, pixels",
        "batch": "batch",
        "postprocess": "post-processing",
    }
    return [(shown, _plain(record[name])) for name, shown in names.items() if name in record]


def _stages(cohort: Cohort) -> list[tuple[str, str]]:
    seconds: Counter[str] = Counter()
    for row in cohort.done:
        seconds.update(row.seconds)
    total = sum(seconds.values()) or 1.0
    return [
        (STAGES.get(stage, stage), f"{value:,.1f} s, {100 * value / total:.0f} %") for stage, value in seconds.items()
    ]


def _last_run(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    units = {"wall_seconds": ("wall time", "{:,.1f} s", 1), "peak_rss_bytes": ("peak memory", "{:,.0f} MiB", 2**20)}
    told = [
        (fate, _plain(record[f"images_{fate}"]))
        for fate in ("found", "done", "failed", "skipped")
        if f"images_{fate}" in record
    ]
    for name, (shown, form, unit) in units.items():
        value = record.get(name)
        if isinstance(value, (int, float)) and 0 <= value < MAX_SHOWN:
            told.append((shown, form.format(value / unit)))
    return told
