"""Runs that are interrupted, or killed, and taken up again by the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from running import PATIENCE, command, make_pictures, partials, results, run_command

from histoseg_fast.cli import main

IMAGES = 40


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_plan_path: Path) -> tuple[list[object], Path]:
    """Arguments of a run that takes a while, and the folder of one that was left alone."""
    folder = tmp_path_factory.mktemp("interrupt")
    make_pictures(folder / "in", IMAGES, 400, 420)  # several bands each: a stop falls inside an image
    arguments = [
        "infer",
        folder / "in",
        "--engine",
        tiny_plan_path,
        "--overlay",
        "--geojson",
        "--probabilities",
        "--out",
    ]
    assert run_command(*arguments, folder / "plain").returncode == 0
    return arguments, folder / "plain"


def lines(out: Path) -> int:
    manifest = out / "manifest.jsonl"
    return manifest.read_bytes().count(b"\n") if manifest.exists() else 0


def start_and_send(arguments: Sequence[object], out: Path, numbers: Sequence[int]) -> tuple[int, str]:
    """Start a run, send it signals once three images are done; its exit code and stderr."""
    with subprocess.Popen(command(*arguments, out), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + PATIENCE
        while lines(out) < 3 and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.005)
        assert run.poll() is None, run.communicate()
        for number in numbers:
            run.send_signal(number)
            time.sleep(0.02)
        _, said = run.communicate(timeout=PATIENCE)
        return run.returncode, said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_finishes_what_is_in_flight_and_resumes(
    plain: tuple[list[object], Path], tmp_path: Path, number: int
) -> None:
    arguments, undisturbed = plain
    out = tmp_path / "out"
    code, said = start_and_send(arguments, out, [number])
    assert code == 128 + number and "Traceback" not in said
    assert "run the same command again" in said
    record = json.loads((out / "run.json").read_text())
    assert record["interrupted"] is True and 3 <= record["images_done"] < IMAGES
    assert not partials(out) and lines(out) == record["images_done"]
    assert len(list((out / "masks").iterdir())) == record["images_done"]
    run = run_command(*arguments, out)
    assert run.returncode == 0
    assert f"{IMAGES - record['images_done']} done, 0 failed, {record['images_done']} skipped" in run.stdout
    assert results(out) == results(undisturbed)


@pytest.mark.parametrize("numbers", [[signal.SIGKILL], [signal.SIGINT, signal.SIGINT]])
def test_a_killed_run_resumes(plain: tuple[list[object], Path], tmp_path: Path, numbers: list[int]) -> None:
    """Killed outright, or by a second Ctrl-C: half-written files may stay, under names that the next run removes."""
    arguments, undisturbed = plain
    code, _ = start_and_send(arguments, tmp_path / "out", numbers)
    # The second Ctrl-C may also come when Python itself is going; for a shell both are 130.
    assert code in ((-signal.SIGKILL,) if numbers == [signal.SIGKILL] else (130, -signal.SIGINT))
    with open(tmp_path / "out" / "manifest.jsonl", "ab") as manifest:
        manifest.write(b'{"input": "image_039.png", "status": "do')
    run = run_command(*arguments, tmp_path / "out")
    assert run.returncode == 0 and " 0 skipped" not in run.stdout
    assert results(tmp_path / "out") == results(undisturbed) and not partials(tmp_path / "out")


def test_a_reader_of_the_output_that_has_gone_costs_no_result(plain: tuple[list[object], Path], tmp_path: Path) -> None:
    arguments, undisturbed = plain
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        command(*arguments, tmp_path / "out"), stdout=write, stderr=subprocess.PIPE, text=True, timeout=PATIENCE
    )
    os.close(write)
    assert run.returncode == 1 and "Traceback" not in run.stderr and "ignored" not in run.stderr
    assert results(tmp_path / "out") == results(undisturbed)


def test_ctrl_c_before_the_stream_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    from histoseg_fast import plans

    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plans, "open_plan", interrupt)
    monkeypatch.setattr(sys, "argv", ["histoseg-fast", "infer", "a.png", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 130 and "Traceback" not in capsys.readouterr().err
