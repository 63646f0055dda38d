"""A stand-in for the tensorrt package where there is no GPU: it keeps the rules that we rely on, and fails on demand.

It reads the network with onnx, so an "engine" knows its convolutions and their real types; its inspector answers in the
form of the version it plays. `tests/engines/test_trt_bindings.py` holds its interface against the real bindings.
"""

from __future__ import annotations

import enum
import hashlib
import importlib.machinery
import json
import types
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

FAULTS = {
    "no builder",
    "build returns None",
    "deserialise returns None",
    "fp32 kernels",
    "unfused",
    "no details",
    "timing cache of another GPU",
    "interrupted",
}
TYPES = {
    **{TensorProto.FLOAT: "Float", TensorProto.FLOAT16: "Half"},
    **{TensorProto.INT8: "Int8", TensorProto.FLOAT8E4M3FN: "FP8"},
}
FORMATS = {
    "Float": "Row major linear FP32",
    "Half": "Channel major FP16 format where channel % 8 == 0",
    "Int8": "Thirty-two wide channel vectorized row major Int8 format",
    "FP8": "Channel major FP8 format where channel % 16 == 0",
}
EIGHT_BITS = (TensorProto.INT8, TensorProto.FLOAT8E4M3FN)


def fake_tensorrt(version: str = "11.4.0.106", gpu: str = "NVIDIA H200") -> Any:
    """A module that passes for tensorrt `version` on a machine with `gpu`; put names of `FAULTS` into its `faults`."""
    trt: Any = types.ModuleType("tensorrt")
    trt.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)  # others look it up
    trt.__version__, trt.gpu, trt.faults, trt.builds = version, gpu, set(), []
    for made in (_enums(), _objects(trt)):
        for name, value in made.items():
            setattr(trt, name, value)
    return trt


def _enums() -> dict[str, Any]:
    members = {
        "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
        "MemoryPoolType": "WORKSPACE",
        "ProfilingVerbosity": "LAYER_NAMES_ONLY NONE DETAILED",
        "HardwareCompatibilityLevel": "NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY",
        "BuilderFlag": "TF32 VERSION_COMPATIBLE",
        "LayerInformationFormat": "ONELINE JSON",
        "ExecutionContextAllocationStrategy": "STATIC ON_PROFILE_CHANGE USER_MANAGED",
    }
    made: dict[str, Any] = {name: enum.IntEnum(name, values.split(), start=0) for name, values in members.items()}

    class ILogger:
        Severity = enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)

    class IProgressMonitor:
        pass

    return {**made, "ILogger": ILogger, "IProgressMonitor": IProgressMonitor}


class OptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, ...]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            raise ValueError("inconsistent profile")
        self.shapes[input] = (min, opt, max)


class TimingCache:
    def __init__(self, content: bytes):
        self.content = content

    def serialize(self) -> bytes:
        return self.content


class BuilderConfig:
    def __init__(self, trt: Any):
        self._trt = trt
        self.flags = {trt.BuilderFlag.TF32}
        self.profiles: list[OptimizationProfile] = []
        self.limits: dict[Any, int] = {}
        self.hardware_compatibility_level = trt.HardwareCompatibilityLevel.NONE
        self.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
        self.progress_monitor: Any = None
        self.timing: TimingCache | None = None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self.limits[pool] = pool_size

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1 if "rgb" in profile.shapes else -1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
        return TimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if cache.content and "timing cache of another GPU" in self._trt.faults:
            return False
        self.timing = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.timing


class ParserError:
    def __init__(self, text: str):
        self._text = text

    def desc(self) -> str:
        return self._text


class EngineInspector:
    def __init__(self, trt: Any, layers: list[Any]):
        self._trt, self._layers = trt, layers

    def get_engine_information(self, format: Any) -> str:
        assert format == self._trt.LayerInformationFormat.JSON
        names = [layer["Name"] for layer in self._layers]
        io = {"Bindings": ["rgb", "logits"]} if self._trt.__version__ < "11" else {"I/O Tensors": [{"Name": "rgb"}]}
        return json.dumps({"Layers": names if "no details" in self._trt.faults else self._layers, **io})


class CudaEngine:
    def __init__(self, trt: Any, content: dict[str, Any]):
        self._trt, self.content = trt, content

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self._trt, self.content["layers"])

    def create_execution_context(self, strategy: Any = 0) -> Any:
        return self._trt.create_context(self, strategy)


