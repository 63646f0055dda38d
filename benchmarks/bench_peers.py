"""The paper's network in other tools against `infer` with the shipped plans, PNG files to mask files, in one run.

    python benchmarks/bench_peers.py [--images 2] [--peers torch,monai,onnxruntime] [--json FILE]

Each peer runs the weights of the shipped plan `final` in fp32, as it comes: torch in channels_last on the whole image,
MONAI's SlidingWindowInferer with its usual 512-pixel windows and a quarter of overlap, ONNX Runtime on the whole image.
Decoding and the mask go through imagecodecs. A peer that is not installed is left out, and said so. The first image
of each is not counted (warming up); `infer` is timed from the call to the last file, engine start included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np

from histoseg_fast.images import read_image, write_png
from histoseg_fast.machine import available_cores, cpu_name
from histoseg_fast.pipeline.run import InferOptions, infer
from histoseg_fast.plan import MODEL, Plan
from histoseg_fast.plans import open_plan
from histoseg_fast.synthetic import make_field

Network = Callable[[np.ndarray], np.ndarray]
"""RGB uint8 (H, W, 3) to logits (C, H, W)."""


def torch_module(plan: Plan):
    """The plan's network as a torch module."""
    import onnx
    import torch
    from onnx import numpy_helper

    from histoseg_fast.models.network import UInt8Network, make_network

    network = make_network(plan.manifest["arch"], len(plan.palette.names))
    stored = {t.name: t for t in onnx.load_from_string(plan.members[MODEL]).graph.initializer}
    values = {n: torch.from_numpy(numpy_helper.to_array(stored[n]).astype(np.float32)) for n in network.state_dict()}
    network.load_state_dict(values)
    return UInt8Network(network).eval().to(memory_format=torch.channels_last)


def plain_torch(plan: Plan) -> Network:
    """The whole image through torch."""
    import torch

    module = torch_module(plan)

    def run(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(image[None]))[0].numpy()

    return run


def monai(plan: Plan) -> Network:
    """MONAI's sliding window over the same torch module."""
    import torch
    from monai.inferers import SlidingWindowInferer

    module, window = torch_module(plan), SlidingWindowInferer((512, 512), sw_batch_size=4, overlap=0.25)

    def run(image: np.ndarray) -> np.ndarray:
        planes = torch.from_numpy(image[None]).permute(0, 3, 1, 2).float()
        with torch.inference_mode():
            return window(planes, lambda tiles: module(tiles.permute(0, 2, 3, 1)))[0].numpy()

    return run


def onnxruntime(plan: Plan) -> Network:
    """The plan's ONNX through ONNX Runtime."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = available_cores()
    session = InferenceSession(plan.members[MODEL], options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"rgb": image[None]})[0][0]


PEERS: dict[str, Callable[[Plan], Network]] = {"torch": plain_torch, "monai": monai, "onnxruntime": onnxruntime}


def time_peer(network: Network, paths: list[Path], out: Path) -> float:
    """Median seconds an image, file to file, the first not counted."""
    seconds = []
    for path in [paths[0], *paths]:
        started = time.perf_counter()
        classes = network(read_image(path)).argmax(0).astype(np.uint8)
        (out / path.name).write_bytes(imagecodecs.png_encode(classes, level=1))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def time_infer(name: str, folder: Path, out: Path) -> tuple[float, str]:
    """Seconds an image of `infer` with the shipped plan `name`, without post-processing; the precision it ran in."""
    started = time.perf_counter()
    _, record = infer(open_plan(name), [str(folder)], out, InferOptions(postprocess="none"))
    return (time.perf_counter() - started) / record["images_done"], record["precision"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2, help="for each peer; `infer` gets ten times as many")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        fields = [make_field(seed)[0] for seed in range(4)]
        (root / "masks").mkdir()
        for i in range(10 * arguments.images):
            write_png(root / "images" / f"{i:04}.png", fields[i % len(fields)])
        for name in ("final", "fast"):
            taken, precision = time_infer(name, root / "images", root / name)
            seconds[f"infer, {name}, {precision}"] = taken
        paths = sorted((root / "images").iterdir())[: arguments.images]
        for name in arguments.peers.split(","):
            try:
                network = PEERS[name](open_plan("final"))
            except ImportError as error:
                print(f"{name}: left out ({error})")
                continue
            seconds[f"{name}, final, fp32"] = time_peer(network, paths, root / "masks")
    best = min(taken for name, taken in seconds.items() if not name.startswith("infer"))
    print(f"{cpu_name()}, {available_cores()} cores; images of 1128x720")
    for name, taken in seconds.items():
        print(f"{name}: {taken:.3f} s an image, {best / taken:.1f} times the best peer")
    if arguments.json:
        arguments.json.write_text(json.dumps(seconds, indent=1))


if __name__ == "__main__":
    main()
