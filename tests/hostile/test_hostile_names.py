"""Names made to harm whoever prints, writes or searches them: line breaks, terminal codes, HTML, no UTF-8, links."""

from __future__ import annotations

import csv
import html.parser
import json
import os
from pathlib import Path

import pytest
from children import fake_engine, run_child
from running import entries, make_pictures, partials, results

from histoseg_fast.pipeline.sources import find_sources

NAMES = [
    b"new\nline.png",
    b"carriage\rreturn.png",
    b"failed: forged\nhistoseg-fast: all is well.png",
    b"\x1b[2J\x1b]0;owned\x07.png",
    "right\u202eto left gnp.png".encode(),
    b"bad\xff\xfeutf8.png",
    b'it\'s "quoted" `touch x` $(touch x).png',
    b"<img src=x onerror=alert(1)>.png",
    b"<script>alert(1)<&#47;script>.png",
    b"'\"><svg onload=alert(1)>.png",
    b"]]><!--.png",
    b"--help.png",
    b"-rf.png",
    b"percent %s %n %2e%2e%2f.png",
    b"=cmd|' !A1,\t;.png",
    b"a..png.png",
    b"back\\slash.png",
    b"*.png",
    b"[a].png",
    b"x" * 240 + b".png",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image of each name, and a damaged one beside it."""
    folder = tmp_path / "in"
    data = make_pictures(tmp_path / "plain", 1, 40, 50)[0].read_bytes()
    for kind in ("good", "bad"):
        (folder / kind).mkdir(parents=True)
        for name in NAMES:
            with open(os.path.join(os.fsencode(folder / kind), name), "wb") as stream:
                stream.write(data if kind == "good" else data[:60])
    return folder


class Page(html.parser.HTMLParser):
    """Tags of a page that may do something, and attributes that are code."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, value in attributes if name.startswith("on") or "alert" in (value or "")]


def test_names_forge_nothing_on_the_way_from_the_folder_to_the_report(tmp_path: Path, tiny_plan_path, folder) -> None:
    out = tmp_path / "out"
    wanted = ("--overlay", "--probabilities", "--geojson", "--out", out)
    ended = run_child(tmp_path, "infer", folder, "--engine", tiny_plan_path, *wanted, fault=fake_engine)
    assert ended.code == 3 and f"{len(NAMES)} done, {len(NAMES)} failed, 0 skipped" in ended.out
    assert len(ended.errors) == len(NAMES) and ended.out.count("\n") == 1
    for line in ended.errors:
        assert line.startswith(f"failed: {folder}/bad/") and line.isprintable()
    expected = {f"{kind}/{os.fsdecode(name)}" for kind in ("good", "bad") for name in NAMES}
    assert set(entries(out)) == expected and len((out / "manifest.jsonl").read_bytes().splitlines()) == len(expected)
    for kind, suffix in (("masks", ".png"), ("overlays", ".jpg"), ("probabilities", ".tif"), ("geojson", ".geojson")):
        made = sorted(os.listdir(os.fsencode(out / kind / "good")))
        assert made == sorted(name.removesuffix(b".png") + suffix.encode() for name in NAMES)
    with open(out / "summary.csv", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["image"] for row in rows] == sorted(f"good/{os.fsdecode(name)}" for name in NAMES)
    before = results(out)
    ended = run_child(tmp_path, "report", out)
    assert ended.code == 0 and ended.out.count("\n") == 1 and not ended.errors
    text = (out / "report.html").read_text("utf-8")
    page = Page(text)
    assert page.tags.count("script") == 2 + len(NAMES) and "svg" in page.tags and not page.handlers
    assert not any(tag in text for tag in ("<img src=x", "<svg onload", "<script>alert", "\x1b", "\u202eto"))
    again = run_child(tmp_path, "infer", folder, "--engine", tiny_plan_path, *wanted, fault=fake_engine)
    assert f"0 done, {len(NAMES)} failed, {len(NAMES)} skipped" in again.out
    assert {name: data for name, data in results(out).items() if name != "report.html"} == before
    assert not (Path.cwd() / "x").exists() and not partials(tmp_path)


def test_a_name_too_long_for_its_outputs_costs_its_image(tmp_path: Path, tiny_plan_path: Path) -> None:
    data = make_pictures(tmp_path / "in", 1)[0].read_bytes()
    (tmp_path / "in" / ("y" * 251 + ".png")).write_bytes(data)
    arguments = (tmp_path / "in", "--engine", tiny_plan_path, "--geojson", "--out", tmp_path / "out")
    ended = run_child(tmp_path, "infer", *arguments, fault=fake_engine)
    assert ended.code == 3 and len(ended.errors) == 1 and "File name too long" in ended.errors[0]
    assert "1 done, 1 failed" in ended.out and not partials(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "masks").iterdir()] == ["image_000.png"]


