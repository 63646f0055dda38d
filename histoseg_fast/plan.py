"""The plan file: one ZIP that holds a network, its engines and what is known of them.

Members are stored, not deflated, in a fixed order with fixed dates, so equal content gives equal bytes.
A plan is untrusted: everything is checked when it is read (names, sizes, digests, required fields and their
ranges) before any of it reaches an engine.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from histoseg_fast.errors import LabelError, PlanError, UsageError
from histoseg_fast.files import atomic_write, read_at_most
from histoseg_fast.labels import Palette
from histoseg_fast.onnx_graph import check_graph
from histoseg_fast.postprocess import NO_STEPS, PostProcessing
from histoseg_fast.tiling import check_tile

FORMAT, VERSION = "histoseg-fast plan", 1
MANIFEST, MODEL = "manifest.json", "model.onnx"
MAX_PLAN_BYTES = 1 << 30
MAX_MANIFEST_BYTES = 4 << 20
MAX_MEMBERS = 64
MAX_DIRECTORY_BYTES = 1 << 16
"""Of the ZIP's directory: Python makes an object of each entry, before any can be counted."""
MAX_STRIDE = 1024
MAX_HALO = 8192
MAX_TILE = 1 << 15
MAX_TEXT = 100
MIN_RANGE, MAX_RANGE = 1e-30, 1e30
MIN_MPP, MAX_MPP = 0.01, 20.0
DEFAULT_GATE = {"agreement": 0.995, "mean_iou": 0.002}
"""A faster precision is taken for fp32 if at least this share of pixels agree, and mIoU falls by no more than this."""
_MEMBER_NAME = re.compile(r"(manifest\.json|model\.onnx|engines/[A-Za-z0-9][A-Za-z0-9._-]{0,120})")
# In ONNX's protobuf, a tensor kept outside the model names its file under the key "location". A plan is complete
# in itself, so such a reference is an attempt to read other files. (The key alone: its length has many encodings.)
_EXTERNAL_DATA = b"location"
_END = struct.Struct("<4s8xIIH")
"""The last record of a ZIP: mark, size and place of the directory, bytes of a comment."""
_ZIP_ERRORS = (zipfile.BadZipFile, struct.error, EOFError, OverflowError, NotImplementedError, RuntimeError, OSError)
"""What zipfile raises on damage; OverflowError where an offset is beyond what the system counts to."""


@dataclass(frozen=True)
class Ranges:
    """What int8 rounds: the largest value of the tensor before (`inputs`: from 0, behind a ReLU) or behind (`outputs`:
    of both signs) each convolution of these names. The weights of every convolution in `inputs` are rounded too.
    """

    inputs: Mapping[str, float]
    outputs: Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """A verified plan: `manifest` as JSON values and the bytes of the other `members` by name."""

    manifest: Mapping[str, Any]
    members: Mapping[str, bytes]
    sha256: str
    path: Path | None = None

    @property
    def name(self) -> str:
        """The model's name, e.g. "final"."""
        return str(self.manifest["name"])

    @cached_property
    def palette(self) -> Palette:
        """Classes and colours; class ids are positions."""
        classes = self.manifest["classes"]
        return Palette(tuple(c["name"] for c in classes), tuple(tuple(c["colour"]) for c in classes))

    @property
    def stride(self) -> int:
        """Image sides are padded to a multiple of this many pixels."""
        return int(self.manifest["stride"])

    @property
    def halo(self) -> int:
        """Pixels of context a tile carries on each side that is not the image's edge; a multiple of the stride."""
        return int(self.manifest["halo"])

    @property
    def tile(self) -> int:
        """Default tile size in pixels, halo included."""
        return int(self.manifest["tile"]["default"])

    @property
    def mpp(self) -> float | None:
        """Micrometres a pixel that the network was trained at; None where the manifest does not say."""
        value = self.manifest.get("mpp")
        return None if value is None else float(value)

    @cached_property
    def postprocess(self) -> PostProcessing:
        """The steps after the network that the plan was compiled with; none where its manifest has no such key."""
        return PostProcessing.from_json(self.manifest.get("postprocess", NO_STEPS.as_json()))

    def choose_postprocess(self, wanted: str) -> PostProcessing:
        """The steps that `wanted` names: "plan" for the plan's own, else as `PostProcessing.parse` reads it."""
        return self.postprocess if wanted == "plan" else PostProcessing.parse(wanted)

    def agreement(self, precision: str) -> float | None:
        """Measured share of pixels whose class equals fp32's, or None where it was not measured."""
        return self._measured(precision, "agreement")

    def passes(self, precision: str) -> bool:
        """Whether `precision` was measured to be as good as fp32: within the manifest's gate of agreement and mIoU."""
        gate = self.manifest.get("gate", DEFAULT_GATE)
        agreement, reached, exact = (
            self._measured(*key) for key in ((precision, "agreement"), (precision, "mean_iou"), ("fp32", "mean_iou"))
        )
        kept = reached is None or exact is None or reached >= exact - gate["mean_iou"]
        return agreement is not None and agreement >= gate["agreement"] and kept

    def _measured(self, precision: str, key: str) -> float | None:
        value = self.manifest["precisions"].get(precision, {}).get(key)
        return None if value is None else float(value)

    @cached_property
    def ranges(self) -> Ranges | None:
        """What int8 needs to know, or None where the plan was compiled without."""
        found = self.manifest.get("int8")
        return None if found is None else Ranges(found["inputs"], found["outputs"])


