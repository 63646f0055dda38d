"""What precision the convolutions of a built engine really run in, from what TensorRT's engine inspector prints.

A build that was asked for fp16 may exit 0 and be fp32. The inspector's JSON names for each layer of the engine the
ONNX nodes it was made from and the types of its tensors and weights; both have changed their form between versions
("Format/Datatype" in 10.x, "Format" and "Datatype" in 11.x), so any key that speaks of a type counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from histoseg_fast.errors import EngineError

MAX_NAMED = 3
"""Layers named in an error line."""
_COPIES = {"reformat", "constant", "noop", "shuffle", "wait", "signal", "shape_call"}
"""Layers that move data for a convolution, bear its name and compute nothing."""
_WORK = re.compile(r"conv|gemm|fprop|dgrad|fusion|cudnn|winograd", re.IGNORECASE)
"""In the type or tactic of a layer that multiplies; preferred over its companions of the same name."""
_HALF = re.compile(r"\b(k?half|fp16|float16)\b", re.IGNORECASE)
_FLOAT = re.compile(r"\b(k?float|fp32|float32|tf32)\b", re.IGNORECASE)
_TACTIC_HALF = re.compile(r"(?<!b)f16f16|h884|h1688|h16816", re.IGNORECASE)
_TACTIC_FLOAT = re.compile(r"f32f32|tf32", re.IGNORECASE)
"""In a kernel's name: the types it multiplies."""
_SAYS_TYPE = re.compile(r"type|format", re.IGNORECASE)
_ONNX_NAME = re.compile(r"\[ONNX Layer: (.*?)\]")


@dataclass(frozen=True)
class Convolution:
    """A convolution node: its output tensor and the precision that the graph gives it, "fp16" or "fp32"."""

    output: str
    precision: str


@dataclass(frozen=True)
class TypedModel:
    """A strongly typed ONNX file and its convolutions by node name."""

    data: bytes
    convolutions: Mapping[str, Convolution]


def check_precision(information: str, convolutions: Mapping[str, Convolution]) -> dict[str, int]:
    """How many of `convolutions` the inspector's JSON shows in each precision, e.g. {"fp16": 12, "fp32": 1}.

    Raises EngineError unless every one that the graph has in fp16 is shown to be fp16. In a graph that is fp32
    throughout, all must be shown as fp32; the last ones of an fp16 graph may share a layer with the cast before them.
    """
    layers = list(_layers(information))
    wanted = {name: convolution.precision for name, convolution in convolutions.items()}
    main = "fp16" if "fp16" in wanted.values() else "fp32"
    shown = {name: _shown(layers, name, convolutions[name].output) for name in wanted}
    if hidden := [name for name in wanted if wanted[name] == main and shown[name] is None]:
        raise EngineError(
            f"the engine inspector does not show in which precision {_names(hidden)} run; the engine is refused",
            fix="report this with the versions of TensorRT and the GPU",
        )
    if wrong := [name for name in wanted if wanted[name] == main != shown[name]]:
        raise EngineError(
            f"the engine was built for {main} but {_names(wrong)} run in {shown[wrong[0]]}; it is refused",
            fix="report this with the versions of TensorRT and the GPU",
        )
    found = [precision for precision in shown.values() if precision]
    return {precision: found.count(precision) for precision in sorted(set(found))}


def _names(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{len(names)} convolution(s) ({', '.join(names[:MAX_NAMED])}{more})"


def _layers(information: str) -> Iterator[dict[str, Any]]:
    try:
        layers = list(json.loads(information)["Layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError("the engine inspector's answer cannot be read; the engine is refused") from error
    for layer in layers:
        if isinstance(layer, dict) and str(layer.get("LayerType", "")).lower() not in _COPIES:
            yield layer


def _shown(layers: list[dict[str, Any]], node: str, output: str) -> str | None:
    """The precision of the layer made from the ONNX node `node` (or that gives the tensor `output`), or None."""
    made = [layer for layer in layers if node in _onnx_names(layer)]
    made = made or [
        layer for layer in layers if output in {tensor.get("Name") for tensor in _tensors(layer, "Outputs")}
    ]
    works = [layer for layer in made if _WORK.search(f"{layer.get('LayerType')} {layer.get('TacticName')}")]
    seen = {_precision(layer) for layer in works or made} - {None}
    return seen.pop() if len(seen) == 1 else "fp32 in part" if seen else None


def _onnx_names(layer: dict[str, Any]) -> set[str]:
    """ONNX nodes that a layer was made from: its metadata says so, or else its own name, joined by " + "."""
    return {
        *_ONNX_NAME.findall(str(layer.get("Metadata", ""))),
        *re.split(r" \+ |\|\||[(), ]+", str(layer.get("Name"))),
    }


def _tensors(layer: dict[str, Any], side: str) -> list[dict[str, Any]]:
    tensors = layer.get(side)
    return [tensor for tensor in tensors if isinstance(tensor, dict)] if isinstance(tensors, list) else []


def _precision(layer: dict[str, Any]) -> str | None:
    """The type of a layer's weights, or what its kernel's name says, or the type of its inputs: "fp16" if one is fp16.

    Outputs do not count: a convolution in fp16 may write float where a cast was joined to it, and take float where
    one was joined before it. None if the layer does not say.
    """
    weights = layer.get("Weights")
    if isinstance(weights, dict) and (kind := _kind(str(weights.get("Type")))):
        return kind
    tactic = str(layer.get("TacticName"))
    if _TACTIC_HALF.search(tactic) or _TACTIC_FLOAT.search(tactic):
        return "fp16" if _TACTIC_HALF.search(tactic) else "fp32"
    inputs = _tensors(layer, "Inputs")
    return _kind(" ".join(str(tensor[key]) for tensor in inputs for key in tensor if _SAYS_TYPE.search(key)))


def _kind(text: str) -> str | None:
    return "fp16" if _HALF.search(text) else "fp32" if _FLOAT.search(text) else None
