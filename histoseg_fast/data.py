"""Folders of image / label pairs: DATA/images, DATA/labels and, if there, DATA/split.csv."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histoseg_fast.errors import DataError, HistosegError, UsageError
from histoseg_fast.images import SUFFIXES, read_image
from histoseg_fast.labels import PAPER_PALETTE, Palette, decode

SPLITS = ("train", "val", "test")
VALIDATE_EVERY = 5
"""Without a split.csv, every fifth image (by name) validates and the rest train."""
PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Pair:
    """One labelled image of a data folder. Training resizes it by `scale`; scores are always of the image as it is."""

    name: str
    image: Path
    label: Path
    split: str
    scale: float = 1.0


def load_pair(pair: Pair, palette: Palette = PAPER_PALETTE, tolerance: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """RGB uint8 (H, W, 3) and class ids uint8 (H, W) of one pair.

    Raises ImageError if a file cannot be read, LabelError for a colour farther than `tolerance` from the
    palette, DataError if the two differ in size.
    """
    rgb = read_image(pair.image)
    label = read_image(pair.label)
    if rgb.shape != label.shape:
        (h, w), (lh, lw) = rgb.shape[:2], label.shape[:2]
        raise DataError(f"label is {lw}x{lh} but its image is {w}x{h}", where=pair.label)
    try:
        return rgb, decode(label, palette, tolerance=tolerance).ids
    except HistosegError as error:
        raise type(error)(error.what, where=pair.label, fix=error.fix) from None


def find_pairs(root: str | Path) -> list[Pair]:
    """The pairs of DATA/images and DATA/labels (matched by name without suffix), sorted by name.

    `split.csv` (columns name, split) assigns the splits; images it does not name are left out. Raises
    UsageError where there is no such folder, DataError that lists every problem at once: missing folders, images
    without labels and the reverse, unknown splits, names twice.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError("no such folder", where=root)
    problems = [f"{name}/: no such folder" for name in ("images", "labels") if not (root / name).is_dir()]
    raise_problems(root, problems, fix="a data folder holds images/ and labels/")
    images, labels = _by_stem(root / "images", problems), _by_stem(root / "labels", problems)
    problems += [f"{name}: image without label" for name in sorted(images.keys() - labels.keys())]
    problems += [f"{name}: label without image" for name in sorted(labels.keys() - images.keys())]
    names = sorted(images.keys() & labels.keys())
    splits = _read_splits(root / "split.csv", images.keys(), problems)
    if splits is None:
        splits = {name: "val" if i % VALIDATE_EVERY == VALIDATE_EVERY - 1 else "train" for i, name in enumerate(names)}
    if not names and not problems:
        problems.append("images/ and labels/ hold no image (" + ", ".join(sorted(SUFFIXES)) + ")")
    raise_problems(root, problems)
    return [Pair(images[n].name, images[n], labels[n], splits[n]) for n in names if n in splits]


def check_pairs(root: Path, pairs: Iterable[Pair], palette: Palette = PAPER_PALETTE, tolerance: float = 0.0) -> None:
    """Decode every pair once; raise one DataError that names all that cannot be used.

    That is also an image which stands in two splits, by content: its scores would be worth nothing.
    """
    problems = []
    seen: dict[bytes, Pair] = {}
    for pair in pairs:
        try:
            rgb, _ = load_pair(pair, palette, tolerance)
        except HistosegError as error:
            problems.append(str(error))
            continue
        twin = seen.setdefault(hashlib.sha256(repr(rgb.shape).encode() + rgb.tobytes()).digest(), pair)
        if twin.split != pair.split:
            problems.append(f"{twin.name} ({twin.split}) and {pair.name} ({pair.split}) are the same image")
    raise_problems(root, problems)


def raise_problems(root: Path, problems: Sequence[str], fix: str | None = None) -> None:
    """Raise one DataError that names all `problems`, if there are any."""
    if problems:
        more = len(problems) - PROBLEMS_SHOWN
        text = "; ".join(problems[:PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise DataError(f"{len(problems)} problem(s) in this data folder: {text}", where=root, fix=fix)


def _by_stem(folder: Path, problems: list[str]) -> dict[str, Path]:
    """The image files of `folder` by name without suffix; what is wrong is appended to `problems`."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                problems.append(f"{folder.name}/: two files with one name: {found[path.stem].name}, {path.name}")
            found.setdefault(path.stem, path)
    return found


def _read_splits(path: Path, names: Collection[str], problems: list[str]) -> dict[str, str] | None:
    """The split of each stem, or None without a file; what is wrong is appended to `problems`."""
    if not path.exists():
        return None
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(f"{path.name} cannot be read ({error})")
        return None
    if not rows or not {"name", "split"} <= rows[0].keys():
        problems.append(f"{path.name} has no rows with the columns name and split")
        return None
    splits: dict[str, str] = {}
    for row in rows:
        name = row["name"] or ""
        stem = name if name in names else Path(name).stem  # a name without suffix may hold a dot
        if row["split"] not in SPLITS:
            problems.append(f"split.csv: {row['name']} has split {row['split']!r}, not one of {', '.join(SPLITS)}")
        elif stem in splits:
            problems.append(f"split.csv: {row['name']} stands twice")
        elif stem not in names:
            problems.append(f"split.csv: {row['name']} has no image")
        else:
            splits[stem] = row["split"]
    return splits