def write_plan(path: str | Path, manifest: Mapping[str, Any], members: Mapping[str, bytes]) -> Plan:
    """Write a plan, whole or not at all, and return it as read back. `members` must hold model.onnx.

    `format`, `version` and `members` (size and sha256 of each) are added to the manifest. Raises PlanError
    if what was given does not make a valid plan, or `path` cannot be written.
    """
    data = pack(manifest, members)
    plan = unpack(data, Path(path))
    try:
        with atomic_write(path, durable=True) as stream:
            stream.write(data)
    except OSError as error:
        raise PlanError(f"cannot be written ({error.strerror or error})", where=path) from error
    return plan


def pack(manifest: Mapping[str, Any], members: Mapping[str, bytes]) -> bytes:
    """The bytes of a plan file; see `write_plan`."""
    digests = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in sorted(members.items())
    }
    full = {**manifest, "format": FORMAT, "version": VERSION, "members": digests}
    try:
        text = json.dumps(full, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise PlanError(f"its manifest is no JSON ({error})") from error
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, data in ((MANIFEST, text), *sorted(members.items())):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, data)
    return stream.getvalue()


def read_plan(path: str | Path) -> Plan:
    """Read and verify a plan file. Raises PlanError, in one line, for anything that is not a sound plan."""
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            data = read_at_most(stream, MAX_PLAN_BYTES)
    except FileNotFoundError:
        raise PlanError("no such plan", where=path) from None
    except OSError as error:
        raise PlanError(f"cannot be read ({error.strerror})", where=path) from error
    return unpack(data, path)


def unpack(data: bytes, path: Path | None = None) -> Plan:
    """The plan held by `data`; `path` is named in errors. See `read_plan`."""
    try:
        manifest, members = _unpack(data)
        plan = Plan(manifest, members, hashlib.sha256(data).hexdigest(), path)
        _check_manifest(plan)
    except (PlanError, UsageError) as error:
        raise PlanError(error.what, where=path, fix=error.fix) from None
    except RecursionError:
        raise PlanError("has a manifest nested too deep", where=path) from None
    return plan


