"""What a run may cost: memory, however many and however large the images, and imports."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from running import PATIENCE, make_pictures, picture, run_command
from tiny_plans import tiny_manifest

from histoseg_fast.engines import open_engine, run_tiled
from histoseg_fast.plan import MODEL, write_plan

SIDE, TILE = 30_000, 512


def peak(out: Path) -> int:
    return json.loads((out / "run.json").read_text())["peak_rss_bytes"]


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, tiny_plan_path: Path) -> None:
    for i, (height, width) in enumerate([(64, 64), (80, 64), (300, 200)]):
        make_pictures(tmp_path / "few" / str(i), 15, height, width)
        make_pictures(tmp_path / "many" / str(i), 150, height, width)
    for folder in ("few", "many"):
        arguments = (tmp_path / folder, "--engine", tiny_plan_path, "--overlay", "--out", tmp_path / "out" / folder)
        assert run_command("infer", *arguments).returncode == 0
    # The pixels alone of the 405 images more are 28 MB, their logits 110 MB.
    assert peak(tmp_path / "out" / "many") - peak(tmp_path / "out" / "few") < 8 << 20


def small_model() -> bytes:
    """One 3x3 convolution, so that the time of the large image goes to the stream and not to the network."""
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(4).standard_normal((3, 3, 3, 3)).astype(np.float32) / 512
    nodes = [
        helper.make_node("Transpose", ["rgb"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["floats", "weights"], ["logits"], pads=[1] * 4),
    ]
    source = helper.make_tensor_value_info("rgb", TensorProto.UINT8, ["n", "h", "w", 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3, "h", "w"])
    graph = helper.make_graph(nodes, "small", [source], [logits], [numpy_helper.from_array(weights, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return model.SerializeToString()


def write_large(path: Path, tile: np.ndarray) -> None:
    """A tiled deflate TIFF of SIDE x SIDE pixels that repeats one tile."""
    import imagecodecs
    import tifffile

    encoded = imagecodecs.deflate_encode(tile.tobytes(), level=6)
    count = (-(-SIDE // TILE)) ** 2
    tifffile.imwrite(
        path, (encoded for _ in range(count)), shape=(SIDE, SIDE, 3), dtype=np.uint8, tile=(TILE, TILE),
        compression="deflate", photometric="rgb",
    )  # fmt: skip


def mask_rows(data: bytes, rows: int) -> tuple[tuple[int, int], np.ndarray, int]:
    """(width, height), the first `rows` rows and the number of all decoded bytes of a palette PNG, streamed."""
    width, height = struct.unpack(">II", data[16:24])
    inflate, kept, total, position = zlib.decompressobj(), b"", 0, 8
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        if kind == b"IDAT":
            pixels = inflate.decompress(data[position + 8 : position + 8 + length])
            kept = (kept + pixels)[: rows * (width + 1)] if len(kept) < rows * (width + 1) else kept
            total += len(pixels)
        position += length + 12
    assert inflate.eof
    return (width, height), np.frombuffer(kept, np.uint8).reshape(rows, width + 1)[:, 1:], total


@pytest.mark.slow
def test_a_large_image_stays_under_three_gigabytes(tmp_path: Path) -> None:
    manifest = tiny_manifest(stride=1, halo=1, tile={"default": 1024})
    plan = write_plan(tmp_path / "small.plan", manifest, {MODEL: small_model()})
    tile = picture(0, TILE, TILE)
    write_large(tmp_path / "large.tif", tile)
    arguments = (tmp_path / "large.tif", "--engine", tmp_path / "small.plan", "--out", tmp_path / "out")
    run = run_command("infer", *arguments, "--precision", "fp32")
    assert run.returncode == 0, run.stderr
    assert 100 << 20 < peak(tmp_path / "out") < 3 << 30
    size, rows, total = mask_rows((tmp_path / "out" / "masks" / "large.png").read_bytes(), 2 * TILE)
    assert size == (SIDE, SIDE) and total == SIDE * (SIDE + 1)
    with open_engine(plan, precision="fp32") as engine:
        expected = run_tiled(engine, plan, np.tile(tile, (3, 3, 1))).argmax(0)
    assert (rows[:, : 2 * TILE] == expected[: 2 * TILE, : 2 * TILE]).all()
    # The image repeats, so away from its edges the mask does too.
    assert (rows[1:TILE, TILE : 2 * TILE] == rows[1:TILE, 40 * TILE : 41 * TILE]).all()
    line = json.loads((tmp_path / "out" / "manifest.jsonl").read_text())
    assert sum(line["pixels"].values()) == SIDE * SIDE


def loaded(*arguments: object) -> set[str]:
    """The top-level modules in memory after `histoseg-fast ARGUMENTS...`, run in a process of its own."""
    code = (
        "import atexit, json, sys; sys.argv = json.loads(sys.argv[1])\n"
        "atexit.register(lambda: print('MODULES', *{name.split('.')[0] for name in sys.modules}))\n"
        "from histoseg_fast.cli import main; main()"
    )
    line = json.dumps(["histoseg-fast", *map(str, arguments)])
    run = subprocess.run([sys.executable, "-c", code, line], capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split()[1:])


HEAVY = {"torch", "torchvision", "onnx", "onnxscript", "nncf", "scipy", "sklearn", "PIL", "pandas"}


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("infer", "--help"), ("train", "--help")])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert not loaded(*arguments) & (HEAVY | {"numpy", "openvino", "tifffile", "imagecodecs", "rich"})


def test_infer_imports_no_training_library(tmp_path: Path, tiny_plan_path: Path) -> None:
    make_pictures(tmp_path / "in", 1)
    modules = loaded("infer", tmp_path / "in", "--engine", tiny_plan_path, "--out", tmp_path / "out")
    assert "openvino" in modules and not modules & (HEAVY | {"rich", "tifffile"})
