"""`merge`: what the shards of a run left in folders of their own becomes one folder, as if they had been one run."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from histoseg_fast.errors import HistosegError, UsageError
from histoseg_fast.files import BLOCK_BYTES, atomic_link, atomic_write
from histoseg_fast.images.content import open_regular
from histoseg_fast.pipeline.parts import Part, check_line, check_parts, describe_gaps, joined_record, read_part
from histoseg_fast.pipeline.records import (
    MANIFEST,
    OUTPUT_FOLDERS,
    clear_partials,
    digest_of,
    drop_run,
    lock_folder,
    read_entries,
    write_run,
    write_summary,
    writing,
)
from histoseg_fast.pipeline.sources import refuse_foreign

WORKERS = 4
"""Threads that digest, link and copy."""

RUN_ANEW = "run the shards again, with new --out folders"

Entry = dict[str, Any]


@dataclass
class Merged:
    """What a merge did. shards : how many. gaps : what is lacking, a line each, for people. files : outputs by how they
    came into the folder: "linked", "copied", or "kept" where an earlier merge had left them. entries : the manifest.
    """

    shards: int
    gaps: list[str]
    entries: list[Entry] = field(default_factory=list)
    files: Counter[str] = field(default_factory=Counter)

    @property
    def done(self) -> int:
        """Images with results."""
        return sum(entry["status"] == "done" for entry in self.entries)

    @property
    def failed(self) -> list[Entry]:
        """The manifest lines of the others."""
        return [entry for entry in self.entries if entry["status"] != "done"]


def merge(
    folders: Sequence[Path], out: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Merged:
    """Join the output folders of shards in `out`; `progress` is told images so far, and all of them.

    Outputs become hard links, or copies where the file system cannot link them, and are checked by their digests; an
    image whose output is missing or damaged is a failed one. A merge that was cut off is finished by the next. Raises
    UsageError (no shards, not of one run, `out` in use or of another run), DataError (a shard that goes on, or is
    damaged), ImageError where `out` cannot be written.
    """
    parts = [read_part(folder) for folder in folders]
    check_parts(parts)
    parts.sort(key=lambda part: part.shard.number)
    same = [part.folder for part in parts if os.path.realpath(part.folder) == os.path.realpath(out)]
    if same:
        raise UsageError("is one of the shards", where=out, fix="choose another -o")
    refuse_foreign(out)
    entries = _join(parts)
    merged = Merged(len(parts), describe_gaps(parts))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock, locked = lock_folder(out)
        with contextlib.closing(lock):
            _refuse_others(out, entries)
            if locked:
                clear_partials(out)
            drop_run(out)
            (out / MANIFEST).touch()  # from here on the folder is a run's, also for a merge that follows a kill
            _place_all(parts, entries, out, merged, progress)
            with atomic_write(out / MANIFEST) as stream:
                stream.writelines(json.dumps(entry, ensure_ascii=True).encode() + b"\n" for entry in merged.entries)
            write_summary(out, merged.entries, parts[0].classes)
            write_run(out, joined_record(parts, merged.entries, out))
    return merged


def _join(parts: Sequence[Part]) -> dict[str, tuple[Part, Entry]]:
    """The line that counts of each image, in the order of names, and whose it is.

    Of an image that is in several shards (they were dealt anew into the same folders) one with results counts, of
    several the first shard's. Raises UsageError where these are of different files, or two images share an output.
    """
    chosen: dict[str, tuple[Part, Entry]] = {}
    for part in parts:
        for name, entry in part.entries.items():
            other, before = chosen.get(name, (part, entry))
            if before["status"] == entry["status"] == "done" and before.get("sha256") != entry.get("sha256"):
                told = f"{other.folder} and {part.folder} hold results of different files called {name}"
                raise UsageError(told, fix=RUN_ANEW)
            if name not in chosen or (before["status"] != "done" and entry["status"] == "done"):
                chosen[name] = part, entry
    owners: dict[str, str] = {}
    for name, (_, entry) in chosen.items():
        for path in _outputs(entry).values():
            if (owner := owners.setdefault(path.casefold(), name)) != name:
                raise UsageError(f"the results of {owner} and {name} have one name, {path}", fix=RUN_ANEW)
    return {name: chosen[name] for name in sorted(chosen)}


def _refuse_others(out: Path, entries: Mapping[str, object]) -> None:
    before, _ = read_entries(out / MANIFEST)
    if others := sorted(before.keys() - entries.keys()):
        raise UsageError(
            f"holds results of {len(others)} image(s) that no shard has, as {others[0]}",
            where=out,
            fix="choose another -o",
        )


def _place_all(
    parts: Sequence[Part],
    entries: Mapping[str, tuple[Part, Entry]],
    out: Path,
    merged: Merged,
    progress: Callable[[int, int], None],
) -> None:
    """Put the outputs of `entries` into `out`, a few at a time; `merged` gets their lines, in order."""
    pool = ThreadPoolExecutor(WORKERS, "merge")
    try:
        for entry, files in pool.map(lambda item: _place(item[0], item[1], out, parts[0].classes), entries.values()):
            merged.entries.append(entry)
            merged.files.update(files)
            progress(len(merged.entries), len(entries))
    finally:
        pool.shutdown(cancel_futures=True)


def _place(part: Part, entry: Entry, out: Path, classes: Sequence[str]) -> tuple[Entry, Counter[str]]:
    """Put the outputs of one image into `out`; its line, of a failed image where that cannot be, and how they came."""
    files: Counter[str] = Counter()
    if entry["status"] != "done":
        return entry, files
    try:
        try:
            check_line(entry, classes)
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise Damaged("its line in the manifest is damaged") from error
        outputs = _outputs(entry)
        if "mask" not in outputs:
            raise Damaged("its line in the manifest names no mask")
        for kind, path in outputs.items():
            files[place(part.folder / path, out / path, entry[f"{kind}_sha256"])] += 1
    except Damaged as error:
        told = f"{entry['input']}: {error.what}; run shard {part.shard} again into {part.folder}"
        kept = {name: entry[name] for name in ("input", "path", "sha256", "key") if name in entry}
        return kept | {"status": "failed", "error": told}, files
    return entry, files


def _outputs(entry: Entry) -> dict[str, str]:
    """An image's files by their kind, relative to the folder and inside of it; others are left out."""
    found = {}
    for kind, path in entry.items():
        if isinstance(path, str) and isinstance(entry.get(f"{kind}_sha256"), str):
            parts = PurePosixPath(path).parts
            if len(parts) > 1 and parts[0] in OUTPUT_FOLDERS and ".." not in parts and "\0" not in path:
                found[kind] = path
    return found


