"""What a run leaves behind beside the masks: manifest.jsonl, summary.csv, run.json; and what a resumed run reads."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from histoseg_fast.errors import DataError, ImageError, UsageError
from histoseg_fast.files import atomic_write, is_partial, refuse_irregular, sha256_of
from histoseg_fast.images.content import open_regular

MANIFEST, SUMMARY, RUN, LOCK = "manifest.jsonl", "summary.csv", "run.json", ".lock"
OUTPUT_FOLDERS = ("masks", "overlays", "geojson", "probabilities", "overviews", "tissue")
"""Folders of results in `out`; never read as input."""


class Manifest:
    """DIR/manifest.jsonl: a line an image, appended as images finish; the last line of an image counts.

    Opening it reads what an earlier run left (a torn last line, from a kill, is dropped), locks the folder (a second
    run into the same folder raises UsageError) and removes the half-written files that a killed run left. Where the
    file system cannot lock, `report` gets a line, and nothing is removed. Raises OSError as the file system does.
    """

    def __init__(self, out: Path, report: Callable[[str], None] = lambda line: None):
        self.path = out / MANIFEST
        out.mkdir(parents=True, exist_ok=True)
        refuse_irregular(self.path)
        self._lock_file, self.locked = lock_folder(out)
        if not self.locked:
            report(f"{out}: this file system cannot lock; let no two runs write there at once")
        self._lock = threading.Lock()
        self._stream = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self.entries = Entries(self.path)
        self._stream.truncate(self.entries.size)
        if self.locked:
            clear_partials(out)

    def add(self, entry: dict[str, Any]) -> None:
        """Append the line of one image; it is in the file when this returns. ImageError where that cannot be."""
        line = (json.dumps(entry, ensure_ascii=True) + "\n").encode("ascii")
        with self._lock, writing(self.path):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._stream.write(rest) :]
            except OSError:
                with contextlib.suppress(OSError):  # half a line would become part of the next
                    self._stream.truncate(self.entries.size)
                raise
            self.entries.note(entry["input"], len(line))

    def complete(
        self, name: str, sha256: str, key: str, paths: Mapping[str, str], digest: Callable[[str], str | None]
    ) -> bool:
        """As `is_complete` has it, by the last line of image `name`."""
        return is_complete(self.entries.get(name), sha256, key, paths, digest)

    def close(self) -> None:
        """Close the file and give the folder free."""
        with contextlib.suppress(OSError):  # what a full disk did not take; `add` has raised for it
            self._stream.close()
        self.entries.close()
        self._lock_file.close()


def is_complete(
    entry: Mapping[str, Any] | None,
    sha256: str,
    key: str,
    paths: Mapping[str, str],
    digest: Callable[[str], str | None],
) -> bool:
    """Whether the image with digest `sha256`, whose line is `entry`, is done under the same plan and options (`key`).

    Its outputs must lie intact at `paths` (relative, by their manifest key; another image in the run can move them).
    digest : the hex SHA-256 of such a path, None where there is none.
    """
    if entry is None or (entry.get("status"), entry.get("sha256"), entry.get("key")) != ("done", sha256, key):
        return False
    return all(
        entry.get(kind) == path and digest(path) == entry.get(f"{kind}_sha256", "") for kind, path in paths.items()
    )


class Entries(Mapping[str, dict[str, Any]]):
    """The last line of each image in a manifest, by the image's name, in the order in which images first came.

    Lines are read from the file when they are asked for: of a million images, memory holds names and places alone.
    size : bytes of whole lines.
    """

    def __init__(self, path: Path):
        self._stream = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._lock = threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}
        self.size = 0
        for entry, size in _read_lines(self._stream):
            self.note(None if entry is None else entry["input"], size)

    def note(self, name: str | None, size: int) -> None:
        """The next `size` bytes of the file are a line, of image `name` or of none."""
        if name is not None:
            self._places[name] = self.size, size
        self.size += size

    def close(self) -> None:
        """Close the file; nothing can be read any more."""
        self._stream.close()

    def __getitem__(self, name: str) -> dict[str, Any]:
        start, size = self._places[name]
        with self._lock:
            self._stream.seek(start)
            entry: dict[str, Any] = json.loads(self._stream.read(size))
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_entries(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The last line of each image in a manifest, in the order in which images first came, and how many bytes are whole
    lines; nothing where there is no manifest.
    """
    entries: dict[str, dict[str, Any]] = {}
    whole = 0
    if path.exists():
        with open(path, "rb") as stream:
            for entry, size in _read_lines(stream):
                whole += size
                if entry is not None:
                    entries[entry["input"]] = entry
    return entries, whole


def _read_lines(stream: BinaryIO) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """Each whole line of a manifest: what it says, None where it makes no sense, and its bytes."""
    for line in stream:
        if not line.endswith(b"\n"):
            return
        entry = None
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict) and isinstance(found.get("input"), str):
                if b"\\u" in line or not line.isascii():
                    _check_text(found)
                entry = found
        yield entry, len(line)


def _check_text(values: Any) -> None:
    """ValueError where a text in JSON `values` is none that a file system has: half of a surrogate pair."""
    json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogateescape")


