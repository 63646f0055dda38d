"""What precision the convolutions of a built engine really run in, from what TensorRT's engine inspector prints.

A build that was asked for fp16 may exit 0 and be fp32, and where TensorRT joins no Q/DQ pair to a convolution, an 8-bit
engine is fp16 throughout. The inspector's JSON names for each layer of the engine the
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
_TYPES = {
    "fp16": re.compile(r"\b(k?half|fp16|float16)\b", re.IGNORECASE),
    "int8": re.compile(r"\bk?int8\b", re.IGNORECASE),
    "fp8": re.compile(r"\b(k?fp8|float8|e4m3|fp8_?e4m3)\b", re.IGNORECASE),
    "fp32": re.compile(r"\b(k?float|fp32|float32|tf32)\b", re.IGNORECASE),
}
_TACTICS = {
    "int8": re.compile(r"i8(i8|i32|f16|f32)|int8|imma|i8816|i16832", re.IGNORECASE),
    "fp8": re.compile(r"e4m3(e4m3|f16|bf16|f32)", re.IGNORECASE),
    "fp16": re.compile(r"(?<!b)f16f16|h884|h1688|h16816", re.IGNORECASE),
    "fp32": re.compile(r"f32f32|tf32", re.IGNORECASE),
}
"""In a kernel's name: the types it multiplies, each followed by that of its output or of its sums."""
_EIGHT_BITS = ("int8", "fp8")
_WIDTHS = (*_EIGHT_BITS, "fp16", "fp32")
_SAYS_TYPE = re.compile(r"type|format", re.IGNORECASE)
_ONNX_NAME = re.compile(r"\[ONNX Layer: (.*?)\]")


@dataclass(frozen=True)
class Convolution:
    """A convolution node: its output tensor and the precision that the graph gives it, "fp16", say."""

    output: str
    precision: str


@dataclass(frozen=True)
class TypedModel:
    """A strongly typed ONNX file and its convolutions by node name."""

    data: bytes
    convolutions: Mapping[str, Convolution]


def check_precision(information: str, convolutions: Mapping[str, Convolution]) -> dict[str, int]:
    """How many of `convolutions` the inspector's JSON shows in each precision, e.g. {"fp16": 12, "fp32": 1}.

    Raises EngineError unless every one that the graph has in its fewest bits is shown to run in them: in 8, in fp16
    or, in a graph that is fp32 throughout, in fp32. The others may share a layer with the cast or the Q/DQ before them.
    """
    layers = list(_layers(information))
    wanted = {name: convolution.precision for name, convolution in convolutions.items()}
    main = next((precision for precision in ("int8", "fp8", "fp16") if precision in wanted.values()), "fp32")
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
    return seen.pop() if len(seen) == 1 else f"{max(seen, key=_WIDTHS.index)} in part" if seen else None


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
    one was joined before it. Nor does a single input of 8 bits: with the DQ behind it joined to it, a convolution in
    fp16 takes it, too. It is two, data and weights, that say so. None if the layer does not say.
    """
    weights, tactic = layer.get("Weights"), _kind(str(layer.get("TacticName")), _TACTICS)
    kind = _kind(str(weights.get("Type")), _TYPES) if isinstance(weights, dict) else None
    if kind and not (kind in _EIGHT_BITS and tactic):
        return kind
    if tactic:
        return tactic
    inputs = [
        _kind(" ".join(str(tensor[key]) for key in tensor if _SAYS_TYPE.search(key)), _TYPES)
        for tensor in _tensors(layer, "Inputs")
    ]
    if len(inputs) > 1 and inputs[0] == inputs[1] and inputs[0] in _EIGHT_BITS:
        return inputs[0]
    return next((kind for kind in ("fp16", "fp32") if kind in inputs), None)


def _kind(text: str, patterns: Mapping[str, re.Pattern[str]]) -> str | None:
    return next((kind for kind, pattern in patterns.items() if pattern.search(text)), None)
