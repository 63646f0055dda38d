"""What `infer` says for programs: JSON lines, whatever files are called; --metrics; --watch as a command."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import PATIENCE, command, entries, make_pictures, picture, run_command

from histoseg_fast.cli import log, main
from histoseg_fast.images import write_png

HOSTILE = ['"', "a\nb", "{}", "\x1b[31m", "\u2028", "a\udcffb", "back\\slash", "\x7f"]


def told(text: str) -> list[dict[str, Any]]:
    """Lines of stderr, each of which must be JSON as every reader takes it: no NaN, no lone surrogate."""

    def never(name: str) -> None:
        raise AssertionError(name)

    lines = [json.loads(line, parse_constant=never) for line in text.split("\n")[:-1]]
    for line in lines:
        assert isinstance(line, dict) and list(line)[:3] == ["time", "level", "event"] and "message" in line
        assert line["level"] in ("info", "warning", "error") and "\n" not in line["message"]
        json.dumps(line, ensure_ascii=False).encode("utf-8")
    return lines


def test_a_run_as_json_lines(tmp_path: Path, tiny_plan_path: Path) -> None:
    make_pictures(tmp_path / "in", 2)
    for name in HOSTILE:
        (tmp_path / "in" / f"{name}.png").write_bytes(b"no image")
    arguments = ["infer", tmp_path / "in", "--engine", tiny_plan_path, "--log-format", "json"]
    arguments += ["--out", tmp_path / "out", "--metrics", tmp_path / "run.prom"]
    run = run_command(*arguments)
    assert run.returncode == 3 and run.stdout == ""
    lines = told(run.stderr)
    assert [line["event"] for line in lines if line["event"] != "progress"] == [
        "start",
        *["failed"] * len(HOSTILE),
        "summary",
    ]
    names = {line["input"] for line in lines if line["event"] == "failed"}
    assert names == {f"{name}.png".replace("\udcff", "\\udcff") for name in HOSTILE}
    assert all("no image" in line["error"] or "PNG" in line["error"] for line in lines if line["event"] == "failed")
    start, summary = lines[0], lines[-1]
    assert start["images"] == 2 + len(HOSTILE) and start["device"] == "cpu" and start["precision"]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert all(summary[key] == value for key, value in record.items() if key not in ("arguments", "versions"))
    assert summary["exit_code"] == 3 and summary["images_per_second"] > 0 and summary["out"] == str(tmp_path / "out")
    assert 'histoseg_images{status="done",plan="tiny"' in (tmp_path / "run.prom").read_text()


def test_errors_of_the_whole_run_are_json_too(tmp_path: Path, tiny_plan_path: Path) -> None:
    run = run_command("infer", tmp_path / "no\nne", "--engine", tiny_plan_path, "--log-format", "json")
    (line,) = told(run.stderr)
    assert run.returncode == line["exit_code"] == 2 and line["event"] == "error" and "no such file" in line["message"]


@pytest.fixture
def infer(tiny_plan_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(*arguments: object) -> int:
        line = ["histoseg-fast", "infer", *map(str, arguments), "--engine", str(tiny_plan_path)]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as left:
            main()
        log.use("text")
        return left.value.code

    return run


def test_wrong_usage(infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pictures(tmp_path / "in", 1)
    for wrong, what in (
        (["--log-format", "xml"], "text or json"),
        (["--metrics", tmp_path / "x.txt"], ".prom"),
        (["--watch-idle", "3"], "--watch"),
        (["--watch", tmp_path / "in"], "one folder"),
    ):
        assert infer(tmp_path / "in", *wrong, "--out", tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert what in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@settings(max_examples=50, deadline=None)
@given(st.text(), st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.lists(st.text())))
def test_any_text_makes_one_json_line(text: str, fields: dict[str, Any]) -> None:
    fields = {key: value for key, value in fields.items() if key not in ("level", "event", "text")}
    stderr, stream = sys.stderr, io.StringIO()
    sys.stderr = stream
    try:
        log.use("json")
        log.write("info", "x", text, **fields)
    finally:
        log.use("text")
        sys.stderr = stderr
    assert stream.getvalue().count("\n") == 1 and stream.getvalue().isascii()
    told(stream.getvalue())


def test_warnings_of_libraries_are_json() -> None:
    code = (
        "import logging, warnings; from histoseg_fast.cli import log; log.use('json'); warnings.warn('two\\nlines');"
        "logging.getLogger('some.library').error('broken: %s', 'x\\ny'); log.use('text'); warnings.warn('as ever')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    lines, rest = run.stderr.split("\n", 2)[:2], run.stderr.split("\n", 2)[2]
    said = [(line["level"], line["event"]) for line in told("\n".join([*lines, ""]))]
    assert said == [("warning", "notice"), ("error", "notice")] and "UserWarning: as ever" in rest


@pytest.mark.slow
def test_watch_as_a_command(tmp_path: Path, tiny_plan_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    make_pictures(folder, 2)
    (folder / "bad.png").write_bytes(b"x")
    line = ["infer", folder, "--watch", "--engine", tiny_plan_path, "--out", out, "--log-format", "json"]
    with subprocess.Popen(command(*line), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + PATIENCE
        while not (out / "manifest.jsonl").exists() or len(entries(out)) < 3:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        assert run.poll() is None
        run.send_signal(signal.SIGTERM)
        said, errors = run.communicate(timeout=PATIENCE)
    lines = told(errors)
    assert run.returncode == 143 and said == "" and "Traceback" not in errors
    assert [x["event"] for x in lines if x["event"] != "progress"] == [
        *("start", "failed", "interrupted", "notice", "summary")
    ]
    assert lines[0]["images"] is None and lines[-1]["interrupted"] and lines[-1]["images_found"] == 3
    write_png(folder / "bad.png", picture(0, 20, 20))
    again = run_command(*line[:-2], "--watch-idle", "1")
    assert again.returncode == 0 and "1 done, 0 failed, 2 skipped" in again.stdout
    assert os.path.exists(out / "summary.csv")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("form", log.FORMATS)
def test_a_log_that_takes_no_more_ends_no_run(tmp_path: Path, tiny_plan_path: Path, form: str) -> None:
    make_pictures(tmp_path / "in", 3)
    (tmp_path / "in" / "bad.png").write_bytes(b"")
    arguments = command("infer", tmp_path / "in", "--engine", tiny_plan_path, "--out", tmp_path / "out")
    with open("/dev/full", "w") as full:
        assert subprocess.run([*arguments, "--log-format", form], stderr=full, timeout=PATIENCE).returncode == 3
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 3
