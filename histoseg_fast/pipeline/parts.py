"""The output folders that `merge` is given: each a shard of one run, or why not. Nothing in them is trusted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoseg_fast.errors import DataError, UsageError
from histoseg_fast.images.source import MAX_SIDE
from histoseg_fast.labels import MAX_CLASSES
from histoseg_fast.pipeline.records import MANIFEST, RUN, read_entries, read_run, summary_row
from histoseg_fast.pipeline.shards import MAX_SHARDS, Shard

COUNTS = ("images_found", "images_done", "images_failed", "images_skipped")
HARMLESS = {"inputs", "out", "tile", "batch", "threads", "shard", "device", "runner"}
"""Arguments that do not decide what the outputs are (a device's kind is in `device` of run.json)."""
SHOWN_SHARDS = 8
Entry = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One shard's folder. record : its run.json. entries : the last line of each image, those of this run's plan and
    options, and of images that could not be opened.
    """

    folder: Path
    record: Mapping[str, Any]
    shard: Shard
    classes: tuple[str, ...]
    entries: dict[str, Entry]


def read_part(folder: Path) -> Part:
    """Read manifest and run.json. UsageError where `folder` is no run's, DataError where it goes on or is damaged."""
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"holds no run: there is no {MANIFEST}", where=folder, fix="give the --out folders of infer")
    try:
        record = read_run(folder)
        lines, _ = read_entries(folder / MANIFEST)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=folder) from error
    if not record:
        fix = "let it end, or run this shard again; what is complete is skipped"
        raise DataError("its run goes on, or was cut off", where=folder, fix=fix)
    shard, classes = _shard(record.get("shard")), record.get("classes")
    sound = (
        isinstance(classes, list)
        and len(classes) <= MAX_CLASSES
        and all(isinstance(name, str) for name in classes)
        and all(_is_count(record.get(name)) for name in COUNTS)
        and all(isinstance(record.get(name), str) for name in ("key", "plan", "plan_sha256", "device", "precision"))
        and isinstance(record.get("arguments"), dict)
    )
    if not sound or shard is None:
        fix = "run infer into this folder again; what is complete is skipped"
        raise DataError("is damaged, or of an older version", where=folder / RUN, fix=fix)
    key = record["key"]
    entries = {
        name: entry
        for name, entry in lines.items()
        if (entry.get("status") == "done" and entry.get("key") == key)
        or (entry.get("status") == "failed" and entry.get("key", key) == key)
    }
    return Part(folder, record, shard, tuple(classes or ()), entries)


def _shard(value: object) -> Shard | None:
    """The shard of a run.json; a run over all images is the one of one. None for nonsense."""
    if value is None:
        return Shard(1, 1)
    if not isinstance(value, dict):
        return None
    number, of = value.get("number"), value.get("of")
    if not isinstance(number, int) or not isinstance(of, int) or not 1 <= number <= of <= MAX_SHARDS:
        return None
    return Shard(number, of)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_line(entry: Entry, classes: Sequence[str]) -> None:
    """Raises LookupError, TypeError, ValueError or ArithmeticError where the line of a done image makes no sense."""
    summary_row(entry, classes)
    width, height, glass = (entry[name] for name in ("width", "height", "glass_pixels"))
    if not (_is_count(width) and _is_count(height) and _is_count(glass) and max(width, height) <= MAX_SIDE):
        raise ValueError("a size is no number of pixels")
    if glass > width * height:
        raise ValueError("more pixels are glass than there are")