def _unpack(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    if len(data) > MAX_PLAN_BYTES:
        raise PlanError(f"is larger than {MAX_PLAN_BYTES >> 20} MiB, the limit for a plan")
    if not data.startswith(b"PK\x03\x04"):
        raise PlanError("is not a plan file", fix="make one with `histoseg-fast compile`")
    try:
        _check_directory(data)
        archive = zipfile.ZipFile(io.BytesIO(data))
        infos = archive.infolist()
        _check_members(infos, len(data))
        contents = {info.filename: archive.read(info) for info in infos}
        manifest = json.loads(contents.pop(MANIFEST).decode("utf-8"))
    except (PlanError, RecursionError):
        raise
    except (*_ZIP_ERRORS, ValueError, KeyError) as error:
        raise PlanError(f"is damaged ({error})", fix="copy or compile it again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise PlanError("is a ZIP file but not a plan", fix="make one with `histoseg-fast compile`")
    version = manifest.get("version")
    if type(version) is not int or version != VERSION:
        raise PlanError(f"has plan version {str(version)[:20]!r}, this program reads {VERSION}", fix="compile it again")
    try:
        json.dumps(manifest, allow_nan=False)  # Python reads NaN, and 1e999 as infinity; no other JSON reader does
    except ValueError as error:
        raise PlanError("has a number in its manifest that is not finite") from error
    return manifest, contents


def _check_directory(data: bytes) -> None:
    """The ZIP's last record: a directory of bounded size right before it; no comment, no ZIP64, nothing in front."""
    magic, size, start, comment = _END.unpack(data[-_END.size :].rjust(_END.size, b"\0"))
    if magic == b"PK\x05\x06" and size > MAX_DIRECTORY_BYTES:
        raise PlanError(f"has a directory of {size} bytes, too many members")
    if magic != b"PK\x05\x06" or comment or start + size + _END.size != len(data):
        raise zipfile.BadZipFile("its last record does not fit")


def _check_members(infos: list[zipfile.ZipInfo], size: int) -> None:
    names = [info.filename for info in infos]
    if len(infos) > MAX_MEMBERS or len({name.casefold() for name in names}) != len(names):
        raise PlanError("has too many members, or one twice")
    for info in infos:
        if not _MEMBER_NAME.fullmatch(info.filename):
            raise PlanError(f"has a member that no plan has: {info.filename[:80]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise PlanError(f"member {info.filename} is compressed or encrypted; plans are stored")
        if info.file_size > (min(size, MAX_MANIFEST_BYTES) if info.filename == MANIFEST else size):
            raise PlanError(f"member {info.filename} claims {info.file_size} bytes")
    if sum(info.file_size for info in infos) > size:
        raise PlanError("has members that overlap: together they claim more bytes than the file has")
    if missing := [name for name in (MANIFEST, MODEL) if name not in names]:
        raise PlanError(f"lacks {' and '.join(missing)}")


def _check_manifest(plan: Plan) -> None:
    """Required fields, their types and ranges, and the digest of every member."""
    manifest, members = plan.manifest, plan.members
    listed = _field(manifest, "members", dict)
    if set(listed) != set(members):
        raise PlanError("holds other members than its manifest lists")
    for name, data in members.items():
        if listed[name] != {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}:
            raise PlanError(f"member {name} does not match its digest", fix="copy or compile the plan again")
    if _EXTERNAL_DATA in members[MODEL]:
        raise PlanError(f"{MODEL} refers to files outside the plan")
    try:
        check_graph(members[MODEL])
    except PlanError as error:
        raise PlanError(f"{MODEL} {error.what}", fix="compile the plan again") from None
    for key in ("name", "arch", "precision"):
        _check_text(_field(manifest, key, str), key)
    for key in ("training", "scores", "made_with", "normalisation"):
        _field(manifest, key, dict)
    stride, halo = _integer(manifest, "stride", 1, MAX_STRIDE), _integer(manifest, "halo", 0, MAX_HALO)
    tile = _integer(_field(manifest, "tile", dict), "default", 1, MAX_TILE)
    if halo % stride:
        raise PlanError(f"has halo {halo}, no multiple of its stride {stride}")
    check_tile(tile, halo, stride)
    for precision, measured in _field(manifest, "precisions", dict).items():
        _check_text(precision, "precisions")
        for key in ("agreement", "mean_iou"):
            value = measured.get(key) if isinstance(measured, dict) else "none"
            if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
                raise PlanError(f"has no valid {key} for {precision!r}")
    _check_gate(manifest.get("gate", DEFAULT_GATE))
    _check_ranges(manifest.get("int8", {"inputs": {}, "outputs": {}}))
    _check_mpp(manifest.get("mpp"))
    if "postprocess" in manifest:
        PostProcessing.from_json(manifest["postprocess"])
    try:
        names = plan.palette.names
    except (LabelError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"has no valid classes ({str(error)[:200]})") from error
    for name in names:
        _check_text(name, "classes")


def _check_gate(gate: Any) -> None:
    if not isinstance(gate, dict) or gate.keys() != DEFAULT_GATE.keys():
        raise PlanError("has no valid 'gate' in its manifest")
    if not all(isinstance(v, int | float) and 0 <= v <= 1 for v in gate.values()):
        raise PlanError("has a 'gate' beyond 0 to 1 in its manifest")


def _check_mpp(mpp: Any) -> None:
    known = isinstance(mpp, int | float) and not isinstance(mpp, bool)
    if mpp is not None and not (known and MIN_MPP <= mpp <= MAX_MPP):
        raise PlanError(f"has 'mpp' = {str(mpp)[:40]} in its manifest; {MIN_MPP:g} to {MAX_MPP:g} is allowed")


def _check_ranges(ranges: Any) -> None:
    if not isinstance(ranges, dict) or ranges.keys() != {"inputs", "outputs"}:
        raise PlanError("has no valid 'int8' in its manifest")
    for limits in ranges.values():
        valid = isinstance(limits, dict) and all(
            isinstance(v, int | float) and MIN_RANGE < v < MAX_RANGE and len(name) <= MAX_TEXT
            for name, v in limits.items()
        )
        if not valid:
            raise PlanError("has 'int8' ranges that are no positive numbers by layer in its manifest")


def _check_text(value: str, key: str) -> None:
    """What is printed and written to tables must not forge lines, steer a terminal or fail to encode."""
    if not (0 < len(value) <= MAX_TEXT and value.isprintable()):
        raise PlanError(f"has no valid {key!r} in its manifest: names are 1 to {MAX_TEXT} printable characters")


def _field(values: Mapping[str, Any], key: str, kind: type) -> Any:
    if not isinstance(values.get(key), kind):
        raise PlanError(f"has no valid {key!r} in its manifest")
    return values[key]


def _integer(values: Mapping[str, Any], key: str, least: int, most: int) -> int:
    value = values.get(key)
    if type(value) is not int or not least <= value <= most:
        raise PlanError(f"has {key!r} = {str(value)[:40]} in its manifest; {least} to {most} is allowed")
    return value
