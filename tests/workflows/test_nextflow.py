"""The Nextflow modules without Nextflow: their scripts run by bash as Nextflow would, their shape read by a parser."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import results

import histoseg_fast

FOLDER = Path(__file__).parents[2] / "workflows" / "nextflow"
MODULES = FOLDER / "modules" / "local" / "histosegfast"
NAMES = ("infer", "merge", "report")
VERSIONS = '"HISTOSEGFAST":\n    histoseg-fast: ' + histoseg_fast.__version__ + "\n"


def script(name: str, section: str, **values: object) -> str:
    """The bash of a module's `section`, its ${...} replaced by `values`, as Groovy would make it."""
    text = (MODULES / name / "main.nf").read_text()
    (body,) = re.findall(
        rf'^    {section}:\n(?:    def [^\n]*\n)*    """\n(.*?)^    """$', text, re.MULTILINE | re.DOTALL
    )
    values = {"task.process": "HISTOSEGFAST", **values}
    body = re.sub(r"(?<!\\)\$\{([\w.]+)(?: as int)?\}", lambda found: str(values[found[1]]), body)
    assert not re.search(r"(?<!\\)\$", body)
    return re.sub(r"^    ", "", body.replace("\\$", "$").replace("\\\\", "\\"), flags=re.MULTILINE)


def execute(folder: Path, environment: dict[str, str], text: str) -> None:
    """Run a task in its own folder, as Nextflow's .command.sh is."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "versions.yml").read_text() == VERSIONS


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_the_scripts_do_what_one_run_does(cohort, environment: dict[str, str], tmp_path: Path) -> None:
    shards, plan = 3, "--engine model.plan"
    for shard in range(1, shards + 1):
        work = tmp_path / f"infer {shard}"
        work.mkdir()
        (work / "images").symlink_to(cohort.images, target_is_directory=True)
        (work / "model.plan").symlink_to(cohort.plan)
        values = {"shard": shard, "shards": shards, "engine": plan, "args": "--overlay --precision fp32"}
        execute(work, environment, script("infer", "script", **values, **{"task.cpus": 1}))
        staged = tmp_path / "merge" / "shards" / str(shard)
        staged.mkdir(parents=True)
        (staged / "shard").symlink_to(work / "shard", target_is_directory=True)
    execute(tmp_path / "merge", environment, script("merge", "script", args=""))
    assert results(tmp_path / "merge" / "all") == results(cohort.whole)
    assert json.loads((tmp_path / "merge" / "all" / "run.json").read_text())["shards_missing"] == []
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "all").symlink_to(tmp_path / "merge" / "all", target_is_directory=True)
    execute(tmp_path / "report", environment, script("report", "script", args=""))
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize("name", NAMES)
def test_stubs_make_all_outputs(environment: dict[str, str], tmp_path: Path, name: str) -> None:
    execute(tmp_path, environment, script(name, "stub"))
    outputs = re.findall(r"path\(? ?'([^']+)'", (MODULES / name / "main.nf").read_text().split("output:")[1])
    assert "versions.yml" in outputs and len(outputs) >= 2
    for output in outputs:
        assert (tmp_path / output).exists(), output


@pytest.mark.parametrize("name", NAMES)
def test_a_module_has_nf_cores_shape(name: str) -> None:
    text = (MODULES / name / "main.nf").read_text()
    assert text.startswith(f"process HISTOSEGFAST_{name.upper()} {{\n    tag ")
    order = ["tag ", "label ", "container ", "input:", "output:", "when:", "script:", "stub:"]
    places = [re.search(rf"^    {re.escape(word)}", text, re.MULTILINE).start() for word in order]
    assert places == sorted(places)
    assert (
        re.search(r"input:\n    tuple val\(meta\), path\(", text) and "task.ext.when == null || task.ext.when" in text
    )
    assert len(re.findall("emit: versions", text)) == 1 and text.count("    END_VERSIONS\n") == 2
    # Nothing of the user's but numbers and ext.args, which the pipeline's author writes, gets into a script.
    inserted = set(re.findall(r"(?<!\\)\$\{([^}]+)\}", text.split("script:")[1]))
    assert inserted <= {"shard as int", "shards as int", "task.cpus", "engine", "args", "task.process"}
    assert "stageAs: 'images'" in text or name != "infer"


@pytest.mark.parametrize("name", NAMES)
def test_the_description_names_the_channels(name: str) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    meta = yaml.safe_load((MODULES / name / "meta.yml").read_text())
    text = (MODULES / name / "main.nf").read_text()
    assert meta["name"] == f"histosegfast_{name}" and meta["keywords"] and meta["tools"]
    assert set(meta["output"]) == set(re.findall(r"emit: (\w+)", text))
    inputs = re.findall(r"(?:val|path)[ (](\w+)", text.split("input:")[1].split("output:")[0])
    assert [key for channel in meta["input"] for part in channel for key in part] == inputs


def test_images_and_version_are_this_ones() -> None:
    wanted = f"histoseg-fast:{histoseg_fast.__version__}"
    texts = [path.read_text() for path in (*MODULES.rglob("main.nf"), FOLDER / "nextflow.config")]
    found: list[Any] = [tag for text in texts for tag in re.findall(r"container *=? *'([^']+)'", text)]
    assert sorted(found) == [f"{wanted}-cpu"] * 3 + [f"{wanted}-cuda"]


PARSE = """
import json, sys
from reftrace import Module
found = [Module.from_file(path) for path in sys.argv[1:]]
print(json.dumps([[p.name for p in m.processes] if isinstance(m, Module) else str(m) for m in found]))
"""


def parse(*files: Path) -> list[list[str] | str]:
    """The processes of each file, or what is wrong with it. In a process of its own: the parser's runtime (Go) crashes
    beside the libraries that other tests load.
    """
    if importlib.util.find_spec("reftrace") is None:
        pytest.skip("reftrace is not installed")
    done = subprocess.run([sys.executable, "-c", PARSE, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_parser_of_groovy_takes_all_files(tmp_path: Path) -> None:
    modules = [MODULES / name / "main.nf" for name in NAMES]
    assert parse(FOLDER / "main.nf", *modules) == [[], *([f"HISTOSEGFAST_{name.upper()}"] for name in NAMES)]
    broken = tmp_path / "broken.nf"
    broken.write_text(modules[0].read_text().replace("path(images", "path(images("))
    assert isinstance(parse(broken)[0], str)
