"""The Snakemake workflow, run by Snakemake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running import results

pytest.importorskip("snakemake", reason="Snakemake is not installed (it wants Python 3.11)")

SNAKEFILE = Path(__file__).parents[2] / "workflows" / "snakemake" / "Snakefile"
OUT = 'the out\'s "q" $(touch oops)'
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def snakemake(cohort, environment: dict[str, str], tmp_path: Path) -> Run:
    """Run the workflow over the cohort into "the out"; `options` go before, `config` over the usual one."""

    def run(*options: str, **config: object) -> subprocess.CompletedProcess[str]:
        usual = {"images": str(cohort.images), "out": str(tmp_path / OUT)}
        usual |= {"engine": str(cohort.plan), "precision": "fp32", "shards": 3, "threads": 1, "options": ["--overlay"]}
        (tmp_path / "my config.json").write_text(json.dumps(usual | config))
        arguments = ["--snakefile", str(SNAKEFILE), "--configfile", str(tmp_path / "my config.json")]
        command = [sys.executable, "-m", "snakemake", *arguments, "--cores", "2", "--nocolor", *options]
        cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment | cache
        )

    return run


@pytest.mark.slow
def test_shards_merge_and_report(cohort, snakemake: Run, tmp_path: Path) -> None:
    done = snakemake()
    assert done.returncode == 0, done.stderr
    out = tmp_path / OUT
    merged = results(out / "all")
    assert len(merged.pop("report.html")) > 10_000
    assert merged == results(cohort.whole)
    record = json.loads((out / "all" / "run.json").read_text())
    assert (record["images_done"], record["images_failed"], record["shards_missing"]) == (7, 1, [])
    assert [part["shard"] for part in record["shards"]] == ["1/3", "2/3", "3/3"]
    assert "7 images done, 1 failed" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("oops")) and not list(cohort.images.parent.rglob("oops"))
    again = snakemake()
    assert again.returncode == 0 and "Nothing to be done" in again.stdout + again.stderr
    lost = out / "shards" / "2-of-3" / "run.json"  # as a shard that was cut off leaves it
    lost.unlink()
    shutil.rmtree(out / "all")
    assert snakemake().returncode == 0
    assert json.loads(lost.read_text())["images_done"] == 0  # all of it was there still
    assert results(out / "all").keys() == merged.keys() | {"report.html"}


def test_a_shard_that_fails_fails_the_workflow(cohort, snakemake: Run, tmp_path: Path) -> None:
    (tmp_path / "no.plan").write_bytes(b"no plan")
    done = snakemake(engine=str(tmp_path / "no.plan"), shards=1)
    assert done.returncode != 0 and "no.plan: " in done.stdout + done.stderr
    assert not any(path.name == "report.html" for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "wrong",
    [{"shards": 0}, {"precision": "fp8"}, {"shard": 3}, {"options": "--overlay"}, {"out": "{x}"}, {"images": "a{b"}],
)
def test_wrong_settings_are_told(snakemake: Run, wrong: dict[str, object]) -> None:
    done = snakemake("--dry-run", **wrong)
    assert done.returncode != 0 and next(iter(wrong)) in done.stdout + done.stderr


def test_the_shipped_settings_are_whole(environment: dict[str, str], tmp_path: Path) -> None:
    """config.yaml alone, with `images` in the folder one works in, makes a plan of jobs."""
    (tmp_path / "images").mkdir()
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE), "--cores", "1", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "infer" in done.stdout and "4-of-4" in done.stdout + done.stderr
