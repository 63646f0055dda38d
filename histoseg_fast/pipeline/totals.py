"""What a run has done so far, in figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STAGES = ("read", "engine", "stitch", "write")


@dataclass
class Totals:
    """What a run has done so far: images by fate (of one that came again, each time; failed counts as it stands now),
    pixels of done images and what of them is skipped glass, pixels segmented so far (those of images in flight too),
    seconds by stage summed over images.
    """

    done: int = 0
    failed: int = 0
    skipped: int = 0
    pixels: int = 0
    glass: int = 0
    segmented: int = 0
    stage_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _failed: set[str] = field(default_factory=set, repr=False)

    def count(self, entry: dict[str, Any]) -> None:
        """Add an image that is over, by its manifest entry; but for `segmented`."""
        if entry["input"] in self._failed:  # it came again, and what it is now counts
            self._failed.remove(entry["input"])
            self.failed -= 1
        if entry["status"] == "failed":
            self._failed.add(entry["input"])
        setattr(self, entry["status"], getattr(self, entry["status"]) + 1)
        if entry["status"] == "done":
            self.pixels += entry["width"] * entry["height"]
            self.glass += entry["glass_pixels"]
        for stage, seconds in entry.get("seconds", {}).items():
            self.stage_seconds[stage] += seconds