def lock_folder(out: Path) -> tuple[io.IOBase, bool]:
    """Keep other runs out of `out` until the file that is returned is closed; and whether that could be done.

    UsageError where another run is in it. Windows, and some network file systems, do not lock.
    """
    refuse_irregular(out / LOCK)
    stream = open(out / LOCK, "ab")  # noqa: SIM115 (the lock lives as long as the file is open)
    try:
        import fcntl
    except ImportError:
        return stream, False
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise UsageError("another run is writing here", where=out, fix="wait for it, or use another --out") from None
    except OSError:
        return stream, False
    return stream, True


def digest_of(path: Path) -> str | None:
    """Hex SHA-256 of a regular file; None where it cannot be read."""
    try:
        with open_regular(path) as stream:
            return sha256_of(stream)
    except OSError:
        return None


def run_key(plan_sha256: str, options: Mapping[str, Any]) -> str:
    """Digest of all that decides what an image's outputs are, beside the image itself."""
    return hashlib.sha256(json.dumps([plan_sha256, options], sort_keys=True).encode()).hexdigest()


def write_summary(out: Path, entries: Iterable[Mapping[str, Any]], classes: tuple[str, ...]) -> None:
    """DIR/summary.csv, a row for each done image in the order of names, the same for any order of work.

    Columns: image, width, height (pixels), for each class its pixels and share of the image, tumour_stroma_ratio
    (cancer / (cancer + stroma); empty without either), mean_confidence (of the winning class, 0 to 1, over segmented
    pixels; empty where all is glass), mpp (micrometres a pixel) and each class's area in square micrometres (all empty
    where the image does not state its resolution), glass_pixels (of the background: what was taken for glass and not
    segmented).
    """
    columns = [f"{name}_{kind}" for name in classes for kind in ("pixels", "share")]
    areas = [f"{name}_um2" for name in classes]
    scores_of = ["tumour_stroma_ratio", "mean_confidence", "mpp"]
    rows = [(e["input"], _csv(summary_row(e, classes))) for e in entries if e["status"] == "done"]
    head = _csv(["image", "width", "height", *columns, *scores_of, *areas, "glass_pixels"])
    with atomic_write(out / SUMMARY) as stream:
        for line in (head, *(row for _, row in sorted(rows))):
            stream.write(line.encode("utf-8", "surrogateescape"))


def _csv(row: Iterable[object]) -> str:
    """A line of CSV. Python's writer leaves a lone carriage return bare before 3.13, where readers end the row."""
    cells = [str(value).replace('"', '""') for value in row]
    return ",".join(f'"{cell}"' if set(cell) & set(',"\r\n') else cell for cell in cells) + "\n"


def summary_row(entry: Mapping[str, Any], classes: Sequence[str]) -> list[object]:
    """The row of a done image. KeyError, TypeError, ValueError or ArithmeticError where its line makes no sense."""
    counts = [int(entry["pixels"][name]) for name in classes]
    total = sum(counts)
    shares = [x for count in counts for x in (count, f"{count / total:.6f}")]
    ratio = tumour_stroma_ratio(entry["pixels"])
    scores = ["" if score is None else f"{score:.6f}" for score in (ratio, entry["mean_confidence"])]
    mpp = entry.get("mpp")
    sizes = ["" for _ in classes] if mpp is None else [f"{count * mpp * mpp:.1f}" for count in counts]
    shown = "" if mpp is None else f"{mpp:.6g}"
    size = entry["width"], entry["height"]
    return [entry["input"], *size, *shares, *scores, shown, *sizes, entry["glass_pixels"]]


def tumour_stroma_ratio(pixels: Mapping[str, int]) -> float | None:
    """Cancer pixels over cancer and stroma pixels; None without either class."""
    cancer, stroma = pixels.get("cancer", 0), pixels.get("stroma", 0)
    return cancer / (cancer + stroma) if cancer + stroma else None


def write_run(out: Path, record: Mapping[str, Any]) -> None:
    """DIR/run.json."""
    with atomic_write(out / RUN) as stream:
        stream.write((json.dumps(record, indent=1, default=os.fspath) + "\n").encode())


def read_run(out: Path) -> dict[str, Any]:
    """DIR/run.json; empty where there is none. DataError where it is damaged, OSError where it cannot be read."""
    path = out / RUN
    try:
        record = json.loads(path.read_bytes())
        _check_text(record)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise DataError("is damaged", where=path, fix="run infer into this folder again; what is complete is skipped")
    return record


def drop_run(out: Path) -> None:
    """Remove the run.json of an earlier run: while there is none, a run is going on, or was cut off."""
    (out / RUN).unlink(missing_ok=True)


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Make ImageError of an OSError while records of a run are written to `out`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ImageError):
            raise
        reason, fix = error.strerror or str(error), "choose another --out, or free space"
        raise ImageError(f"cannot be written: {reason}", where=error.filename or out, fix=fix) from error


def clear_partials(out: Path) -> None:
    """Remove the half-written files that a killed run left in `out`; the lock must be held.

    They lie beside the records and in the folders of results; others, and names that are not ours, are left alone.
    """
    folders = [(str(out), os.listdir(out))]
    folders += [(folder, files) for name in OUTPUT_FOLDERS for folder, _, files in os.walk(out / name)]
    for folder, files in folders:
        for file in filter(is_partial, files):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, file))
