"""--runner ray: what a local run gives, whatever happens to actors and nodes; and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faulty_actors
import pytest
from running import PATIENCE, command, entries, make_pictures, partials, picture, results

from histoseg_fast import extras
from histoseg_fast.errors import EngineError, HistosegError, ImageError, UsageError
from histoseg_fast.images import OutlineOptions, write_png
from histoseg_fast.pipeline import fleet
from histoseg_fast.pipeline.cluster import START_TRIES, Crew
from histoseg_fast.pipeline.remote import PREFIX
from histoseg_fast.pipeline.run import InferOptions, Progress, infer
from histoseg_fast.pipeline.shards import Shard
from histoseg_fast.pipeline.totals import Totals
from histoseg_fast.plan import Plan

TESTS = Path(__file__).parents[1]
LOCAL, RAY = InferOptions(), InferOptions(runner="ray")
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
pytest.importorskip("ray")


def add_node(cluster: Any, tries: int = 4) -> None:
    """Add a node; Ray gives one half a minute, which a busy machine may exceed."""
    try:
        cluster.add_node(**NODE)
    except Exception:
        if tries == 1:
            raise
        add_node(cluster, tries - 1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that takes no actors and two nodes that take one each; the nodes import what the tests do."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS.parent, TESTS))))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
        patch.setenv("RAY_ADDRESS", made.address)
        try:
            for _ in range(2):
                add_node(made)
            yield made
        finally:
            made.shutdown()


@pytest.fixture
def on_ray(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[type], None]:
    """The cluster; called with a class, it has actors of that class."""
    return lambda kind: monkeypatch.setattr("histoseg_fast.pipeline.cluster.Actor", kind)


def run(plan: Plan, folder: Path, out: Path, options: InferOptions, **progress: Any) -> tuple[Totals, list[str]]:
    """A run to its end, and what it reported."""
    lines: list[str] = []
    totals, _ = infer(plan, [str(folder)], out, options, Progress(report=lines.append, **progress))
    return totals, lines


def timeless(out: Path) -> dict[str, dict[str, Any]]:
    """The manifest without times."""
    return {
        name: {field: value for field, value in entry.items() if field not in ("seconds", "latency")}
        for name, entry in entries(out).items()
    }


def same(one: Path, other: Path) -> bool:
    return results(one) == results(other) and timeless(one) == timeless(other) and not partials(one)


def test_a_run_on_ray_is_a_local_run(on_ray: Any, tiny_plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    make_pictures(folder / "deep", 12)
    write_png(folder / "large.png", picture(7, 300, 420))
    write_png(Path(os.fsdecode(os.fsencode(folder) + b"/odd\xff\n.png")), picture(8, 30, 30))
    (folder / "bad.png").write_bytes(b"?" * 100)
    wanted: dict[str, Any] = {"overlay": True, "geojson": OutlineOptions(), "probabilities": True, "batch": 2}
    local, ray = (InferOptions(runner=runner, **wanted) for runner in ("local", "ray"))
    run(tiny_plan, folder, tmp_path / "local", local)
    totals, _ = run(tiny_plan, folder, tmp_path / "ray", ray)
    assert (totals.done, totals.failed, totals.skipped) == (14, 1, 0)
    assert totals.segmented == totals.pixels == 12 * 40 * 50 + 300 * 420 + 30 * 30
    assert same(tmp_path / "local", tmp_path / "ray")
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("local", "ray")]
    assert records[1]["arguments"]["runner"] == "ray"
    differ = {"arguments", "wall_seconds", "stage_seconds", "peak_rss_bytes"}
    assert [{k: v for k, v in r.items() if k not in differ} for r in records[:1]] == [
        {k: v for k, v in r.items() if k not in differ} for r in records[1:]
    ]

    (tmp_path / "ray" / "masks" / "large.png").unlink()
    write_png(folder / "bad.png", picture(9, 20, 20))
    totals, _ = run(tiny_plan, folder, tmp_path / "ray", ray)
    assert (totals.done, totals.failed, totals.skipped) == (2, 0, 13)
    totals, _ = run(tiny_plan, folder, tmp_path / "local", local)
    assert same(tmp_path / "local", tmp_path / "ray")
    totals, _ = run(tiny_plan, folder, tmp_path / "ray", local)
    assert (totals.done, totals.skipped) == (0, 15)


def test_urls_are_read_and_written_by_the_actors(on_ray: Any, tiny_plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    make_pictures(folder / "deep", 12)
    (folder / "bad.png").write_bytes(b"?" * 100)
    run(tiny_plan, folder, tmp_path / "local", LOCAL)
    before = set(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))
    url = (tmp_path / "ray").as_uri()
    infer(tiny_plan, [folder.as_uri()], url, RAY)
    assert results(tmp_path / "local") == results(tmp_path / "ray") and not partials(tmp_path / "ray")
    assert entries(tmp_path / "ray")["bad.png"]["error"].startswith(f"{folder.as_uri()}/bad.png: is not a PNG")
    (tmp_path / "ray" / "masks" / "deep" / "image_003.png").unlink()
    totals, _ = infer(tiny_plan, [folder.as_uri()], url, RAY)
    assert (totals.done, totals.failed, totals.skipped) == (1, 1, 11)
    assert set(Path(tempfile.gettempdir()).glob(f"{PREFIX}*")) == before


def test_relative_paths_start_where_the_run_does(
    on_ray: Any, tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(tmp_path / "in", 2)
    (tmp_path / "in" / "bad.png").write_bytes(b"?" * 100)
    monkeypatch.chdir(tmp_path)
    run(tiny_plan, Path("in"), Path("local"), LOCAL)
    monkeypatch.setattr("histoseg_fast.pipeline.cluster.PATIENCE_SECONDS", 0.01)
    _, lines = run(tiny_plan, Path("in"), Path("ray"), RAY)
    assert lines == [
        "Ray: up to 2 actor(s), each with 1 CPU(s)",
        "waiting for Ray to find 1 CPU(s) free, and for the engine to start there",
    ]
    assert same(tmp_path / "local", tmp_path / "ray")


def test_an_actor_that_dies_costs_no_image_and_a_killer_costs_itself(
    on_ray: Any, tiny_plan: Plan, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    make_pictures(folder, 20)
    write_png(folder / "once.png", picture(31, 40, 40))
    run(tiny_plan, folder, tmp_path / "local", LOCAL)
    write_png(folder / "killer.png", picture(30, 40, 40))
    on_ray(faulty_actors.Dying)
    failures: list[HistosegError] = []
    totals, lines = run(tiny_plan, folder, tmp_path / "ray", RAY, failure=lambda source, error: failures.append(error))
    assert (totals.done, totals.failed) == (21, 1)
    ((killer, entry),) = (item for item in timeless(tmp_path / "ray").items() if item[1]["status"] == "failed")
    assert killer == "killer.png" and entry["error"] == str(failures[0])
    assert f"killer.png: given up: {fleet.TRIES} actors of Ray died with it; see whether" in entry["error"]
    assert sum(" died" in line for line in lines) == fleet.TRIES + 1
    assert results(tmp_path / "local") == results(tmp_path / "ray") and not partials(tmp_path / "ray")
    del (after := timeless(tmp_path / "ray"))["killer.png"]
    assert after == timeless(tmp_path / "local")


def test_a_node_that_dies_costs_no_image(on_ray: Any, cluster: Any, tiny_plan: Plan, tmp_path: Path) -> None:
    from ray._private import state

    make_pictures(tmp_path / "in", 20)
    write_png(tmp_path / "in" / "held.png", picture(32, 40, 40))
    run(tiny_plan, tmp_path / "in", tmp_path / "local", LOCAL)
    on_ray(faulty_actors.Holding)
    engines: list[Any] = []
    over: list[str] = []

    def holds(member: Any) -> bool:
        return any(task.source.name == "held.png" for task in member.at_work.values())

    def kill_node(entry: dict[str, Any]) -> None:
        over.append(entry["input"])
        doomed = [member for member in engines[0].members if holds(member)]
        if doomed and (tmp_path / "in" / "held.seen").exists() and len(cluster.worker_nodes) == 2:
            home = state.actors(doomed[0].handle._actor_id.hex())["Address"]["NodeID"]
            (node,) = (node for node in cluster.worker_nodes if node.node_id == home)
            cluster.remove_node(node, allow_graceful=False)

    try:
        totals, lines = run(
            *(tiny_plan, tmp_path / "in", tmp_path / "ray", RAY),
            start=lambda engine, images, stream: engines.append(engine),
            image=kill_node,
        )
    finally:
        if len(cluster.worker_nodes) < 2:
            add_node(cluster)
    assert (totals.done, totals.failed) == (21, 0) and sorted(over) == sorted(set(over))
    assert sum(" died" in line for line in lines) == 1
    assert same(tmp_path / "local", tmp_path / "ray")


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        (faulty_actors.DyingAtStart, EngineError, f"{START_TRIES} actors of Ray died as they started: "),
        (faulty_actors.WithoutEngine, EngineError, "the device is gone; look for it"),
        (faulty_actors.Elsewhere, UsageError, "is another folder on .*; give --runner ray folders that all nodes"),
        (faulty_actors.OtherVersion, UsageError, "the run was started by 0.0.1; install one version on all nodes"),
        (faulty_actors.DiskFull, ImageError, "disk: no space left"),
    ],
)
def test_what_no_actor_can_do_ends_the_run_with_one_line(
    on_ray: Any, tiny_plan: Plan, tmp_path: Path, kind: type, error: type[HistosegError], says: str
) -> None:
    make_pictures(tmp_path / "in", 10)
    on_ray(kind)
    with pytest.raises(error, match=says) as caught:
        run(tiny_plan, tmp_path / "in", tmp_path / "out", RAY)
    assert type(caught.value) is error and "\n" not in str(caught.value)
    assert not partials(tmp_path / "out")


def lines_of(out: Path) -> int:
    manifest = out / "manifest.jsonl"
    return manifest.read_bytes().count(b"\n") if manifest.exists() else 0


def actors() -> list[str]:
    """The processes of actors on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_text("utf-8", "replace"))
    return [name for name in found if name.startswith("ray::Actor")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_is_done_and_leaves_no_actor(
    cluster: Any, tiny_plan: Plan, tiny_plan_path: Path, tmp_path: Path, number: int
) -> None:
    images = 80
    make_pictures(tmp_path / "in", images, 400, 420)
    out = tmp_path / "out"
    arguments = ["infer", tmp_path / "in", "--engine", tiny_plan_path, "--log-format", "json", "--out", out]
    with subprocess.Popen(
        command(*arguments, "--runner", "ray"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as ran:
        deadline = time.monotonic() + PATIENCE
        while lines_of(out) < 3 and time.monotonic() < deadline and ran.poll() is None:
            time.sleep(0.005)
        ran.send_signal(number)
        said, told = ran.communicate(timeout=PATIENCE)
    assert ran.returncode == 128 + number and said == ""
    assert [json.loads(line)["event"] for line in told.splitlines()].count("interrupted") == 1
    record = json.loads((out / "run.json").read_text())
    assert record["interrupted"] is True and 3 <= record["images_done"] == lines_of(out) < images
    assert not partials(out) and len(list((out / "masks").iterdir())) == record["images_done"]
    deadline = time.monotonic() + PATIENCE
    while actors() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not actors()
    totals, _ = run(tiny_plan, tmp_path / "in", out, RAY)
    assert (totals.done, totals.skipped) == (images - record["images_done"], record["images_done"])
    run(tiny_plan, tmp_path / "in", tmp_path / "local", LOCAL)
    assert same(tmp_path / "local", out)


# -- what needs no cluster -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"watch": True}, "--runner ray: the images to come cannot be dealt out; leave --watch out"),
        ({"shard": Shard(1, 2)}, "--shard: Ray deals the images out itself; leave it out"),
        ({"device": "cuda:0,1"}, "--device cuda:0,1: Ray gives each actor its GPU; use --device cuda"),
        ({"runner": "dask"}, "--runner: unknown runner 'dask'; choose local or ray"),
    ],
)
def test_options_that_do_not_go_with_ray(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        InferOptions(**{"runner": "ray", **options})
    assert str(caught.value) == says


def test_without_ray_the_extra_is_named(tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pictures(tmp_path / "in", 1)
    monkeypatch.setattr(extras, "has", lambda *packages: False)
    with pytest.raises(UsageError, match=r"^this needs ray; pip install 'histoseg-fast\[ray\]'$"):
        run(tiny_plan, tmp_path / "in", tmp_path / "out", RAY)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("address", "error", "says"),
    [
        ("127.0.0.1:1", EngineError, "Ray cannot be reached or started: .*; check RAY_ADDRESS"),
        (
            "ray://head:10001",
            UsageError,
            "RAY_ADDRESS=ray://head:10001: Ray Client is of no use here; start it on a node",
        ),
    ],
)
def test_a_cluster_that_is_not_there(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, error: type, says: str
) -> None:
    make_pictures(tmp_path / "in", 1)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(error, match=says):
        run(tiny_plan, tmp_path / "in", tmp_path / "out", RAY)


SMALL, LARGE, HEAD, GPUS = {"CPU": 8.0}, {"CPU": 17.0}, {"CPU": 0.0}, {"CPU": 32.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("nodes", "options", "crew"),
    [
        ([SMALL], {}, Crew(1, 8, 0)),
        ([HEAD, SMALL, LARGE], {}, Crew(3, 8, 0)),
        ([SMALL, LARGE], {"threads": 4}, Crew(6, 4, 0)),
        ([SMALL, LARGE], {"threads": 9}, Crew(1, 9, 0)),
        ([HEAD, SMALL, GPUS], {}, Crew(4, 8, 1)),
        ([HEAD, SMALL, GPUS], {"precision": "bf16"}, Crew(5, 8, 0)),
        ([SMALL, GPUS], {"device": "cpu"}, Crew(5, 8, 0)),
        ([GPUS, {"CPU": 4.0, "GPU": 1.0}], {"device": "cuda"}, Crew(5, 4, 1)),
        ([GPUS], {"threads": 16}, Crew(2, 16, 1)),
    ],
)
def test_how_many_actors_there_is_room_for(nodes: list[dict], options: dict[str, Any], crew: Crew) -> None:
    assert Crew.fit(nodes, InferOptions(runner="ray", **options)) == crew


@pytest.mark.parametrize(
    ("nodes", "options", "says"),
    [
        ([HEAD], {}, r"no node of the Ray cluster has 1 CPU\(s\); see `ray status`"),
        ([SMALL], {"threads": 9}, r"has 9 CPU\(s\);"),
        ([SMALL], {"device": "cuda"}, r"has 1 CPU\(s\) and a GPU;"),
        ([SMALL], {"device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_a_cluster_without_room(nodes: list[dict], options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Crew.fit(nodes, InferOptions(runner="ray", **options))
