"""A model repository that NVIDIA's Triton Inference Server loads: NAME/config.pbtxt and NAME/1/model.onnx or .plan."""

from __future__ import annotations

import json
import re
from pathlib import Path

from histoseg_fast.engines.trt.info import EngineInfo
from histoseg_fast.errors import UsageError
from histoseg_fast.files import atomic_write
from histoseg_fast.plan import MODEL, Plan

PLATFORMS = {"onnx": ("onnxruntime_onnx", "model.onnx"), "tensorrt": ("tensorrt_plan", "model.plan")}
"""`--platform`: Triton's name of it, and the file it looks for."""
QUEUE_MICROSECONDS = 500
"""How long the dynamic batcher waits for requests of the same size."""


def write_repository(folder: Path, plan: Plan, batch: int, engine: tuple[EngineInfo, bytes] | None = None) -> Path:
    """Write the model of `plan` below `folder` and return the model's own folder.

    Without `engine` it is the plan's ONNX, for any GPU and for CPUs; with one, that TensorRT engine, for the GPU and
    the TensorRT it was built for. The input is one image or tile uint8 (h, w, 3) a request, its sides multiples of
    the stride. Raises UsageError if the files cannot be written.
    """
    model = folder / re.sub(r"[^A-Za-z0-9._-]+", "_", plan.name)
    file = PLATFORMS["tensorrt" if engine else "onnx"][1]
    try:
        with atomic_write(model / "1" / file) as stream:
            stream.write(engine[1] if engine else plan.members[MODEL])
        with atomic_write(model / "config.pbtxt") as stream:
            stream.write(config(model.name, plan, batch, engine[0] if engine else None).encode())
    except OSError as error:
        raise UsageError(f"cannot be written ({error.strerror or error})", where=model) from error
    return model


def config(name: str, plan: Plan, batch: int, info: EngineInfo | None) -> str:
    """The text of config.pbtxt. The halo, stride and classes, which a client needs, stand in its parameters."""
    platform = PLATFORMS["tensorrt" if info else "onnx"][0]
    tile = info.profiles[-1].maximum[1] if info else plan.tile
    parameters = {
        "stride": plan.stride,
        "halo": plan.halo,
        "tile": tile,
        "classes": ",".join(plan.palette.names),
        "plan_sha256": plan.sha256,
    }
    lines = [
        f"name: {_text(name)}",
        f"platform: {_text(platform)}",
        f"max_batch_size: {batch}",
        'input [ { name: "rgb" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] } ]',
        f'output [ {{ name: "logits" data_type: TYPE_FP32 dims: [ {len(plan.palette.names)}, -1, -1 ] }} ]',
        f"dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_MICROSECONDS} }}",
    ]
    if info:  # the last profile takes every batch; Triton would take the first, which is for single images
        lines.append(f'instance_group [ {{ kind: KIND_GPU count: 1 profile: [ "{len(info.profiles) - 1}" ] }} ]')
    for key, value in parameters.items():
        lines.append(f"parameters {{ key: {_text(key)} value {{ string_value: {_text(str(value))} }} }}")
    return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    """A string of protobuf's text format: JSON's escapes are a part of its own, but for those beyond ASCII."""
    return json.dumps(value, ensure_ascii=False)
