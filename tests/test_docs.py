"""README.md and docs/: links lead somewhere, on GitHub and in the site; pages name the options that there are."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import typer

from histoseg_fast.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
README = ROOT / "README.md"
FILES = [README, ROOT / "CHANGELOG.md", *PAGES]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FOREIGN = {
    *("--cores", "--configfile", "--executor", "--forcerun", "--snakefile"),  # Snakemake
    *("--gpus", "--rm", "--shards", "--images", "--outdir", "--plan"),  # Docker, Nextflow
    *("--nproc-per-node", "--loadEngine", "--shapes", "--benchmark-max-time", "--inplace", "--help"),
}
"""Options on the pages that belong to other programs, or to every command."""
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


@cache
def prose(path: Path) -> str:
    """The page without its blocks and spans of code."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE))


@cache
def anchors(path: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = (re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE))
    return {heading.replace(" ", "-") for heading in headings}


# -- links -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names(FILES))
def test_relative_links_lead_to_files_and_headings_that_exist(name: str) -> None:
    page = ROOT / name
    wrong = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / path)) if path else page
        outside = DOCS in page.parents and DOCS not in target.parents  # the site holds nothing but docs/
        if outside or not target.is_file() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


def test_there_are_links_and_headings_to_check() -> None:
    assert sum(len(LINK.findall(prose(page))) for page in FILES) > 100
    assert "outlines-for-qupath" in anchors(DOCS / "commands" / "infer.md")


def test_the_navigation_names_every_page_once() -> None:
    named = re.findall(r"^ +- .*: ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


@pytest.mark.parametrize("name", names([README, *PAGES]))
def test_files_of_the_sources_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    named = re.findall(
        r"(?<![\w/.-])(?:tests|benchmarks|scripts|workflows|histoseg_fast|csrc|docs)/[\w/-]+\.[a-z]+", text
    )
    assert [path for path in named if not (ROOT / path).is_file()] == []


# -- commands --------------------------------------------------------------------------------------


def options(command: str) -> set[str]:
    """The long options of `command`, as `--help` lists them."""
    found = {
        option for parameter in COMMANDS[command].params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    return {option for option in found if option.startswith("--")}


def test_every_command_has_a_page_and_a_row_in_the_readme() -> None:
    assert {page.stem for page in (DOCS / "commands").glob("*.md")} == set(COMMANDS)
    rows = re.findall(r"^\| \[`(\w+)`\]\(docs/commands/(\w+)\.md\)", README.read_text("utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted((command, command) for command in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_commands_page_names_all_its_options(command: str) -> None:
    text = (DOCS / "commands" / f"{command}.md").read_text("utf-8")
    short = {"--out"} if re.search(r" -o [\w*]", text) else set()
    assert options(command) - set(OPTION.findall(text)) - short == set()


@pytest.mark.parametrize("name", names([README, *PAGES]))
def test_no_page_names_an_option_that_is_not_there(name: str) -> None:
    """Options behind `histoseg-fast COMMAND` are that command's; all others are some command's or another program's."""
    text = (ROOT / name).read_text("utf-8").replace("\\\n", " ")
    known = set().union(*map(options, COMMANDS)) | FOREIGN | script_options()
    wrong = set(OPTION.findall(text)) - known
    for command, rest in re.findall(r"histoseg-fast (\w+)((?: [^\n`;#]*)?)", text):
        if command in COMMANDS:
            wrong |= {f"{command} {option}" for option in set(OPTION.findall(rest)) - options(command) - FOREIGN}
    assert not wrong


@cache
def script_options() -> set[str]:
    """Options of the scripts in benchmarks/ and of the fuzzer."""
    files = [*(ROOT / "benchmarks").glob("*.py"), ROOT / "tests" / "fuzz" / "fuzz.py"]
    scripts = (path.read_text("utf-8") for path in files)
    return {option for script in scripts for option in re.findall(r'add_argument\("(--[\w-]+)"', script)}


# -- what pages say --------------------------------------------------------------------------------


def test_the_page_on_accuracy_repeats_the_model_cards() -> None:
    table = re.findall(
        r"^\| ([\w ,]+?) \| (0\.[\d., ]+) \| (0\.[\d., ]+) \|$", (DOCS / "accuracy.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(table) > 5
    for place, card in enumerate(("fast", "final")):
        rows = (DOCS / f"model-card-{card}.md").read_text("utf-8").splitlines()
        for images, *scores in table:
            (row,) = (line for line in rows if line.startswith(f"| {images} |"))
            shown = [cell.split(" (")[0] for cell in row.strip("| ").split(" | ")[1:4]]
            assert shown == scores[place].split(", "), (card, images)


def test_the_examples_of_the_page_on_extending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(str(DOCS / "extending.md"), module_relative=False)
    assert tried > 5 and failed == 0


# -- the site --------------------------------------------------------------------------------------


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for page in PAGES:
        html = (tmp_path / "site" / page.relative_to(DOCS)).with_suffix(".html").read_text("utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?([^\"'\s>]+)", html)
        assert len(loaded) > 3 and [url for url in loaded if re.match(r"(\w+:)?//", url)] == []
