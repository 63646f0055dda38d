"""The Python interface: a plan, one image, many images. See docs/api.md.

The names in it are those of the package itself: `histoseg_fast.segment` and so on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from histoseg_fast.errors import HistosegError, UsageError
from histoseg_fast.pipeline.memory import GivenT, Image, MemoryOutputs, Results, Segmentation
from histoseg_fast.pipeline.run import (
    CPU_STREAMS,
    InferOptions,
    Progress,
    make_outputs,
    make_stream,
    open_stream_engine,
)
from histoseg_fast.plan import Plan
from histoseg_fast.plans import open_plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["HistosegError", "Options", "Plan", "Segmentation", "load_plan", "segment", "stream"]

log = logging.getLogger("histoseg_fast")


class Options(TypedDict, total=False):
    """The keywords of `segment` and `stream`; they mean what the options of `histoseg-fast infer` do.

    device : "auto" (the default: a GPU that can be used, else the CPU), "cpu", "cuda", "cuda:1", "cuda:0,1".
    precision : "auto" (the default), "fp32", "bf16", "int8" on the CPU, "fp16", "fp32" on GPUs.
    tile : tile size in pixels, halo included; 0, the default, is the plan's.
    batch : tiles in a batch, up to 1024; 0, the default, is what suits the device.
    threads : CPU threads of the engine, up to 1024; 0, the default, is every core.
    probabilities : whether `Segmentation.probabilities` are wanted; by default not.
    postprocess : steps after the network, such as "min_island=64"; "plan", the default, are the plan's; "none".
    mpp : micrometres a pixel to read files at; by default slides are read at the plan's, other images as they are.
    level : read this level of slides as it is, 0 the finest; instead of `mpp`.
    tissue_mask : whether glass of slides is left out; by default it is.
    tissue_threshold : optical density, 0.001 to 1, under which a slide's pixels are glass; 0.03 by default.
    """

    device: str
    precision: str
    tile: int
    batch: int
    threads: int
    probabilities: bool
    postprocess: str
    mpp: float | None
    level: int | None
    tissue_mask: bool
    tissue_threshold: float


def load_plan(plan: str | os.PathLike[str]) -> Plan:
    """The plan in a file, or the shipped plan of a name ("fast", "final"), read and verified.

    Raises UsageError where there is none such, PlanError where it is damaged.
    """
    return open_plan(os.fspath(plan))


def segment(image: Image, plan: Plan | str | os.PathLike[str] = "fast", **options: Unpack[Options]) -> Segmentation:
    """The classes of one image: a file (PNG, JPEG, TIFF, slide), or an array, RGB uint8 (H, W, 3).

    plan : a plan, or what `load_plan` takes. options : see `Options`.

    The engine is started for this image and closed again; for many images, also arrays, `stream` keeps it.
    Raises ImageError for an image that cannot be read, UsageError for options that make no sense, EngineError for a
    device or precision that cannot run here or a network that fails, PlanError for a damaged plan.
    """
    ((_, result),) = _results([image], plan, options, 1)
    if isinstance(result, HistosegError):
        raise result
    return result


def stream(
    images: Iterable[GivenT], plan: Plan | str | os.PathLike[str] = "fast", **options: Unpack[Options]
) -> Generator[tuple[GivenT, Segmentation | HistosegError], None, None]:
    """The classes of many images: pairs of an image as it was given, and its Segmentation or what is wrong with it.

    images : files and arrays, as `segment` takes them; also an iterator without end. It is asked for the next image
        when the pipeline has room for one, from another thread. plan, options : as of `segment`.

    Reading, engine and stitching overlap, as in `histoseg-fast infer`, so images come in the order in which they are
    done. Only a few images are in memory at any time, however slowly the results are taken. An image that fails is
    given with its error, an ImageError mostly, and costs nothing else. The engine is started when the first result is
    asked for; closing the iterator, or dropping it, ends all threads.

    Raises UsageError and PlanError at once; from the iterator EngineError, and whatever `images` raise.
    """
    if isinstance(images, str | bytes | os.PathLike | np.ndarray):
        raise UsageError("stream takes several images, such as a list of paths", fix="use segment for one")
    return _results(images, plan, options, CPU_STREAMS)


def _results(
    images: Iterable[GivenT], plan: Plan | str | os.PathLike[str], options: Options, count: int
) -> Generator[tuple[GivenT, Segmentation | HistosegError], None, None]:
    """What `stream` gives; `count` is how many images the engine should be able to work on side by side."""
    if unknown := sorted(set(options) - set(Options.__annotations__)):
        raise TypeError(f"unknown option {unknown[0]!r}; known are {', '.join(Options.__annotations__)}")
    chosen, plan = InferOptions(**options), plan if isinstance(plan, Plan) else load_plan(plan)
    outputs = make_outputs(plan, chosen, Path(), MemoryOutputs)
    return _run(Results(images, outputs), plan, chosen, outputs, count)


def _run(
    results: Results[GivenT], plan: Plan, options: InferOptions, outputs: MemoryOutputs, count: int
) -> Generator[tuple[GivenT, Segmentation | HistosegError], None, None]:
    with open_stream_engine(plan, count, options, log.warning) as engine:
        progress = Progress(failure=results.fail)
        yield from results.of(make_stream(engine, plan, results.sources(), outputs, results, options, progress))