# -- files ---------------------------------------------------------------------------------------------


class Damaged(HistosegError):
    """An output of a shard that is missing, or not what its run wrote."""


def place(source: Path, target: Path, sha256: str) -> str:
    """Give `target` the bytes of `source`, whose digest must be `sha256`; "kept", "linked" or "copied", what it took.

    Raises Damaged where `source` is not as it should be, OSError where `target` cannot be written.
    """

    def check(path: Path) -> None:
        if digest_of(path) != sha256:
            raise Damaged(f"{source} is not what the run wrote")

    if os.path.isfile(target) and not target.is_symlink() and digest_of(target) == sha256:
        return "kept"
    if not os.path.isfile(source):  # False as well where no file can have the name
        raise Damaged(f"{source} is missing")
    with contextlib.suppress(FileNotFoundError):  # gone just now; the copy says so
        if not source.is_symlink() and atomic_link(source, target, check):
            return "linked"
    _copy(source, target, check)
    return "copied"


def _copy(source: Path, target: Path, check: Callable[[Path], None]) -> None:
    try:
        reader = open_regular(source)
    except OSError as error:
        raise Damaged(f"{source} cannot be read: {error.strerror or error}") from error
    with reader, atomic_write(target) as stream:
        while block := _read(reader, source):
            stream.write(block)
        stream.flush()
        check(Path(stream.name))


def _read(reader: BinaryIO, source: Path) -> bytes:
    try:
        return reader.read(BLOCK_BYTES)
    except OSError as error:
        raise Damaged(f"{source} cannot be read: {error.strerror or error}") from error
