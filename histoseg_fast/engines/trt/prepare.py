"""An engine that runs a plan on this GPU: from the plan, from the cache, or built now.

prepared = prepare(plan, report=print)
context = prepared.engine.create_execution_context()
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from histoseg_fast.engines.trt import build
from histoseg_fast.engines.trt.cache import EngineCache
from histoseg_fast.engines.trt.gpu import Gpu, current_gpu
from histoseg_fast.engines.trt.info import MAX_ENGINE_BYTES, EngineInfo
from histoseg_fast.engines.trt.library import version
from histoseg_fast.engines.trt.member import find_member, network_of
from histoseg_fast.engines.trt.options import BuildOptions, check_card
from histoseg_fast.errors import EngineError, PlanError
from histoseg_fast.extras import need
from histoseg_fast.plan import MODEL, Plan


@dataclass(frozen=True)
class Prepared:
    """An engine that TensorRT has accepted here: its bytes, its papers, the ICudaEngine and what keeps it alive.

    `source` is "plan", "cache" or "built".
    """

    data: bytes
    info: EngineInfo
    engine: Any
    runtime: Any
    source: str


Check = Callable[[Prepared], float | None]
"""Runs a new engine and returns the share of pixels whose class is fp32's; raises EngineError to refuse it."""


def prepare(
    plan: Plan,
    options: BuildOptions | None = None,
    *,
    check: Check = lambda prepared: None,
    report: Callable[[str], None] = lambda line: None,
    progress: build.Progress = lambda phase, share: None,
    cache: Path | None = None,
) -> Prepared:
    """The engine of `plan` for this GPU and TensorRT, built if there is none: minutes, once.

    A CUDA context may be current (then its GPU counts) and none is needed. `options` are `BuildOptions.of(plan)`
    unless given; `check` is called on a newly built engine before it is kept; `report` gets one line that says why
    something is built. Raises EngineError if there is no GPU or TensorRT, if the GPU has no such precision, if TensorRT
    fails, or if the engine's convolutions do not run in the precision it was built for; PlanError if the plan lacks
    what the precision needs.
    """
    here, gpu = version(), current_gpu()
    options = options or BuildOptions.of(plan)
    check_card(options.precision, gpu)
    found = find_member(plan, options, gpu, here)
    why = found if isinstance(found, str) else ""
    if not isinstance(found, str):
        try:
            return _load(*found, "plan")
        except EngineError as error:
            why = f"the one in the plan was built for {found[0].built_for}, and {error.what}"
    need("tensorrt", "onnx")
    from histoseg_fast.engines.trt.fp16 import typed_model

    try:
        model = typed_model(plan.members[MODEL], options.precision, plan.ranges)
    except PlanError as error:
        raise PlanError(error.what, where=plan.path, fix=error.fix) from error
    digest = hashlib.sha256(model.data + options.key().encode()).hexdigest()
    store = EngineCache(digest, cache)
    with store.locked(gpu, here, lambda: report("another process builds this engine; waiting for it")):
        kept = store.find(gpu, here)
        if not isinstance(kept, str):
            try:
                return _load(*kept, "cache", host_code=True)
            except EngineError as error:
                kept = f"the one in the cache was built for {kept[0].built_for}, and {error.what}"
        report(
            f"building the {options.precision} engine of {plan.name} for {gpu}, TensorRT {here} "
            f"(minutes, once): {why or kept}"
        )
        return _build(plan, options, gpu, model, store, check, report, progress)


def load_bare_engine(path: Path) -> tuple[Any, Any]:
    """(Runtime, ICudaEngine) of a bare engine file, from trtexec say, of which nothing is known.

    Raises EngineError if it cannot be read, or TensorRT rejects it.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_ENGINE_BYTES + 1)
    except OSError as error:
        raise EngineError(f"cannot be read ({error.strerror or error})", where=path) from error
    if len(data) > MAX_ENGINE_BYTES:
        raise EngineError(f"is larger than {MAX_ENGINE_BYTES >> 20} MiB, the limit for an engine", where=path)
    try:
        return build.load_engine(data)
    except EngineError as error:
        raise EngineError(
            f"{error.what}; an engine runs on the GPU and TensorRT that it was built with, here {current_gpu()}",
            where=path,
            fix="build it here, or give the plan",
        ) from error


def _build(
    plan: Plan,
    options: BuildOptions,
    gpu: Gpu,
    model: Any,
    store: EngineCache,
    check: Check,
    report: Callable[[str], None],
    progress: build.Progress,
) -> Prepared:
    here = version()
    data, timing = build.build_engine(model, options, timing=store.timing(gpu, here), progress=progress)
    runtime, engine = build.load_engine(data, host_code=True)
    info = EngineInfo.of(network_of(plan, options.precision), options, gpu, here)
    info = info.sealed(data, build.inspect_engine(engine, model))
    prepared = Prepared(data, info, engine, runtime, "built")
    prepared = replace(prepared, info=replace(info, agreement=check(prepared)))
    try:
        store.keep_timing(gpu, here, timing)
        store.keep(prepared.info, data)
    except OSError as error:
        report(f"the engine could not be kept for the next run ({error.strerror or error})")
    return prepared


def _load(info: EngineInfo, data: bytes, source: str, *, host_code: bool = False) -> Prepared:
    runtime, engine = build.load_engine(data, host_code=host_code or info.version_compatible)
    return Prepared(data, info, engine, runtime, source)
