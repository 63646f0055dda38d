"""The file for Prometheus: what its own parser reads in it, when it is written, and what happens where it cannot be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoseg_fast.errors import UsageError
from histoseg_fast.pipeline import metrics as metrics_module
from histoseg_fast.pipeline.metrics import MetricsFile, render
from histoseg_fast.pipeline.totals import STAGES, Totals

parser = pytest.importorskip("prometheus_client.parser")
ENGINE: Any = SimpleNamespace(precision="int8")


def read(text: str) -> dict[tuple[str, str], float]:
    """Every sample as Prometheus sees it, by name and the value of its own label; all have the run's labels."""
    found = {}
    for family in parser.text_string_to_metric_families(text):
        assert family.documentation and family.type in ("gauge", "counter")
        for sample in family.samples:
            own = {key: value for key, value in sample.labels.items() if key not in ("plan", "precision")}
            assert {"plan", "precision"} <= set(sample.labels) and len(own) <= 1
            found[sample.name, next(iter(own.values()), "")] = sample.value
    return found


def stream_of(totals: Totals) -> Any:
    return SimpleNamespace(totals=totals)


def test_what_prometheus_reads() -> None:
    seconds = dict(zip(STAGES, (0.1, 2.5, 1e-7, 12345678.9), strict=True))
    totals = Totals(done=3, failed=1, skipped=2, pixels=10**13, stage_seconds=seconds)
    found = read(render(totals, {"plan": "fast", "precision": "int8"}, 1795604247.48))
    assert found.pop(("histoseg_pixels_total", "")) == 10**13
    assert found.pop(("histoseg_last_success_timestamp_seconds", "")) == 1795604247.48
    assert found == {
        **{("histoseg_images", status): n for status, n in (("done", 3), ("failed", 1), ("skipped", 2))},
        **{("histoseg_stage_seconds_total", stage): value for stage, value in seconds.items()},
    }


@given(st.text(st.characters(blacklist_categories=("Cs",)), max_size=20))
def test_every_name_of_a_plan_comes_through(name: str) -> None:
    families = list(parser.text_string_to_metric_families(render(Totals(), {"plan": name, "precision": "x"}, 0.0)))
    assert len(families) == 4
    assert {sample.labels["plan"] for family in families for sample in family.samples} == {name}


def test_a_name_that_is_no_unicode_does_not_end_the_run() -> None:
    assert "\ufffd" in render(Totals(), {"plan": "a\udcff", "precision": "x"}, 0.0)


def test_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, totals = tmp_path / "deep" / "run.prom", Totals()
    file = MetricsFile(path, "fast", pytest.fail)
    file.close()
    assert not path.exists()  # a run that never began
    file.start(ENGINE, 3, stream_of(totals))
    assert read(path.read_text())["histoseg_last_success_timestamp_seconds", ""] == 0
    totals.failed = 1
    file.image({"status": "failed"})
    file.poll()
    assert read(path.read_text())["histoseg_images", "failed"] == 0  # too early
    monkeypatch.setattr(metrics_module, "WRITE_SECONDS", -1.0)
    file.poll()
    assert read(path.read_text())["histoseg_images", "failed"] == 1
    assert read(path.read_text())["histoseg_last_success_timestamp_seconds", ""] == 0
    totals.done = 1
    file.image({"status": "done"})
    file.close()
    assert read(path.read_text())["histoseg_images", "done"] == 1
    assert read(path.read_text())["histoseg_last_success_timestamp_seconds", ""] > 1e9
    assert [p.name for p in path.parent.iterdir()] == ["run.prom"]


def test_where_it_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"does not end in \.prom"):
        MetricsFile(tmp_path / "run.txt", "fast", pytest.fail)
    (tmp_path / "folder.prom").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder.prom", tmp_path / "file" / "x.prom"):
        with pytest.raises(UsageError, match="cannot be written"):
            MetricsFile(path, "fast", pytest.fail).start(ENGINE, 3, stream_of(Totals()))
    told: list[str] = []
    file = MetricsFile(tmp_path / "run.prom", "fast", told.append)
    file.start(ENGINE, 3, stream_of(Totals(done=1)))
    before = (tmp_path / "run.prom").read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(metrics_module, "atomic_write", full)
        patch.setattr(metrics_module, "WRITE_SECONDS", -1.0)
        file.poll()
        file.poll()
        file.close()
    assert len(told) == 1 and "No space left" in told[0] and (tmp_path / "run.prom").read_text() == before
