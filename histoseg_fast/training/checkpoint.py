"""Checkpoints: safetensors files of tensors with a JSON description in the header. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from histoseg_fast.errors import PlanError, UsageError
from histoseg_fast.files import atomic_write

FORMAT = "histoseg-fast checkpoint 1"
ZIP = b"PK\3\4"
MAX_TENSORS = 4096
"""Of a checkpoint; the time to read it grows with their square."""
REQUIRED = ("arch", "classes", "colours", "normalisation", "training")


def write_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> None:
    """Write `tensors` and `description` (architecture, classes, normalisation, scores, ...) as `write_whole` does."""
    header = {"format": FORMAT, "description": json.dumps(description, sort_keys=True)}
    payload = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata=header)
    write_whole(path, payload)


def write_whole(path: Path, payload: bytes) -> None:
    """Write `payload` to `path`; PlanError where that fails, and what `path` held before stays as it was."""
    try:
        with atomic_write(path, durable=True) as stream:
            stream.write(payload)
    except OSError as error:
        raise PlanError(
            f"cannot be written: {error.strerror or error}", where=path, fix="free space or choose another folder"
        ) from error


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and description of a checkpoint; PlanError if it is not one, UsageError if there is none."""
    try:
        with open(path, "rb") as stream:
            if stream.read(len(ZIP)) == ZIP:
                raise PlanError("is a plan, no checkpoint", where=path, fix="give a file that `train` wrote")
        with safe_open(str(path), framework="pt") as archive:
            header = archive.metadata() or {}
            if header.get("format") != FORMAT:
                raise PlanError(f"is not a {FORMAT!r}", where=path, fix="give a file that `train` wrote")
            description = json.loads(header["description"])
            if not isinstance(description, dict):
                raise PlanError("has a description that is no JSON object", where=path)
            if missing := [key for key in REQUIRED if key not in description]:
                raise PlanError(f"lacks {', '.join(missing)} in its description", where=path)
            if len(archive.keys()) > MAX_TENSORS:
                raise PlanError(f"holds {len(archive.keys())} tensors; {MAX_TENSORS} are allowed", where=path)
            return {name: archive.get_tensor(name) for name in archive.keys()}, description  # noqa: SIM118
    except FileNotFoundError:
        raise UsageError("no such checkpoint", where=path) from None
    except (SafetensorError, OSError, KeyError, RecursionError, json.JSONDecodeError) as error:
        raise PlanError(f"cannot be read as a checkpoint ({error})", where=path) from error
