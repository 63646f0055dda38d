"""The stream over GPU engines, on fake GPUs: byte for byte what the CPU gives, whatever goes wrong on the way."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fake_execution import rgb_as_logits
from gpu_fixtures import gpu_here
from running import (
    FakeEngine,
    entries,
    make_mixed_pictures,
    make_pictures,
    partials,
    picture,
    results,
    run_command,
    run_stream,
)

from histoseg_fast.errors import EngineError
from histoseg_fast.images import write_png
from histoseg_fast.pipeline.run import InferOptions, Progress, infer, worker_counts

OPTIONS = {"tile": 24, "stride": 2, "batch": 3, "readers": 2, "writers": 2}


@pytest.fixture
def pictures(tmp_path):
    make_mixed_pictures(tmp_path / "in", 4)
    return tmp_path / "in"


def check_results(pictures, out, plain, **options):
    """Files and figures are those of the CPU's stitcher."""
    run_stream(FakeEngine(), pictures, plain, **{**OPTIONS, **options})
    assert results(out) == results(plain)
    mine, wanted = entries(out), entries(plain)
    assert mine.keys() == wanted.keys()
    for name, entry in mine.items():
        for key in ("status", "width", "height", "pixels", "mean_confidence", "mask_sha256"):
            assert entry[key] == wanted[name][key]


@pytest.mark.parametrize(
    "options",
    [{}, {"overlay": True}, {"postprocess": "crf", "overlay": True}, {"postprocess": "min_island=9"}, {"batch": 1}],
)
@pytest.mark.parametrize("devices", ["cuda", "cuda:0,1"])
def test_the_stream_gives_the_same_bytes(gpus, tiny_plan, pictures, tmp_path, devices, options):
    cuda = gpus.start(2)
    with gpus.open(tiny_plan, devices) as engine:
        totals = run_stream(engine, pictures, tmp_path / "out", **{**OPTIONS, **options})
    assert (totals.done, totals.failed) == (8, 0)
    check_results(pictures, tmp_path / "out", tmp_path / "plain", **options)
    cuda.check_nothing_left()
    busy = [bool(gpu.calls["enqueue"]) for gpu in cuda.gpus]
    assert busy == [True, devices == "cuda:0,1"]


def test_running_out_of_memory_in_the_middle_changes_no_answer(gpus, tiny_plan, pictures, tmp_path):
    for nth in range(1, 30, 4):
        cuda = gpus.start(seed=nth)
        with gpus.open(tiny_plan) as engine:
            cuda.gpus[0].faults["mem_alloc"] = nth
            run_stream(engine, pictures, tmp_path / f"out{nth}", **OPTIONS)
            assert all("out of memory" in line for line in gpus.lines)
        check_results(pictures, tmp_path / f"out{nth}", tmp_path / f"plain{nth}")


def test_infinite_logits_cost_their_image_alone(gpus, tiny_plan, pictures, tmp_path):
    def network(rgb):
        logits = rgb_as_logits(rgb)
        logits[logits == 255] = np.inf
        return logits

    rgb = picture(7, 30, 30) // 2
    rgb[3, 4] = 255
    write_png(tmp_path / "in" / "zz.png", rgb)
    for i in range(4):
        write_png(tmp_path / "in" / f"image_00{i}.png", picture(i, 20, 24) // 2)
    for path in (tmp_path / "in").glob("other_*.png"):
        path.unlink()
    gpus.start(network=network)
    with gpus.open(tiny_plan) as engine:
        totals = run_stream(engine, pictures, tmp_path / "out", **OPTIONS)
    assert (totals.done, totals.failed) == (4, 1)
    assert "infinite logits at 1 pixel(s); use --precision fp32" in entries(tmp_path / "out")["zz.png"]["error"]
    (tmp_path / "in" / "zz.png").unlink()
    run_stream(FakeEngine(), pictures, tmp_path / "plain", **OPTIONS)
    assert results(tmp_path / "out") == results(tmp_path / "plain")


def test_a_gpu_that_fails_ends_the_run_and_the_next_one_goes_on(gpus, tiny_plan, pictures, tmp_path):
    cuda = gpus.start()
    with gpus.open(tiny_plan) as engine:
        count, stitch = 0, cuda.gpus[0].call

        def call(name):
            nonlocal count
            count += name == "stitch"
            if count == 5:
                cuda.gpus[0].dead = "unspecified launch failure"
            stitch(name)

        cuda.gpus[0].call = call
        with pytest.raises(EngineError, match=r"unspecified launch failure"):
            run_stream(engine, pictures, tmp_path / "out", **OPTIONS)
    assert not partials(tmp_path / "out")
    run_stream(FakeEngine(), pictures, tmp_path / "out", **OPTIONS)
    check_results(pictures, tmp_path / "out", tmp_path / "plain")


def test_infer_writes_probabilities_and_says_what_ran(gpus, tiny_plan, pictures, tmp_path):
    gpus.start(2)
    lines = []
    options = InferOptions(device="cuda:0,1", tile=40, probabilities=True)
    _, record = infer(tiny_plan, [str(pictures)], tmp_path / "out", options, Progress(report=lines.append))
    assert (record["device"], record["precision"], record["batch"]) == ("cuda:0,1", "fp16", 4)
    assert record["engine"] == "TensorRT 11.4.0.106 on NVIDIA H200"
    assert [line.partition(":")[0] for line in lines] == [
        "building the fp16 engine of tiny for NVIDIA H200 (sm90), TensorRT 11.4.0.106 (minutes, once)"
    ]
    plain = {path.relative_to(tmp_path / "out"): path.read_bytes() for path in (tmp_path / "out").rglob("*.tif")}
    _, record = infer(
        tiny_plan, [str(pictures)], tmp_path / "out", InferOptions(device="cuda", tile=40, probabilities=True)
    )
    assert (record["images_skipped"], record["images_done"]) == (8, 0)  # which GPU it was changes no answer
    assert len(plain) == 8
    gpus.start()
    infer(tiny_plan, [str(pictures)], tmp_path / "again", InferOptions(device="cuda", batch=1, probabilities=True))
    assert all((tmp_path / "again" / path).read_bytes() == data for path, data in plain.items())


def test_the_command_refuses_gpus_where_there_are_none(tmp_path, tiny_plan_path):
    make_pictures(tmp_path / "in", 1)
    for device, code, words in (
        ("cuda", 1, ("HISTOSEG_GPU_ENGINE=none" if gpu_here() else "driver", "--device cpu")),
        ("cuda:1,1", 2, ("names a GPU twice",)),
        ("cuda:x", 2, ("unknown device", "cuda:0,1")),
    ):
        done = run_command(
            "infer", tmp_path / "in", "--engine", tiny_plan_path, "--out", tmp_path / "out", "--device", device
        )
        assert done.returncode == code and all(word in done.stderr for word in words), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
    done = run_command("infer", tmp_path / "in", "--engine", tiny_plan_path, "--out", tmp_path / "out")
    assert done.returncode == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["device"] == "cpu"


@pytest.mark.parametrize(
    ("device", "cores", "wanted"),
    [
        *(("cpu", cores, (readers, readers)) for cores, readers in ((1, 1), (2, 1), (8, 4), (64, 4))),
        *(("cuda:0", cores, wanted) for cores, wanted in ((1, (1, 1)), (2, (1, 1)), (16, (10, 6)), (128, (16, 16)))),
    ],
)
def test_every_core_beside_a_gpu_reads_or_writes(device, cores, wanted):
    assert worker_counts(device, cores) == wanted