# -- links --------------------------------------------------------------------------------------------


def test_links_to_files_are_read_and_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    """A link to an image is an image, wherever it lies: cohorts are often folders of links. It is called by its own
    name. A link to a folder is passed over, so no search leaves its folder or goes in circles.
    """
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    make_pictures(elsewhere, 2)
    folder.mkdir()
    (folder / "linked.png").symlink_to(elsewhere / "image_001.png")
    (folder / "outside").symlink_to(elsewhere)
    (folder / "up").symlink_to(tmp_path)
    (folder / "round.png").symlink_to(folder / "round.png")
    (folder / "folder.png").symlink_to(elsewhere)
    assert [source.name for source in find_sources([str(folder)], tmp_path / "out")] == ["linked.png", "round.png"]
    named = find_sources([str(folder / "outside")], tmp_path / "out")  # named by the user, it is searched
    assert [source.name for source in named] == ["image_000.png", "image_001.png"]


def test_links_to_what_is_no_image_cost_themselves(tmp_path: Path, tiny_plan_path: Path) -> None:
    """Devices, pipes and memory are not opened; of a secret not a byte is told."""
    secret = tmp_path / "secret"
    secret.write_text("correct horse battery staple")
    folder = tmp_path / "in"
    plain = make_pictures(folder, 2)[0].read_bytes()
    os.mkfifo(tmp_path / "pipe")
    targets = {"zero": "/dev/zero", "memory": "/proc/self/mem", "pipe": tmp_path / "pipe", "secret": secret}
    for name, target in targets.items():
        (folder / f"{name}.png").symlink_to(target)
    (folder / "round.png").symlink_to("round.png")
    out = tmp_path / "out"
    ended = run_child(tmp_path, "infer", folder, "--engine", tiny_plan_path, "--out", out, fault=fake_engine)
    assert ended.code == 3 and "2 done, 5 failed" in ended.out and len(ended.errors) == 5
    assert "horse" not in ended.err + json.dumps(entries(out))
    assert sorted(path.name for path in (out / "masks").iterdir()) == ["image_000.png", "image_001.png"]
    assert (folder / "image_000.png").read_bytes() == plain


def test_a_link_in_the_input_to_the_results_is_no_way_around(tmp_path: Path, tiny_plan_path: Path) -> None:
    """Results are not read as input of the run that writes them, by whatever way."""
    folder, out = tmp_path / "in", tmp_path / "out"
    make_pictures(folder, 2)
    arguments = ("--engine", tiny_plan_path, "--out", out)
    assert run_child(tmp_path, "infer", folder, *arguments, fault=fake_engine).code == 0
    (folder / "masks").symlink_to(out / "masks")
    (tmp_path / "way").symlink_to(out / "masks")
    again = run_child(tmp_path, "infer", folder, *arguments, fault=fake_engine)
    assert again.code == 0 and "0 done, 0 failed, 2 skipped" in again.out
    refused = run_child(tmp_path, "infer", tmp_path / "way", *arguments, fault=fake_engine)
    assert refused.code == 2 and "holds results of this very --out" in refused.err


def test_a_manifest_leads_the_report_nowhere_else(tmp_path: Path, tiny_plan_path: Path) -> None:
    """Of a folder from somebody else: files outside are not linked to; an image is shown only if it is the one of the
    digest, which whoever wrote the manifest knew anyway.
    """
    make_pictures(tmp_path / "in", 1)
    out = tmp_path / "out"
    arguments = ("infer", tmp_path / "in", "--engine", tiny_plan_path, "--out", out)
    assert run_child(tmp_path, *arguments, fault=fake_engine).code == 0
    (entry,) = entries(out).values()
    other = make_pictures(tmp_path / "other", 2)[1]
    for change in ({"mask": "../other/image_001.png"}, {"mask": "/etc/passwd"}, {"path": str(other)}):
        (out / "manifest.jsonl").write_text(json.dumps(entry | change) + "\n")
        assert run_child(tmp_path, "report", out).code == 0
        text = (out / "report.html").read_text()
        assert "other/image_001" not in text and "etc/passwd" not in text and "/9j/" not in text  # base64 of a JPEG
