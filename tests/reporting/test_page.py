"""What the report says, that nothing in it can act, and what the command answers."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_runs import MadeUpRun
from running import command, make_pictures, run_command

from histoseg_fast.errors import DataError, HistosegError, UsageError
from histoseg_fast.labels import Palette
from histoseg_fast.reporting import charts
from histoseg_fast.reporting.cohort import UNKNOWN_COLOUR, mask_palette, read_cohort, slide_palette
from histoseg_fast.reporting.page import link, script_json, text, write_report

HOSTILE = [
    "</script><script>document.title='owned'</script>.png",
    "<img src=x onerror=\"document.title='owned'\">.png",
    "\"'><b>&amp;.png",
    "a\nb\r\tc\x00\x1b[31m.png",
    "photo\u202egnp.exe \u2066x\u2069.png",
    "<!--<script>.png",
    "\udcff\udc80.png",
    "$title ${version} \0.png",
    "=cmd|' /C calc'!A0.png",
]


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, and the text of each script by its id."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: dict[str, str] = {}
        self.words = ""
        self._block: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._block = dict(attributes).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        self._block = None

    def handle_data(self, data: str) -> None:
        if self._block:
            self.blocks[self._block] = self.blocks.get(self._block, "") + data
        else:
            self.words += data


def read(path: Path) -> Reader:
    return Reader(path.read_text("utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> MadeUpRun:
    return MadeUpRun(tmp_path)


def test_a_report_holds_the_figures_of_the_manifest(run: MadeUpRun) -> None:
    run.done("b", {"warnings": ["16-bit samples scaled to 8 bits"]}, seed=2)
    run.done("a", seed=1)
    run.failed("c", "c: is no image")
    run.end()
    written = write_report(run.out)
    assert written.path == run.out / "report.html" and written.size == written.path.stat().st_size
    assert (written.done, written.failed, written.without_image, written.without_mask) == (2, 1, 0, 0)
    page = read(written.path)
    data = json.loads(page.blocks["data"])
    assert data["classes"] == ["background", "cancer", "stroma"]
    first, second, third = data["rows"]
    assert [row["name"] for row in data["rows"]] == ["a", "b", "c"]
    assert sum(first["pixels"]) == first["width"] * first["height"] == 1200
    assert first["ratio"] == pytest.approx(first["pixels"][1] / (first["pixels"][1] + first["pixels"][2]))
    assert first["confidence"] == 0.51 and first["links"] == {"mask": "masks/a.png"}
    assert second["notes"] == ["16-bit samples scaled to 8 bits"] and third == {"name": "c", "error": "c: is no image"}
    for said in ("1 image failed", "c: is no image", "made up 1", "min_island 32", "12.5 s", "engine2.0 s, 67 %"):
        assert said in page.words, said
    assert set(page.blocks) == {"style", "script", "data", "p0", "p1"}


def test_the_same_run_gives_the_same_bytes(run: MadeUpRun, tmp_path: Path) -> None:
    for i in range(5):
        run.done(f"{i}", seed=i)
    write_report(run.out, tmp_path / "1.html")
    write_report(run.out, tmp_path / "2.html")
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


def test_hostile_names_and_messages_stay_text(run: MadeUpRun) -> None:
    for i, name in enumerate(HOSTILE):
        run.done(name, {"warnings": [name]}, stem=f"{i}")
        run.failed(f"failed {name}", name)
    run.end(plan=HOSTILE[0], versions={HOSTILE[1]: HOSTILE[0]}, arguments={"inputs": HOSTILE})
    page = read(write_report(run.out).path)
    assert [tag for tag, _ in page.tags if tag in ("img", "b", "script", "iframe")].count("img") == 0
    scripts = [a for tag, a in page.tags if tag == "script"]
    assert [a for a in scripts if a.get("type") not in ("application/json", "text/plain")] == [{}]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
    raw = (run.out / "report.html").read_text("utf-8")
    assert not [c for c in raw if not c.isprintable() and c not in "\n\xa0"]
    names = {row["name"] for row in json.loads(page.blocks["data"])["rows"]}
    assert "photo\\u202egnp.exe \\u2066x\\u2069.png" in names and HOSTILE[0] in names
    assert HOSTILE[0] in page.words and "a\\nb" in page.words


@given(st.text())
def test_escaped_text_comes_back_as_the_line_it_was(value: str) -> None:
    page = Reader(f'<p title="{text(value)}">{text(value)}</p>')
    assert [tag for tag, _ in page.tags] == ["p"]
    assert page.words == page.tags[0][1]["title"] and "\n" not in page.words


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_json_in_a_script_comes_back_and_cannot_end_it(value: object) -> None:
    said = script_json(value)
    assert json.loads(said) == value and "<" not in said and said.isascii()


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_links_lead_to_the_file_of_that_name(name: str) -> None:
    made = link(f"masks/{name}")
    assert re.fullmatch(r"[A-Za-z0-9._~/%-]*", made)
    assert unquote_to_bytes(made) == os.fsencode(f"masks/{name}")


def test_the_policy_allows_our_style_and_script_and_nothing_else(run: MadeUpRun) -> None:
    run.done("a")
    page = read(write_report(run.out).path)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and "unsafe" not in policy
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.blocks[kind].encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    links = [value for _, a in page.tags for name, value in a.items() if name in ("href", "src", "action", "srcset")]
    assert all(value and value.startswith("#") for value in links)
    assert not re.search(r"https?:|@import|url\(", page.blocks["style"] + page.blocks["script"])


def test_links_are_relative_to_where_the_page_is(run: MadeUpRun, tmp_path: Path) -> None:
    run.done("a b#%", {"overlay": "overlays/a b#%.jpg"})
    page = read(write_report(run.out, tmp_path / "elsewhere" / "page.html").path)
    links = json.loads(page.blocks["data"])["rows"][0]["links"]
    assert links == {"mask": "../out/masks/a%20b%23%25.png", "overlay": "../out/overlays/a%20b%23%25.jpg"}


def test_class_colours_are_the_masks(tmp_path: Path) -> None:
    palette = Palette(("glass", "gland"), ((1, 2, 3), (200, 100, 50)))
    run = MadeUpRun(tmp_path, palette)
    run.done("a")
    cohort = read_cohort(run.out)
    assert (cohort.classes, cohort.colours) == (palette.names, palette.colours)
    page = read(write_report(run.out).path)
    assert ".class-1{--class:rgb(200 100 50)}" in page.blocks["style"]
    assert "tumour-stroma" not in page.words  # it needs cancer and stroma
    (run.out / "masks" / "a.png").unlink()
    assert read_cohort(run.out).colours == (UNKNOWN_COLOUR,) * 2
    assert write_report(run.out).without_mask == 1


@given(st.binary(max_size=200))
def test_any_bytes_have_a_palette_or_none(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.png"
    path.write_bytes(data)
    for palette in (mask_palette, slide_palette):
        assert all(len(colour) == 3 for colour in palette(path, 3))


def test_nonsense_in_the_manifest_costs_its_line(run: MadeUpRun) -> None:
    run.done("good")
    nonsense = {
        "width": [0, -1, "5", 2**40, None, True],
        "pixels": [None, {}, {"background": 1}, {"background": 1200, "cancer": -1, "stroma": 1}],
        "mean_confidence": [2, float("nan"), float("inf"), "x"],
        "mask": ["../secret.png", "/etc/passwd", "masks/../../x.png", None, 5, "masks", "masks/\0"],
        "seconds": [{"read": "x"}, {"read": float("inf")}, 5],
        "warnings": [5],
        "status": ["", None, "skipped"],
    }
    count = 0
    for key, values in nonsense.items():
        for value in values:
            run.done(f"bad {count}", {key: value})
            count += 1
    with open(run.out / "manifest.jsonl", "a") as stream:
        stream.write('{"input": 5}\n[1]\nnot json\n' + "[" * 100_000 + '\n{"input": "torn"')
    run.end()
    cohort = read_cohort(run.out)
    assert [row.name for row in cohort.rows] == ["good"] and cohort.unreadable == count
    assert f"{count} lines of the manifest could not be understood" in read(write_report(run.out).path).words


def test_a_slide_of_clean_glass_is_a_row_without_a_confidence(run: MadeUpRun) -> None:
    run.done("glass", {"mean_confidence": None}, seed=1)
    run.done("tissue", seed=20)
    run.end()
    page = read(write_report(run.out).path)
    assert [row["confidence"] for row in json.loads(page.blocks["data"])["rows"]] == [None, 0.7]
    assert "median confidence70.0" in page.words and "could not be understood" not in page.words


def test_nothing_but_clean_glass(run: MadeUpRun) -> None:
    run.done("glass", {"mean_confidence": None})
    run.end()
    written = write_report(run.out)
    assert written.done == 1 and "confidence" not in read(written.path).words


def test_images_of_other_settings_are_left_out(run: MadeUpRun) -> None:
    run.done("old", {"key": "settings zero"})
    run.done("new")
    run.failed("bad", "no image")
    assert [row.name for row in read_cohort(run.out).rows] == ["bad", "new"]  # by the last line with a key
    run.end(key="settings zero")
    cohort = read_cohort(run.out)
    assert [row.name for row in cohort.rows] == ["bad", "old"] and cohort.others == 1
    assert "1 image of earlier runs" in read(write_report(run.out).path).words


def test_runs_that_did_not_end_well(run: MadeUpRun) -> None:
    assert "No image was finished." in read(write_report(run.out).path).words
    run.done("a")
    assert "or was cut off" in read(write_report(run.out).path).words
    run.end(interrupted=True)
    assert "The run was interrupted" in read(write_report(run.out).path).words
    for damage in (b"{", b"[]", b"\xff", b"[" * 100_000):
        (run.out / "run.json").write_bytes(damage)
        with pytest.raises(DataError, match=r"run\.json: is damaged"):
            write_report(run.out)


def test_strange_settings_are_shown_or_left_out(run: MadeUpRun) -> None:
    run.done("a")
    run.end(versions=5, arguments=None, wall_seconds=10**400, peak_rss_bytes="x", postprocess=[{"a": None}, True])
    words = read(write_report(run.out).path).words
    assert "none, yes" in words and "wall time" not in words and "peak memory" not in words


def test_only_failures(run: MadeUpRun) -> None:
    run.failed("a", "a: is no image")
    run.failed("b", "b: is no image")
    run.end()
    page = read(write_report(run.out).path)
    assert "2 images failed" in page.words and "median" not in page.words


def test_bins() -> None:
    assert charts.counts([0.0, 0.049, 0.05, 0.999, 1.0]) == [2, 1, *[0] * 16, 0, 2]


def test_what_cannot_be_written_leaves_nothing(run: MadeUpRun, tmp_path: Path) -> None:
    run.done("a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "file", tmp_path / "link")
    with pytest.raises(HistosegError, match="cannot be written"):
        write_report(run.out, tmp_path / "file" / "page.html")
    for name in ("folder", "pipe", "link"):  # a rename would put a file in the place of a device, too
        with pytest.raises(HistosegError, match="is no regular file"):
            write_report(run.out, tmp_path / name)
    assert (tmp_path / "folder").is_dir() and (tmp_path / "pipe").is_fifo()
    assert os.readlink(tmp_path / "link") == str(tmp_path / "file")
    assert not list(tmp_path.rglob("*.partial"))


def test_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing", Path(__file__)):
        with pytest.raises(UsageError, match=r"holds no run: there is no manifest\.jsonl"):
            write_report(folder)


def test_the_command(run: MadeUpRun, tmp_path: Path) -> None:
    run.done("a")
    run.done("b", seed=1)
    (run.images / "b.png").unlink()
    done = run_command("report", run.out, "-o", tmp_path / "p.html")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1
    assert done.stdout.startswith("2 done, 0 failed; 1 without the image (gone, changed or unreadable since the run); ")
    assert (tmp_path / "p.html").stat().st_size > 1000 and not (run.out / "report.html").exists()
    missing = run_command("report", tmp_path)
    assert missing.returncode == 2 and "holds no run" in missing.stderr and missing.stderr.count("\n") == 1
    assert run_command("report").returncode == 2
    (run.out / "run.json").write_text("{")
    damaged = run_command("report", run.out)
    assert damaged.returncode == 1 and damaged.stderr.count("\n") == 1


def test_a_real_run_and_the_same_one_killed(tiny_plan_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_pictures(tmp_path / "in", 3)
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    line = ("infer", "in", "--engine", tiny_plan_path, "--out", "out", "--overlay")
    assert run_command(*line, cwd=tmp_path).returncode == 3
    written = write_report(out)  # from another folder: where the images lie is in the manifest
    assert (written.done, written.failed, written.without_image, written.without_mask) == (3, 1, 0, 0)
    row = json.loads(read(written.path).blocks["data"])["rows"][1]
    assert row["links"] == {"mask": "masks/image_000.png", "overlay": "overlays/image_000.jpg"}
    make_pictures(tmp_path / "in", 60, 300, 300)
    with subprocess.Popen(command(*line), cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
        while (out / "run.json").exists() and child.poll() is None:
            time.sleep(0.001)
        child.kill()
    if child.returncode == 0:
        pytest.skip("the run ended before it could be killed")
    assert "or was cut off" in read(write_report(out).path).words


def test_help_stays_light() -> None:
    code = "import sys, histoseg_fast.cli; print([m for m in sys.modules if m.startswith('histoseg_fast.reporting')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
