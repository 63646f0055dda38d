"""What is known of an engine: what it was built from, for and with; and the file that holds both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from histoseg_fast.engines.trt.gpu import Gpu
from histoseg_fast.engines.trt.library import version_of
from histoseg_fast.engines.trt.options import BuildOptions, Profile
from histoseg_fast.errors import EngineError

MAGIC = b"histoseg-fast TensorRT engine 1\n"
MAX_HEADER_BYTES = 64 << 10
MAX_ENGINE_BYTES = 1 << 30
MAX_TEXT = 200
AMPERE = (8, 0)


@dataclass(frozen=True)
class EngineInfo:
    """An engine's papers. `model` is the sha256 of what it computes (see `member.network_of`), `sha256` and `size` are
    the engine's own. `convolutions` counts them by the precision the inspector showed; `agreement` is the share of
    pixels whose class was fp32's when it was checked after the build (None: not checked).
    """

    model: str
    gpu: Gpu
    tensorrt: str
    precision: str
    hardware: str
    version_compatible: bool
    profiles: tuple[Profile, ...]
    convolutions: Mapping[str, int] = field(default_factory=dict)
    agreement: float | None = None
    sha256: str = ""
    size: int = 0

    @classmethod
    def of(cls, model: bytes, options: BuildOptions, gpu: Gpu, tensorrt: str) -> EngineInfo:
        """The papers of an engine about to be built for `model`."""
        return cls(
            hashlib.sha256(model).hexdigest(),
            gpu,
            tensorrt,
            options.precision,
            options.hardware,
            options.version_compatible,
            options.profiles,
        )

    def sealed(self, data: bytes, convolutions: Mapping[str, int]) -> EngineInfo:
        """The papers with the engine's own digest and size."""
        digest = hashlib.sha256(data).hexdigest()
        return replace(self, sha256=digest, size=len(data), convolutions=dict(convolutions))

    @property
    def built_for(self) -> str:
        """In words, for lines and errors."""
        more = "" if self.hardware == "none" else f" and others ({self.hardware})"
        version = f"TensorRT {self.tensorrt}" + (" or newer" if self.version_compatible else "")
        return f"{self.gpu}{more}, {version}"

    def misfit(self, gpu: Gpu, tensorrt: str) -> str:
        """Why the engine cannot run on `gpu` under this TensorRT ("is for TensorRT 10.13.0"), or "" if it may."""
        there, here = version_of(self.tensorrt), version_of(tensorrt)
        if self.tensorrt != tensorrt and not (self.version_compatible and there <= here):
            return f"is for TensorRT {self.tensorrt}"
        fits = {
            "ampere+": gpu.capability >= AMPERE,
            "same-cc": gpu.capability == self.gpu.capability,
        }.get(self.hardware, gpu == self.gpu)
        return "" if fits else f"is for another GPU, {self.gpu}"

    def covers(self, options: BuildOptions) -> bool:
        """Whether it takes every shape, and runs in every place, that an engine built with `options` would."""
        places = options.hardware in ("none", self.hardware) and self.version_compatible >= options.version_compatible
        return (
            places
            and self.precision == options.precision
            and all(
                any(mine.holds(wanted.minimum) and mine.holds(wanted.maximum) for mine in self.profiles)
                for wanted in options.profiles
            )
        )

    def json(self) -> dict[str, Any]:
        """As JSON values; `read_info` is the way back."""
        values = asdict(self)
        gpu = values.pop("gpu")
        return {**values, "gpu": gpu["name"], "capability": list(gpu["capability"])}


def read_info(values: object) -> EngineInfo:
    """The papers from JSON values that nobody vouches for. Raises ValueError if they are not sound."""
    if not isinstance(values, dict):
        raise ValueError("no papers")
    known = {key: values.get(key) for key in EngineInfo.__dataclass_fields__}
    for key in ("model", "tensorrt", "precision", "hardware", "sha256", "gpu"):
        text = known[key]
        if not (isinstance(text, str) and 0 < len(text) <= MAX_TEXT and text.isprintable()):
            raise ValueError(f"no valid {key!r}")
    capability, agreement, counts = values.get("capability"), known["agreement"], known["convolutions"]
    if not (_integers(capability, 2) and type(known["size"]) is int and type(known["version_compatible"]) is bool):
        raise ValueError("no valid 'capability', 'size' or 'version_compatible'")
    if not (agreement is None or (type(agreement) in (int, float) and 0 <= agreement <= 1)):
        raise ValueError("no valid 'agreement'")
    if not (isinstance(counts, dict) and all(type(n) is int for n in counts.values())):
        raise ValueError("no valid 'convolutions'")
    profiles = known["profiles"]
    if not isinstance(profiles, list) or not profiles:
        raise ValueError("no valid 'profiles'")
    known["profiles"] = tuple(_profile(profile) for profile in profiles)
    known["gpu"] = Gpu(str(known["gpu"]), tuple(capability))  # type: ignore[arg-type]
    return EngineInfo(**known)  # type: ignore[arg-type]


def _profile(values: object) -> Profile:
    shapes = [values.get(key) for key in ("minimum", "optimum", "maximum")] if isinstance(values, dict) else []
    if len(shapes) != 3 or not all(_integers(shape, 4) for shape in shapes):
        raise ValueError("no valid 'profiles'")
    return Profile(*(tuple(shape) for shape in shapes))  # type: ignore[arg-type]


def _integers(values: object, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(type(v) is int and v >= 0 for v in values)


def pack_entry(info: EngineInfo, data: bytes) -> bytes:
    """One file: a line that names the format, a line of JSON, the engine. Nothing in it is ever run by reading."""
    if len(data) > MAX_ENGINE_BYTES:
        raise EngineError(f"the engine has {len(data) >> 20} MiB, more than the {MAX_ENGINE_BYTES >> 20} that are kept")
    return MAGIC + json.dumps(info.json(), sort_keys=True).encode() + b"\n" + data


def unpack_entry(content: bytes) -> tuple[EngineInfo, bytes]:
    """Papers and engine from `pack_entry`'s bytes. Raises ValueError for anything damaged."""
    info, start = unpack_header(content)
    data = content[start:]
    if len(data) != info.size or hashlib.sha256(data).hexdigest() != info.sha256:
        raise ValueError("its digest does not fit")
    return info, data


def unpack_header(content: bytes) -> tuple[EngineInfo, int]:
    """Papers from the first `MAX_HEADER_BYTES` of a file or more, and where the engine starts."""
    end = content.find(b"\n", len(MAGIC), MAX_HEADER_BYTES)
    if not content.startswith(MAGIC) or end < 0:
        raise ValueError("it is not an engine of this program")
    try:
        return read_info(json.loads(content[len(MAGIC) : end])), end + 1
    except RecursionError:
        raise ValueError("its papers are nested too deep") from None
