"""The same network, weights, images and machine in other tools and in `infer`, PNG files to mask files, in one run.

    python benchmarks/bench_peers.py [--engine final] [--images 2] [--peers torch,monai] [--json FILE] [--chart FILE]

Every peer runs the weights of the plan, as it comes ("ships": fp32, the settings of its own documentation) and at the
best settings found for it ("tuned": bf16, channels last, the whole image at once, where it has them). A peer that is
not installed is left out, and said so. Decoding, argmax and the mask go through imagecodecs and NumPy for all but
`infer`. A peer's first image is not counted; `infer` is timed from the call to the last file, engine start included.
Agreement is the share of pixels whose class is that of `infer` in fp32 on the same images. The last row is the shipped
plan `fast`, another network for the same task; it gets more images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import Image

from histoseg_fast.engines import choose_precision
from histoseg_fast.images import read_image, write_png
from histoseg_fast.machine import available_cores, cpu_name, cpu_precisions
from histoseg_fast.pipeline.run import InferOptions, infer
from histoseg_fast.plan import MODEL, Plan
from histoseg_fast.plans import open_plan
from histoseg_fast.synthetic import make_field

Network = Callable[[np.ndarray], np.ndarray]
"""RGB uint8 (H, W, 3) to logits (C, H, W)."""
WINDOW, OVERLAP, WINDOW_BATCH = 512, 0.25, 4
"""Of the sliding windows: the values in MONAI's tutorials for 2D images, and its default overlap."""
IMAGES_OF_INFER, IMAGES_OF_FAST = 10, 60
"""`infer` gets so many times as many images as a peer, for its stages to overlap as in use."""


@dataclass
class Row:
    """One way to run the network. kind : "ships", "tuned" or "infer". seconds : an image, median or mean."""

    name: str
    kind: str
    precision: str
    seconds: float
    agreement: float = 1.0

    @property
    def label(self) -> str:
        """What a reader calls it."""
        return " ".join([self.name, self.precision] + ([self.kind] if self.kind != "infer" else []))