def _objects(trt: Any) -> dict[str, Any]:
    class Builder:
        def __init__(self, logger: Any):
            if "no builder" in trt.faults:
                logger.log(trt.ILogger.Severity.ERROR, "CUDA initialization failure\nwith error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self._logger = logger

        def create_network(self, flags: int = 0) -> Any:
            assert flags == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            return types.SimpleNamespace(model=None)

        def create_builder_config(self) -> BuilderConfig:
            return BuilderConfig(trt)

        def create_optimization_profile(self) -> OptimizationProfile:
            return OptimizationProfile()

        def build_serialized_network(self, network: Any, config: BuilderConfig) -> bytes | None:
            trt.builds.append(config)
            if not _report_progress(trt, config.progress_monitor):
                return None
            if "build returns None" in trt.faults:
                self._logger.log(trt.ILogger.Severity.WARNING, "Tactic Device request: 4 GiB. Device memory: 1 GiB")
                self._logger.log(trt.ILogger.Severity.ERROR, "Could not find any implementation\nfor node_conv2d")
                return None
            if name := _without_kernel(network.model):
                self._logger.log(trt.ILogger.Severity.ERROR, f"Could not find any implementation for node {name}")
                return None
            if config.timing is not None:
                config.timing.content = b"timings"
            return _serialise(trt, network.model, config)

    class OnnxParser:
        def __init__(self, network: Any, logger: Any):
            self._network, self._errors = network, []

        def parse(self, model: bytes, path: str | None = None) -> bool:
            self._network.model = onnx.load_from_string(model)
            self._errors = _what_tensorrt_rejects(self._network.model)
            return not self._errors

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> ParserError:
            return ParserError(self._errors[index])

    class Runtime:
        def __init__(self, logger: Any):
            self._logger, self.engine_host_code_allowed = logger, False

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None:
            reason = _why_not(trt, serialized_engine, self.engine_host_code_allowed)
            if reason:
                self._logger.log(trt.ILogger.Severity.ERROR, reason)
                return None
            return CudaEngine(trt, json.loads(serialized_engine.partition(b"\n")[2]))

    return {"Builder": Builder, "OnnxParser": OnnxParser, "Runtime": Runtime}


def _report_progress(trt: Any, monitor: Any) -> bool:
    """What the builder tells its monitor; False if the monitor stops it."""
    monitor.phase_start("Building engine", None, 4)
    monitor.phase_start("Timing", "Building engine", 100)
    monitor.phase_start("Deeper", "Timing", 100)
    going = True
    for step in range(4):
        if "interrupted" in trt.faults and step == 2:
            monitor.error = KeyboardInterrupt()  # as the monitor keeps what a signal raised in it
        going = going and monitor.step_complete("Building engine", step)
        monitor.step_complete("Deeper", step)
        monitor.step_complete("Timing", 25 * step + 24)
    monitor.phase_finish("Deeper")
    monitor.phase_finish("Timing")
    monitor.phase_finish("Building engine")
    return going


def _what_tensorrt_rejects(model: onnx.ModelProto) -> list[str]:
    """uint8 may be the network's input and nothing else, and a strongly typed layer has inputs of one type.

    A Q takes data and scale of one type and gives its zero point's, which is 0; a DQ gives its scale's. Scales are
    positive, one or as many as the tensor has channels on the axis.
    """
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    kinds[model.graph.input[0].name] = model.graph.input[0].type.tensor_type.elem_type
    for node in model.graph.node:
        if node.op_type == "Cast":
            kinds[node.output[0]] = node.attribute[0].i
            continue
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            data, scale, zero = node.input
            eight, axis = kinds[zero], next((a.i for a in node.attribute if a.name == "axis"), 1)
            taken, given = (scale, zero) if node.op_type == "QuantizeLinear" else (zero, scale)
            if eight not in EIGHT_BITS or kinds[data] != kinds[taken] or values[zero].astype(np.float32).any():
                return [f"In node {node.name}: types of data, scale and zero point do not fit"]
            if values[scale].shape != values[zero].shape or not (values[scale] > 0).all():
                return [f"In node {node.name}: Scale coefficients must all be positive, one a zero point"]
            if values[scale].ndim and values[scale].shape != (values[data].shape[axis],):
                return [f"In node {node.name}: The number of scales is not equal to the number of output channels"]
            kinds[node.output[0]] = kinds[given]
            continue
        found = {kinds[name] for i, name in enumerate(node.input) if name and not (node.op_type == "Resize" and i)}
        if TensorProto.UINT8 in found:
            return [f"In node {node.name}: unsupported\ndata type UINT8"]
        if len(found) > 1:
            return [f"In node {node.name}: inputs of different types in a strongly typed network"]
        kinds |= dict.fromkeys(node.output, found.pop())
    return [] if kinds[model.graph.output[0].name] == TensorProto.FLOAT else ["output is not float"]


def _without_kernel(model: onnx.ModelProto) -> str:
    """The first convolution in 8 bits that TensorRT has no kernel for, or ""."""
    made = {node.output[0]: node for node in model.graph.node}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        dequantise = made.get(node.input[1]) if node.op_type in ("Conv", "ConvTranspose") else None
        if dequantise is None:
            continue
        weights, scale = (tensors[name] for name in dequantise.input[:2])
        fp8 = weights.data_type == TensorProto.FLOAT8E4M3FN
        if node.op_type == "ConvTranspose" and (fp8 or scale.dims):
            return node.name
        if fp8 and any(count % 16 for count in weights.dims[:2]):
            return node.name
    return ""


def _serialise(trt: Any, model: onnx.ModelProto, config: BuilderConfig) -> bytes:
    kinds = {tensor.name: TYPES[tensor.data_type] for tensor in model.graph.initializer if tensor.data_type in TYPES}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in kinds:
            kinds[node.output[0]] = "Half" if "unfused" in trt.faults else kinds[node.input[0]]
    layers: list[dict[str, Any]] = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose"):
            continue
        kind = "Float" if "fp32 kernels" in trt.faults else kinds[node.input[1]]
        tensors = [_tensor(trt, name, kind) for name in (node.input[0], node.output[0])]
        copy = {"Name": f"Reformatting CopyNode for Input Tensor 0 to {node.name}", "LayerType": "Reformat"}
        layers.append({**copy, "Inputs": [_tensor(trt, "x", "Float")], "Outputs": tensors[:1], "Metadata": ""})
        layers.append(
            {
                "Name": f"{node.name} + {node.name}_relu",
                "LayerType": "CaskConvolution" if node.op_type == "Conv" else "CaskDeconvolution",
                "Inputs": tensors[:1],
                "Outputs": tensors[1:],
                "Weights": {"Type": kind, "Count": 9},
                "Bias": {"Type": "Float", "Count": 1},
                "TacticName": "sm90_xmma_fprop_implicit_gemm",
                "Metadata": f"[ONNX Layer: {node.name}]\x1e[ONNX Layer: {node.name}_relu]",
            }
        )
    content = {
        "version": trt.__version__,
        "gpu": trt.gpu,
        "hardware": config.hardware_compatibility_level.name,
        "version_compatible": trt.BuilderFlag.VERSION_COMPATIBLE in config.flags,
        "onnx": hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest(),
        "layers": layers,
        "profiles": [profile.shapes["rgb"] for profile in config.profiles],
    }
    return b"fake engine\n" + json.dumps(content).encode()


def _tensor(trt: Any, name: str, kind: str) -> dict[str, Any]:
    tensor = {"Name": name, "Location": "Device", "Dimensions": [-1, 8, -1, -1]}
    if trt.__version__ < "11":
        return {**tensor, "Format/Datatype": FORMATS[kind]}
    return {**tensor, "Format": "Channel major", "Datatype": kind}


def _why_not(trt: Any, data: bytes, host_code: bool) -> str:
    """Why this TensorRT on this GPU rejects an engine, or ""."""
    if "deserialise returns None" in trt.faults or not data.startswith(b"fake engine\n"):
        return "Serialization assertion magicTag failed"
    content = json.loads(data.partition(b"\n")[2])
    if content["version"] != trt.__version__ and not content["version_compatible"]:
        return f"expecting library version {content['version']} got {trt.__version__}"
    if content["gpu"] != trt.gpu and content["hardware"] == "NONE":
        return "Target GPU SM is not the same"
    if content["version_compatible"] and not host_code:
        return "Engine host code is not allowed"
    return ""
