"""What the tests of the workflows share: a cohort with names that no shell may see, and `histoseg-fast` on the path."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from running import picture, run_command

import histoseg_fast
from histoseg_fast.images import write_png

NAMES = ["plain.png", "sp ace.png", "üml äut.png", 'it\'s "q" $(touch oops) `touch oops`.png', "deep er/{x} & ;y.png"]
NAMES += ["-o.png", "new\nline.png"]
FOLDER = 'täble d\'hôte "q" $(touch oops)'


@dataclass(frozen=True)
class Cohort:
    """images : a folder. plan : a file. whole : the output of one run over all images."""

    images: Path
    plan: Path
    whole: Path


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory, tiny_plan_path: Path) -> Cohort:
    """Images whose names and folder hold whatever a shell could fall for, and their run; one image is damaged."""
    folder = tmp_path_factory.mktemp("cohort") / FOLDER
    for i, name in enumerate(NAMES):
        write_png(folder / "the images" / name, picture(i, 20 + 11 * i, 30))
    (folder / "the images" / "bad.png").write_bytes(b"no image")
    plan = Path(shutil.copy(tiny_plan_path, folder / "the plan's.plan"))
    cohort = Cohort(folder / "the images", plan, folder / "whole")
    done = run_command("infer", cohort.images, "--engine", plan, "--out", cohort.whole, "--overlay")
    assert done.returncode == 3, done.stderr
    return cohort


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a child process: `histoseg-fast` on the path is the package under test."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "histoseg-fast"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m histoseg_fast "$@"\n')
    program.chmod(0o755)
    root = str(Path(histoseg_fast.__file__).parents[1])
    return {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": root}
