"""TensorRT engines that travel inside a plan: members engines/<architecture>-<TensorRT>-<precision>-<GPU>.engine,
their papers in the manifest under "tensorrt"."""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Any

from histoseg_fast.engines.trt.gpu import Gpu
from histoseg_fast.engines.trt.info import EngineInfo, read_info
from histoseg_fast.engines.trt.options import EIGHT_BITS, BuildOptions
from histoseg_fast.plan import MODEL, Plan

FIELD = "tensorrt"
TRUST_VARIABLE = "HISTOSEG_TRUST_PLAN"
"""Set to 1: version-compatible engines of a plan may run the code they carry."""


def member_name(info: EngineInfo) -> str:
    """The engine's name among the plan's members."""
    gpu = info.gpu.name if info.hardware == "none" else info.hardware
    version, gpu = (re.sub(r"[^A-Za-z0-9.]+", "_", text)[:40] for text in (info.tensorrt, gpu))
    return f"engines/{info.gpu.sm}-{version}-{info.precision}-{gpu}.engine"


def with_engine(plan: Plan, info: EngineInfo, data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Manifest and members of `plan` with one engine more (or in the place of one of the same name)."""
    name = member_name(info)
    papers = {**plan.manifest.get(FIELD, {}), name: info.json()}
    return {**plan.manifest, FIELD: papers}, {**plan.members, name: data}


def network_of(plan: Plan, precision: str) -> bytes:
    """What an engine of `plan` in `precision` computes, as bytes to digest: the ONNX and, in 8 bits, the ranges."""
    ranges = json.dumps(plan.manifest.get("int8"), sort_keys=True).encode() if precision in EIGHT_BITS else b""
    return plan.members[MODEL] + ranges


def find_member(plan: Plan, options: BuildOptions, gpu: Gpu, tensorrt: str) -> tuple[EngineInfo, bytes] | str:
    """The plan's engine that runs here and covers `options`, or why there is none ("" where it has none at all)."""
    papers, reason = plan.manifest.get(FIELD), ""
    for name, values in sorted(papers.items()) if isinstance(papers, dict) else ():
        try:
            info = read_info(values)
        except ValueError as error:
            reason = f"the plan has no sound papers of {name[:80]!r} ({error})"
            continue
        data = plan.members.get(name)
        model = hashlib.sha256(network_of(plan, info.precision)).hexdigest()
        if data is None or hashlib.sha256(data).hexdigest() != info.sha256 or info.model != model:
            reason = f"the plan's {name[:80]!r} is not of this network"
        elif misfit := info.misfit(gpu, tensorrt):
            reason = f"the one in the plan {misfit}"
        elif not info.covers(options):
            reason = (
                f"the one in the plan is {info.precision} for tiles of at most {info.profiles[-1].maximum[1]} pixels"
            )
        elif info.version_compatible and os.environ.get(TRUST_VARIABLE) != "1":
            reason = f"the one in the plan carries code of its own ({TRUST_VARIABLE}=1 lets it run)"
        else:
            return info, data
    return reason