def torch_module(plan: Plan, channels_last: bool):
    """The plan's network as a torch module."""
    import torch

    from histoseg_fast.models.network import rebuild

    return rebuild(plan).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def plain_torch(plan: Plan, precision: str = "fp32", channels_last: bool = False) -> Network:
    """The whole image through torch, bf16 by autocast."""
    import torch

    module = torch_module(plan, channels_last)

    def run(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return module(torch.from_numpy(image[None]))[0].float().numpy()

    return run


def monai(plan: Plan, precision: str = "fp32", channels_last: bool = False, window: int = WINDOW) -> Network:
    """MONAI's SlidingWindowInferer over the same torch module; `window` 0 is the whole image."""
    import torch
    from monai.inferers import SlidingWindowInferer

    module = torch_module(plan, channels_last)

    def run(image: np.ndarray) -> np.ndarray:
        size = image.shape[:2] if window == 0 else (window, window)
        sliding = SlidingWindowInferer(size, sw_batch_size=WINDOW_BATCH, overlap=OVERLAP if window else 0)
        planes = torch.from_numpy(image[None]).permute(0, 3, 1, 2).float()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return sliding(planes, lambda tiles: module(tiles.permute(0, 2, 3, 1).byte()))[0].float().numpy()

    return run


def tiatoolbox(plan: Plan, precision: str = "fp32", channels_last: bool = False, window: int = WINDOW) -> Network:
    """TIAToolbox's SemanticSegmentor over the same torch module."""
    import torch
    import zarr
    from tiatoolbox.models.engine.io_config import IOSegmentorConfig
    from tiatoolbox.models.engine.semantic_segmentor import SemanticSegmentor
    from tiatoolbox.models.models_abc import ModelABC

    class Wrapped(ModelABC):
        def __init__(self) -> None:
            super().__init__()
            self.network = torch_module(plan, channels_last)  # "module" would be taken for a parallel wrapper

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                return self.network(batch).float()

        @staticmethod
        def infer_batch(model: torch.nn.Module, batch: torch.Tensor, *, device: str) -> np.ndarray:
            with torch.inference_mode():
                return model(batch).permute(0, 2, 3, 1).numpy()

    segmentor = SemanticSegmentor(model=Wrapped(), batch_size=WINDOW_BATCH, num_workers=0, verbose=False)

    def run(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        side = window or max(height, width)  # it mixes up the sides of windows that are not square
        size, stride = [side, side], [int(side * (1 - OVERLAP)) if window else side] * 2
        config = IOSegmentorConfig(
            input_resolutions=[{"units": "baseline", "resolution": 1.0}],
            output_resolutions=[{"units": "baseline", "resolution": 1.0}],
            patch_input_shape=size,
            patch_output_shape=size,
            stride_shape=stride,
        )
        with tempfile.TemporaryDirectory() as folder:
            write_png(Path(folder) / "image.png", image)  # it takes files
            ((_, written),) = segmentor.run(
                images=[Path(folder) / "image.png"],
                patch_mode=False,
                ioconfig=config,
                return_probabilities=True,
                auto_get_mask=False,
                save_dir=Path(folder) / "out",
                output_type="zarr",
                device="cpu",
            ).items()
            scores = np.asarray(zarr.open(str(written), mode="r")["probabilities"])
        return np.moveaxis(scores, -1, 0)[:, :height, :width]

    return run


def onnxruntime(plan: Plan) -> Network:
    """The plan's ONNX through ONNX Runtime, whole images."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = available_cores()
    session = InferenceSession(plan.members[MODEL], options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"rgb": image[None]})[0][0]


def openvino(plan: Plan, precision: str = "fp32") -> Network:
    """The plan's ONNX through bare OpenVINO with its defaults for latency, whole images."""
    import openvino as ov

    kind = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16}[precision]
    settings = {"INFERENCE_PRECISION_HINT": kind, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.compile_model(ov.Core().read_model(plan.members[MODEL]), "CPU", settings)
    return lambda image: compiled(image[None])[0][0]


Peer = tuple[str, str, Callable[[Plan], Network]]
"""Kind, precision, and how to make it."""


def peers() -> dict[str, list[Peer]]:
    """By tool: as it comes, and tuned."""
    found: dict[str, list[Peer]] = {
        "torch": [("ships", "fp32", plain_torch), ("tuned", "fp32", lambda p: plain_torch(p, channels_last=True))],
        "monai": [("ships", "fp32", monai), ("tuned", "fp32", lambda p: monai(p, channels_last=True, window=0))],
        "tiatoolbox": [("ships", "fp32", tiatoolbox)],
        "onnxruntime": [("ships", "fp32", onnxruntime)],
        "openvino": [("ships", "fp32", openvino)],
    }
    if "bf16" in cpu_precisions():
        found["torch"].append(("tuned", "bf16", lambda p: plain_torch(p, "bf16", True)))
        found["monai"].append(("tuned", "bf16", lambda p: monai(p, "bf16", True, 0)))
        found["tiatoolbox"].append(("tuned", "bf16", lambda p: tiatoolbox(p, "bf16", True, 0)))
        found["openvino"].append(("tuned", "bf16", lambda p: openvino(p, "bf16")))
    return found


def time_peer(network: Network, paths: list[Path], exact: list[np.ndarray]) -> tuple[float, float]:
    """Median seconds an image, file to file, the first not counted; the share of pixels of the class in `exact`."""
    seconds, same = [], []
    for path, expected in zip([paths[0], *paths], [exact[0], *exact], strict=True):
        started = time.perf_counter()
        classes = network(read_image(path)).argmax(0).astype(np.uint8)
        path.with_suffix(".mask").write_bytes(imagecodecs.png_encode(classes, level=1))
        seconds.append(time.perf_counter() - started)
        same.append(float((classes == expected).mean()))
    return statistics.median(seconds[1:]), statistics.mean(same[1:])


def time_infer(plan: Plan, precision: str, folder: Path, out: Path) -> float:
    """Seconds an image of `infer`, without post-processing."""
    started = time.perf_counter()
    _, record = infer(plan, [str(folder)], out, InferOptions(precision=precision, postprocess="none"))
    return (time.perf_counter() - started) / record["images_done"]


def masks_of(out: Path, paths: list[Path]) -> list[np.ndarray]:
    """The class maps that `infer` wrote for `paths`."""
    return [np.asarray(Image.open(out / "masks" / path.name)) for path in paths]


def measure(plan: Plan, images: int, names: list[str], root: Path) -> list[Row]:
    """A row for each way to run the plan."""
    fields = [make_field(seed)[0] for seed in range(4)]
    for folder, times in (("images", IMAGES_OF_INFER), ("many", IMAGES_OF_FAST)):
        for i in range(times * images):
            write_png(root / folder / f"{i:04}.png", fields[i % len(fields)])
    paths = sorted((root / "images").iterdir())[:images]
    rows = []
    for precision in [p for p in cpu_precisions() if p != "int8" or plan.ranges is not None]:
        taken = time_infer(plan, precision, root / "images", root / precision)
        rows.append(Row("infer", "infer", precision, taken))
    exact = masks_of(root / "fp32", paths)
    for row in rows:
        found = masks_of(root / row.precision, paths)
        row.agreement = statistics.mean(float((a == b).mean()) for a, b in zip(found, exact, strict=True))
    for name in names:
        for kind, precision, make in peers()[name]:
            try:
                network = make(plan)
            except ImportError as error:
                print(f"{name}: left out ({error})")
                break
            rows.append(Row(name, kind, precision, *time_peer(network, paths, exact)))
    fast = open_plan("fast")
    taken = time_infer(fast, "auto", root / "many", root / "fast")
    return [*rows, Row("infer --engine fast", "infer", choose_precision(fast, "auto"), taken, float("nan"))]


def best(rows: list[Row], kind: str, precision: str = "") -> float:
    """Seconds an image of the fastest tool of a kind that is not bare OpenVINO, which `infer` itself runs on."""
    found = [r.seconds for r in rows if r.kind == kind and r.name != "openvino" and precision in ("", r.precision)]
    return min(found, default=float("nan"))


def draw(path: Path, rows: list[Row], title: str) -> None:
    """Bars of seconds an image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(rows, key=lambda row: -row.seconds)
    colours = {"ships": "#b0b7c3", "tuned": "#6b7a90", "infer": "#c2255c"}
    figure, axis = plt.subplots(figsize=(8, 0.35 * len(rows) + 1.2), layout="constrained")
    labels = [", ".join([row.name] + [row.kind] * (row.kind != "infer") + [row.precision]) for row in rows]
    bars = axis.barh(labels, [row.seconds for row in rows], color=[colours[row.kind] for row in rows])
    axis.bar_label(bars, [f"{row.seconds:.2f} s" for row in rows], padding=3)
    axis.set(xlabel="seconds an image of 1128x720, file to file (less is better)", title=title)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="final", help="the plan that every tool runs")
    parser.add_argument(
        "--images",
        type=int,
        default=2,
        help=f"for each peer; `infer` gets {IMAGES_OF_INFER} to {IMAGES_OF_FAST} times as many",
    )
    parser.add_argument("--peers", default=",".join(peers()))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    arguments = parser.parse_args()
    plan = open_plan(arguments.engine)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(plan, arguments.images, arguments.peers.split(","), Path(folder))
    ships, tuned = best(rows, "ships"), best(rows, "tuned")
    title = f"{plan.name} on {available_cores()} cores of {cpu_name()}"
    print(f"{title}; images of 1128x720, file to file")
    print(f"{'':28} {'s/image':>8} {'as fp32':>8} {'of best that ships':>19} {'of best tuned':>14}")
    for row in rows:
        ratios = f"{ships / row.seconds:>18.2f}x {tuned / row.seconds:>13.2f}x"
        print(f"{row.label:28} {row.seconds:>8.3f} {row.agreement:>8.2%} {ratios}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if arguments.chart:
        draw(arguments.chart, rows, title)


if __name__ == "__main__":
    main()
