"""`merge`: shards' folders become what one run would have left, and everything that can be wrong with them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import entries, make_pictures, partials, picture, results, run_command

from histoseg_fast import files
from histoseg_fast.cli import main
from histoseg_fast.images import write_png
from histoseg_fast.pipeline import merge as module
from histoseg_fast.pipeline.merge import merge
from histoseg_fast.pipeline.records import Manifest

OF = 3
NAMES = ["image_000.png", "sp ace.png", "üml 'q\" $(touch oops) `x`;.png", "deep/new\nline.png", "-o.png", "zz_bad.png"]
Command = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `histoseg-fast ARGUMENTS...` in this process; its exit code."""

    def command(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["histoseg-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code

    return command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_plan_path: Path) -> Path:
    """A folder with images `in`, one of them damaged, their run `whole`, and their shards 1, 2, 3."""
    folder = tmp_path_factory.mktemp("made")
    for i, name in enumerate(NAMES):
        write_png(folder / "in" / name, picture(i, 30 + 9 * i, 40))
    (folder / "in" / NAMES[-1]).write_bytes(b"no image")
    arguments = ["infer", folder / "in", "--engine", tiny_plan_path, "--overlay", "--probabilities", "--geojson"]
    outs = {"whole": (), **{str(i): ("--shard", f"{i}/{OF}") for i in range(1, OF + 1)}}
    codes = [run_command(*arguments, "--out", folder / out, *options).returncode for out, options in outs.items()]
    assert sorted(codes) == [0, 0, 3, 3]
    return folder


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> list[Path]:
    """Copies of the three shards' folders."""
    return [Path(shutil.copytree(made / str(i), tmp_path / str(i))) for i in range(1, OF + 1)]


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


def change_record(out: Path, **changes: object) -> None:
    (out / "run.json").write_text(json.dumps(record(out) | changes))


def change_entry(out: Path, name: str, **changes: object) -> None:
    """Append a changed line of one image."""
    with open(out / "manifest.jsonl", "a") as stream:
        stream.write(json.dumps(entries(out)[name] | changes) + "\n")


def first_done(out: Path) -> str:
    return next(name for name, entry in entries(out).items() if entry["status"] == "done")


# -- as one run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_result_is_that_of_one_run(shards, made, tmp_path, run, capsys, order: tuple[int, ...]) -> None:
    out = tmp_path / "all"
    assert run("merge", *(shards[i] for i in order), "-o", out) == 3  # one input failed
    said = capsys.readouterr()
    assert results(out) == results(made / "whole")
    assert said.out.startswith("5 done, 1 failed, of 3 shard(s); 20 file(s) linked, 0 copied, 0 there before;")
    assert said.out.count("\n") == said.err.count("\n") == 1 and "zz_bad.png: is not a PNG" in said.err
    inodes = {os.stat(path).st_ino for shard in shards for path in shard.rglob("*.png")}
    assert {os.stat(path).st_ino for path in (out / "masks").rglob("*.png")} <= inodes
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [line["input"] for line in lines] == sorted(NAMES)
    assert {line["input"]: line for line in lines} == {k: v for shard in shards for k, v in entries(shard).items()}
    assert not partials(out)


def test_the_run_json_adds_up(shards: list[Path], made: Path, tmp_path: Path) -> None:
    merge(shards, tmp_path / "all")
    mine, whole = record(tmp_path / "all"), record(made / "whole")
    same = ("key", "plan", "plan_sha256", "classes", "device", "engine", "precision", "postprocess", "megapixels")
    same += ("images_found", "images_done", "images_failed", "images_skipped", "interrupted", "glass_megapixels")
    assert {name: mine[name] for name in same} == {name: whole[name] for name in same}
    assert mine.keys() == whole.keys() | {"shards", "shards_missing"} and mine["shard"] is None
    parts = [record(shard) for shard in shards]
    assert mine["wall_seconds"] == pytest.approx(sum(part["wall_seconds"] for part in parts), abs=0.01)
    assert mine["peak_rss_bytes"] == max(part["peak_rss_bytes"] for part in parts)
    for stage, seconds in mine["stage_seconds"].items():
        assert seconds == pytest.approx(sum(part["stage_seconds"][stage] for part in parts), abs=0.01)
    assert [(part["shard"], part["out"]) for part in mine["shards"]] == [
        (f"{i + 1}/{OF}", str(shard)) for i, shard in enumerate(shards)
    ]
    assert mine["shards_missing"] == [] and mine["arguments"]["out"] == str(tmp_path / "all")


def test_a_second_merge_changes_no_byte(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "all"
    merge(shards, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = merge(shards[::-1], out)
    assert again.files == {"kept": 20} and before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    mask = next((out / "masks").rglob("*.png"))
    mask.unlink()
    mask.write_bytes(b"broken")
    assert merge(shards, out).files == {"kept": 19, "linked": 1}
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_run_into_the_merged_folder_has_nothing_to_do_and_report_reads_it(
    shards: list[Path], made: Path, tmp_path: Path, tiny_plan_path: Path, run: Command, capsys
) -> None:
    out = tmp_path / "all"
    merge(shards, out)
    arguments = ("infer", made / "in", "--engine", tiny_plan_path, "--overlay", "--probabilities", "--geojson")
    assert run(*arguments, "--out", out) == 3
    assert (record(out)["images_done"], record(out)["images_skipped"]) == (0, 5)
    assert merge(shards, out).files == {"kept": 20}
    capsys.readouterr()
    assert run("report", out) == 0
    assert capsys.readouterr().out.startswith("5 done, 1 failed; ")


def test_the_shard_is_not_in_the_key(made: Path, tmp_path: Path, tiny_plan_path: Path, run: Command) -> None:
    """What is finished in a folder stays so under any other shard."""
    folder = Path(shutil.copytree(made / "whole", tmp_path / "out"))
    arguments = ("infer", made / "in", "--engine", tiny_plan_path, "--overlay", "--probabilities", "--geojson")
    skipped = 0
    for number in (1, 2):
        run(*arguments, "--out", folder, "--shard", f"{number}/2")
        assert record(folder)["images_done"] == 0 and record(folder)["shard"]["of"] == 2
        skipped += record(folder)["images_skipped"]
    assert skipped == 5 and record(folder)["key"] == record(made / "whole")["key"]
    assert results(folder) == results(made / "whole")


def test_an_empty_shard_is_a_success(made: Path, tmp_path: Path, tiny_plan_path: Path, run: Command) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(made / "in" / NAMES[0], tmp_path / "in")
    outs = [tmp_path / f"out {i}" for i in range(1, 4)]
    for i, out in enumerate(outs, 1):
        assert run("infer", tmp_path / "in", "--engine", tiny_plan_path, "--out", out, "--shard", f"{i}/3") == 0
        assert record(out)["images_found"] == 1 and record(out)["images_done"] == (i == 1)
    assert run("infer", tmp_path / "in", "--engine", tiny_plan_path, "--out", tmp_path / "whole") == 0
    assert run("merge", *outs, "-o", tmp_path / "all") == 0
    assert results(tmp_path / "all") == results(tmp_path / "whole")
    assert run("report", tmp_path / "all") == run("report", outs[2]) == 0
    assert run("infer", tmp_path / "none", "--engine", tiny_plan_path, "--out", tmp_path / "x", "--shard", "1/2") == 2


def test_shards_in_a_folder_of_their_cohort_or_of_the_result(made, tmp_path, tiny_plan_path, run) -> None:
    """Neither listing nor merging takes one shard's files for another's."""
    data = Path(shutil.copytree(made / "in", tmp_path / "in"))
    (data / NAMES[-1]).unlink()
    outs = [data / "out" / "shards" / str(i) for i in range(1, 4)]
    for i, out in enumerate(outs, 1):
        assert run("infer", data, "--engine", tiny_plan_path, "--out", out, "--overlay", "--shard", f"{i}/3") == 0
    half_written = outs[0] / "masks" / ".x.png.0123456789abcdef.partial"
    half_written.parent.mkdir(exist_ok=True)
    half_written.touch()
    assert run("merge", *outs, "-o", data / "out") == 0
    assert half_written.exists()  # another run's, which may be going on
    assert record(data / "out")["images_done"] == 5


# -- links and copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(files.NO_LINK_ERRNO))
def test_where_there_can_be_no_link_it_is_a_copy(shards, made, tmp_path, monkeypatch, code: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    assert merge(shards, tmp_path / "all").files == {"copied": 20}
    assert results(tmp_path / "all") == results(made / "whole") and not partials(tmp_path / "all")
    inodes = {os.stat(path).st_ino for shard in shards for path in shard.rglob("*") if path.is_file()}
    assert not inodes & {os.stat(path).st_ino for path in (tmp_path / "all").rglob("*") if path.is_file()}


def test_links_are_copied_from_and_linked_folders_read(shards: list[Path], made: Path, tmp_path: Path) -> None:
    """Workflow engines hand results on as links."""
    stage = tmp_path / "stage"
    stage.mkdir()
    for i, shard in enumerate(shards):
        (stage / str(i)).symlink_to(shard, target_is_directory=True)
    name = first_done(shards[0])
    mask = shards[0] / entries(shards[0])[name]["mask"]
    mask.rename(tmp_path / "elsewhere")
    mask.symlink_to(tmp_path / "elsewhere")
    assert merge(sorted(stage.iterdir()), tmp_path / "all").files == {"linked": 19, "copied": 1}
    assert results(tmp_path / "all") == results(made / "whole")
    assert not any(path.is_symlink() for path in (tmp_path / "all").rglob("*"))


def test_an_output_that_changed_or_is_gone_makes_a_failed_image(shards, tmp_path, run, capsys) -> None:
    changed, gone = first_done(shards[0]), first_done(shards[1])
    path = shards[0] / entries(shards[0])[changed]["overlay"]
    path.write_bytes(path.read_bytes() + b"x")
    (shards[1] / entries(shards[1])[gone]["mask"]).unlink()
    out = tmp_path / "all"
    assert run("merge", *shards, "-o", out) == 3
    said = capsys.readouterr()
    assert said.out.startswith("3 done, 3 failed") and said.err.count("\n") == 3 and not partials(out)
    assert "is not what the run wrote; run shard 1/3 again" in entries(out)[changed]["error"]
    assert "is missing; run shard 2/3 again" in entries(out)[gone]["error"]
    assert not (out / "overlays" / path.name).exists() and record(out)["images_failed"] == 3
    assert len((out / "summary.csv").read_bytes().splitlines()) == 4


@pytest.mark.parametrize("linking", [True, False])
def test_what_changes_between_look_and_link_is_found(shards, tmp_path, monkeypatch, linking: bool) -> None:
    real, name = os.link, first_done(shards[0])

    def link(source: Path, target: Path) -> None:
        if source == shards[0] / entries(shards[0])[name]["mask"]:
            source.write_bytes(b"changed just now")
        if not linking:
            raise OSError(errno.EXDEV, "other disk")
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    merged = merge(shards, tmp_path / "all")
    assert [entry["input"] for entry in merged.failed] == sorted([name, NAMES[-1]])
    assert not partials(tmp_path / "all")


# -- gaps ----------------------------------------------------------------------------------------------


def test_missing_shards_are_told(shards: list[Path], tmp_path: Path, run: Command, capsys) -> None:
    done = sum(entry["status"] == "done" for entry in entries(shards[1]).values())
    assert run("merge", shards[1], "-o", tmp_path / "all") == 3
    said = capsys.readouterr()
    lacking = len(NAMES) - len(entries(shards[1]))
    assert f"2 of 3 shards missing: 1/3, 3/3\n{lacking} of 6 images are in none of the folders\n" in said.err
    assert said.out.startswith(f"{done} done") and record(tmp_path / "all")["shards_missing"] == [1, 3]
    assert run("merge", *shards, "-o", tmp_path / "all") == 3  # filled up later
    assert record(tmp_path / "all")["shards_missing"] == [] and record(tmp_path / "all")["images_done"] == 5


def test_interrupted_shards_and_inputs_that_came_or_went_are_told(shards: list[Path], tmp_path: Path) -> None:
    change_record(shards[0], interrupted=True)
    change_record(shards[1], images_found=8)
    merged = merge(shards, tmp_path / "all")
    assert merged.gaps == [
        f"shard 1/3 was interrupted; run it again into {shards[0]}",
        "the shards found 6 to 8 images: some came or went while they started",
        "2 of 8 images are in none of the folders",
    ]
    assert record(tmp_path / "all")["interrupted"] is True


# -- refusals ------------------------------------------------------------------------------------------


def another_plan(shards: list[Path]) -> None:
    change_record(shards[1], key="other", plan="new", plan_sha256="f" * 64)


def other_options(shards: list[Path]) -> None:
    arguments = record(shards[1])["arguments"] | {"overlay": False, "tile": 999, "threads": 3}
    change_record(shards[1], key="other", arguments=arguments)


REFUSALS: dict[str, tuple[Callable[[list[Path]], object], int, str]] = {
    "plan": (another_plan, 2, r"runs: plan tiny \([0-9a-f]{12}\) and new \(ffffffffffff\); run all"),
    "options": (other_options, 2, "of different runs: overlay True and False; run all shards"),
    "precision": (lambda s: change_record(s[1], key="k", precision="bf16"), 2, "runs: precision fp32 and bf16;"),
    "device": (lambda s: change_record(s[2], key="k", device="cuda:1"), 2, "runs: device cpu and cuda:1;"),
    "classes": (lambda s: change_record(s[2], classes=["a"]), 2, "of different runs"),
    "number of shards": (lambda s: change_record(s[2], shard={"number": 3, "of": 4}), 2, r"is shard 1/3, .* is 3/4"),
    "a shard twice": (lambda s: change_record(s[2], shard={"number": 1, "of": 3}), 2, "are both shard 1/3"),
    "goes on": (lambda s: (s[1] / "run.json").unlink(), 1, "its run goes on, or was cut off; let it end"),
    "no run": (lambda s: (s[1] / "manifest.jsonl").unlink(), 2, "holds no run: there is no manifest.jsonl"),
    "damaged": (lambda s: (s[1] / "run.json").write_bytes(b"{"), 1, "run.json: is damaged; run infer"),
    "nonsense": (lambda s: change_record(s[1], images_found=-1), 1, "run.json: is damaged, or of an older version"),
    "nonsense, shard": (lambda s: change_record(s[1], shard={"number": 9, "of": 3}), 1, "is damaged, or of an older"),
    "nonsense, classes": (lambda s: change_record(s[1], classes=[3]), 1, "run.json: is damaged, or of an older"),
    "older": (lambda s: change_record(s[1], classes=None), 1, "run.json: is damaged, or of an older version"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_no_set_of_shards_is_refused_in_one_line(shards, tmp_path, run, capsys, what: str) -> None:
    spoil, code, told = REFUSALS[what]
    spoil(shards)
    assert run("merge", *shards, "-o", tmp_path / "all") == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(told, said), said
    assert not (tmp_path / "all").exists()


def test_results_of_other_files_under_one_name_are_refused(shards, tmp_path, run, capsys) -> None:
    name = first_done(shards[0])
    entry = entries(shards[0])[name] | {"sha256": "0" * 64}
    with open(shards[2] / "manifest.jsonl", "a") as stream:
        stream.write(json.dumps(entry) + "\n")
    assert run("merge", *shards, "-o", tmp_path / "all") == 2
    said = capsys.readouterr().err
    assert "hold results of different files called" in said and said.count("\n") == 1


def test_an_image_in_two_shards_counts_once_and_with_its_result(shards, made, tmp_path) -> None:
    """As after shards were dealt anew into the same folders."""
    name = first_done(shards[0])
    entry = entries(shards[0])[name]
    for kind in ("mask", "overlay", "probabilities", "geojson"):
        target = shards[2] / entry[kind]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shards[0] / entry[kind], target)
    with open(shards[2] / "manifest.jsonl", "a") as stream:
        stream.write(json.dumps(entry) + "\n")
    change_entry(shards[0], name, status="failed", error="out of memory")
    merge(shards, tmp_path / "all")
    assert results(tmp_path / "all") == results(made / "whole")


def test_a_manifest_cannot_name_files_elsewhere(shards: list[Path], tmp_path: Path) -> None:
    name = first_done(shards[0])
    secret = tmp_path / "secret"
    secret.write_bytes(b"not yours")
    digest = hashlib.sha256(b"not yours").hexdigest()
    for path in ("../secret", str(secret), "masks/../../secret", "run.json", "masks", "masks/\0"):
        change_entry(shards[0], name, mask=path, mask_sha256=digest)
        merged = merge(shards, tmp_path / "all")
        assert "names no mask" in {e["input"]: e for e in merged.failed}[name]["error"]
    assert not [path for path in (tmp_path / "all").rglob("*") if path.is_file() and path.read_bytes() == b"not yours"]


@pytest.mark.parametrize(
    "changes", [{"pixels": None}, {"pixels": {}}, {"pixels": {"background": "x"}}, {"width": None}, {"height": "40"},
                {"glass_pixels": -1}, {"mpp": "wide"}, {"mean_confidence": "high"},
                {"pixels": {"background": 0, "cancer": 0, "stroma": 0}}]
)  # fmt: skip
def test_a_damaged_line_costs_its_image(shards: list[Path], tmp_path: Path, changes: dict[str, object]) -> None:
    name = first_done(shards[0])
    change_entry(shards[0], name, **changes)
    merged = merge(shards, tmp_path / "all")
    assert "its line in the manifest is damaged" in {e["input"]: e for e in merged.failed}[name]["error"]


def test_figures_that_make_no_sense_count_as_none(shards: list[Path], tmp_path: Path) -> None:
    change_record(shards[0], peak_rss_bytes=float("inf"), wall_seconds="long", stage_seconds=[])
    change_entry(shards[1], first_done(shards[1]), seconds={"read": float("nan")})
    merge(shards, tmp_path / "all")
    mine = record(tmp_path / "all")
    assert mine["peak_rss_bytes"] == max(record(shard)["peak_rss_bytes"] for shard in shards[1:])
    assert 0 < mine["wall_seconds"] < 1e6 and mine["stage_seconds"] == {}


def test_where_the_result_may_not_go(shards, tmp_path, run, capsys, made) -> None:
    theirs, other = tmp_path / "theirs", Path(shutil.copytree(made / "whole", tmp_path / "other"))
    (theirs / "masks").mkdir(parents=True)
    change_entry(other, NAMES[0], input="not in any shard")
    blocked = tmp_path / "blocked"
    blocked.write_bytes(b"")
    using = Manifest(tmp_path / "used")
    cases = [(shards[0], 2, "is one of the shards"), (theirs, 2, "holds masks that no run wrote"),
             (other, 2, "holds results of 1 image(s) that no shard has, as not in any shard"),
             (tmp_path / "used", 2, "another run is writing here"), (blocked, 1, "cannot be written")]  # fmt: skip
    before = results(other), record(other)
    for out, code, told in cases:
        assert run("merge", *shards, "-o", out) == code
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1
    assert (results(other), record(other)) == before
    using.close()
    assert run("merge", "-o", tmp_path / "all") == run("merge", *shards) == 2


# -- faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 7, 20])
def test_a_merge_that_is_cut_off_is_finished_by_the_next(
    shards, made, tmp_path, monkeypatch, run, fault, after
) -> None:
    real, out, calls = os.replace, tmp_path / "all", []

    def replace(source: object, target: object) -> None:
        calls.append(target)
        if len(calls) > after:
            raise fault
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert run("merge", *shards, "-o", out) == (130 if isinstance(fault, KeyboardInterrupt) else 1)
    monkeypatch.undo()
    assert not (out / "run.json").exists() and not partials(out)
    merged = merge(shards, out)
    assert results(out) == results(made / "whole") and merged.files["kept"] <= after and record(out)["images_done"] == 5


def test_a_killed_merge_leaves_a_folder_that_the_next_one_takes(shards, made, tmp_path, monkeypatch) -> None:
    out = tmp_path / "all"

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        (out / "masks" / ".a.png.0123456789abcdef.partial").write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "write_summary", kill)
        merge(shards, out)
    assert partials(out) and not (out / "run.json").exists()
    merge(shards, out)
    assert results(out) == results(made / "whole") and not partials(out)


def test_many_images(tmp_path: Path, tiny_plan_path: Path, run: Command) -> None:
    make_pictures(tmp_path / "in", 60, 12, 16)
    outs = [tmp_path / str(i) for i in range(1, 6)]
    for i, out in enumerate(outs, 1):
        assert run("infer", tmp_path / "in", "--engine", tiny_plan_path, "--out", out, "--shard", f"{i}/5") == 0
        assert record(out)["images_done"] == 12
    assert run("infer", tmp_path / "in", "--engine", tiny_plan_path, "--out", tmp_path / "whole") == 0
    assert run("merge", *outs, "-o", tmp_path / "all") == 0
    assert results(tmp_path / "all") == results(tmp_path / "whole")
