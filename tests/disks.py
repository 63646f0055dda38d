"""Small disks for the tests that fill them up or make them read-only."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SIZE = 8 << 20
BALLAST = "ballast"


@dataclass(frozen=True)
class Disk:
    """A file system of `SIZE` bytes on `folder`."""

    folder: Path

    def leave(self, room: int) -> None:
        """Fill it until about `room` bytes are free; 0: until the last block is taken."""
        (self.folder / BALLAST).unlink(missing_ok=True)
        size = shutil.disk_usage(self.folder).free - room
        with contextlib.suppress(OSError), open(self.folder / BALLAST, "wb") as ballast:
            ballast.write(bytes(max(0, size)))

    def clear(self) -> None:
        """Remove all."""
        for path in self.folder.iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing may be written to it within the block."""
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)
        try:
            yield
        finally:
            subprocess.run(["mount", "-o", "remount,rw", self.folder], check=True)


@contextlib.contextmanager
def small_disk(folder: Path, size: int = SIZE) -> Iterator[Disk]:
    """A disk on `folder`; skips where this user may not mount one."""
    folder.mkdir()
    with contextlib.suppress(OSError):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
        if subprocess.run(mount, capture_output=True).returncode == 0:
            try:
                yield Disk(folder)
            finally:
                subprocess.run(["umount", "--lazy", folder], check=True)
            return
    pytest.skip("only root, and not in every container, may mount a small disk")
