"""The experiments command: four trainings, two tables, resumable."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from data_folders import easy_pair, write_folder

from histoseg_fast import cli
from histoseg_fast.training import experiments


@pytest.fixture
def data(tmp_path: Path) -> Path:
    import numpy as np

    rng = np.random.default_rng(4)
    names = {"a": "train", "b": "train", "c": "val", "d": "test"}
    return write_folder(tmp_path / "data", {name: easy_pair(rng, 16, 16) for name in names}, names)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["histoseg-fast", "experiments", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_tables_curves_and_resume(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(experiments, "PAPER_ARCHITECTURES", ("one", "final"))  # the other two only take time
    arguments = (data, "--out", tmp_path / "out", "--epochs", 1, "--crop", 16, "--weights", "none")
    assert run(monkeypatch, *arguments) == 0
    record = json.loads((tmp_path / "out" / "experiments.json").read_text())
    assert list(record["table_1"]) == ["one", "final"] and list(record["table_2"]) == ["train", "val", "test"]
    assert record["table_2"]["val"] == record["table_1"]["final"] and record["table_2"]["train"]["images"] == 2
    text = (tmp_path / "out" / "tables.md").read_text()
    loss = record["table_1"]["one"]["cross_entropy"]
    assert f"| one | 0.849 | {loss:.3f} |" in text and "| test | 0.685 |" in text
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    kept = (tmp_path / "out" / "one" / "last.safetensors").read_bytes()
    assert run(monkeypatch, *arguments) == 0
    assert "resuming after epoch 1" in capsys.readouterr().out
    assert (tmp_path / "out" / "one" / "last.safetensors").read_bytes() == kept
    assert json.loads((tmp_path / "out" / "experiments.json").read_text()) == record