def check_parts(parts: Sequence[Part]) -> None:
    """UsageError unless `parts` are different shards of one run: the same plan, options and number of shards."""
    first = parts[0]
    seen: dict[int, Part] = {}
    for part in parts:
        if part.shard.of != first.shard.of:
            told = f"{first.folder} is shard {first.shard}, {part.folder} is {part.shard}"
            raise UsageError(told, fix="merge shards of one number")
        if part.record["key"] != first.record["key"] or part.classes != first.classes:
            told = f"{first.folder} and {part.folder} are of different runs: {_difference(first.record, part.record)}"
            raise UsageError(told, fix="run all shards with the same --engine, --precision and options")
        if (other := seen.setdefault(part.shard.number, part)) is not part:
            raise UsageError(f"{other.folder} and {part.folder} are both shard {part.shard}", fix="give one of them")


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What two runs of different keys were told, in words."""
    if one["plan_sha256"] != other["plan_sha256"]:
        return f"plan {one['plan']} ({one['plan_sha256'][:12]}) and {other['plan']} ({other['plan_sha256'][:12]})"
    for name in ("precision", "device"):
        if one[name].partition(":")[0] != other[name].partition(":")[0]:
            return f"{name} {one[name]} and {other[name]}"
    options, others = one["arguments"], other["arguments"]
    differ = [n for n in sorted({*options, *others} - HARMLESS) if options.get(n) != others.get(n)]
    return ", ".join(f"{name} {options.get(name)} and {others.get(name)}" for name in differ) or "their options"


def describe_gaps(parts: Sequence[Part]) -> list[str]:
    """What keeps the folders from being a whole run, a line each; none where nothing does."""
    return list(_gaps(parts))


def _gaps(parts: Sequence[Part]) -> Iterator[str]:
    of = parts[0].shard.of
    if missing := missing_shards(parts):
        names = ", ".join(f"{number}/{of}" for number in missing[:SHOWN_SHARDS])
        yield f"{len(missing)} of {of} shards missing: {names}{', ...' if len(missing) > SHOWN_SHARDS else ''}"
    for part in parts:
        if part.record.get("interrupted"):
            yield f"shard {part.shard} was interrupted; run it again into {part.folder}"
    found = [part.record["images_found"] for part in parts]
    if min(found) != max(found):
        yield f"the shards found {min(found)} to {max(found)} images: some came or went while they started"
    worked = sum(sum(part.record[name] for name in COUNTS[1:]) for part in parts)
    if worked < max(found):
        yield f"{max(found) - worked} of {max(found)} images are in none of the folders"


def missing_shards(parts: Sequence[Part]) -> list[int]:
    """Their numbers."""
    return sorted(set(range(1, parts[0].shard.of + 1)) - {part.shard.number for part in parts})


def joined_record(parts: Sequence[Part], entries: Sequence[Entry], out: Path) -> dict[str, Any]:
    """The run.json of all `parts` together, `entries` being the lines of the new manifest.

    Images, pixels and seconds by stage are those of `entries`, however many runs they took; wall_seconds are the
    shards' last runs added up, peak_rss_bytes is the largest. Settings, arguments and versions are the first shard's;
    `shards` has what may differ between them.
    """
    records = [part.record for part in parts]
    done = [entry for entry in entries if entry["status"] == "done"]
    return {
        **records[0],
        "arguments": {**records[0]["arguments"], "out": str(out), "shard": None},
        "shard": None,
        "images_found": max(record["images_found"] for record in records),
        "images_done": len(done),
        "images_failed": len(entries) - len(done),
        "images_skipped": 0,
        "interrupted": any(bool(record.get("interrupted")) for record in records),
        "megapixels": round(sum(entry["width"] * entry["height"] for entry in done) / 1e6, 3),
        "glass_megapixels": round(sum(entry["glass_pixels"] for entry in done) / 1e6, 3),
        "wall_seconds": round(sum(_number(record.get("wall_seconds")) for record in records), 3),
        "stage_seconds": _stage_seconds(records[0].get("stage_seconds"), entries),
        "peak_rss_bytes": max(int(_number(record.get("peak_rss_bytes"))) for record in records),
        "shards": [_told(part) for part in parts],
        "shards_missing": missing_shards(parts),
    }


def _told(part: Part) -> dict[str, Any]:
    names = ("device", "engine", "versions", "tile", "batch", *COUNTS, "interrupted", "wall_seconds", "peak_rss_bytes")
    told = {"shard": str(part.shard), "out": str(part.folder)}
    return told | {name: part.record.get(name) for name in names}


def _stage_seconds(stages: object, entries: Sequence[Entry]) -> dict[str, float]:
    """Seconds by stage over all images."""
    names = list(stages) if isinstance(stages, dict) else []
    spent = [entry["seconds"] for entry in entries if isinstance(entry.get("seconds"), dict)]
    return {name: round(sum(_number(seconds.get(name)) for seconds in spent), 3) for name in names}


def _number(value: object) -> float:
    """`value`, or 0 where it is no finite number from 0 on."""
    return value if isinstance(value, (int, float)) and 0 <= value < math.inf else 0
