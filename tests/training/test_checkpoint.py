"""Checkpoints: what is written comes back, anything else is one clear line, and a full disk loses nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from histoseg_fast.errors import PlanError, UsageError
from histoseg_fast.training import checkpoint
from histoseg_fast.training.checkpoint import FORMAT, REQUIRED, read_checkpoint, write_checkpoint

DESCRIPTION = {
    "arch": "final",
    "classes": ["background", "cancer"],
    "colours": [[0, 0, 0], [255, 0, 0]],
    "normalisation": {"mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]},
    "training": {"options": {"lr": 1e-4, "name": "é"}},
    "scores": {"val": {"cross_entropy": 0.25}},
}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "weight": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        "half": torch.randn(5).bfloat16(),
        "step": torch.tensor(7.0),
        "leaf": torch.nn.Parameter(torch.randn(2, 2)),
    }


def refused(path: Path) -> str:
    with pytest.raises(PlanError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.safetensors"
    write_checkpoint(path, tensors(), DESCRIPTION)
    loaded, description = read_checkpoint(path)
    assert description == DESCRIPTION
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_the_header_can_be_read_without_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, tensors(), DESCRIPTION)
    data = path.read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert metadata["format"] == FORMAT and json.loads(metadata["description"]) == DESCRIPTION


@pytest.mark.parametrize("key", REQUIRED)
def test_required_keys(tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, tensors(), {k: v for k, v in DESCRIPTION.items() if k != key})
    assert f"lacks {key}" in refused(path)


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        (None, "is not a"),
        ({"format": "pt"}, "is not a"),
        ({"format": "histoseg-fast checkpoint 2", "description": "{}"}, "give a file that `train` wrote"),
        ({"format": FORMAT}, "cannot be read"),
        ({"format": FORMAT, "description": "{"}, "cannot be read"),
        ({"format": FORMAT, "description": "[" * 100_000}, "cannot be read"),
        ({"format": FORMAT, "description": "5"}, "no JSON object"),
        ({"format": FORMAT, "description": "[]"}, "no JSON object"),
        ({"format": FORMAT, "description": "{}"}, "lacks " + ", ".join(REQUIRED)),
    ],
)
def test_other_safetensors_files(tmp_path: Path, metadata: dict[str, str] | None, told: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata=metadata)
    assert told in refused(path)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, tensors(), DESCRIPTION)
    data = path.read_bytes()
    for length in (0, 1, 7, 8, 40, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert "cannot be read as a checkpoint" in refused(path)
    for other in (b"\xff" * 64, b"GIF89a" * 20, data[:8] + b"x" * (len(data) - 8), data + b"more"):
        path.write_bytes(other)
        assert "cannot be read as a checkpoint" in refused(path)
    with pytest.raises(UsageError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "gone.safetensors")
    refused(tmp_path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(mark),)

    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    refused(path)
    torch.save({"a": torch.zeros(1), "b": Bomb()}, path)
    refused(path)
    assert not mark.exists()


class FullDisk:
    """A stream that takes some bytes and then has no room."""

    def __init__(self, stream: object):
        self._stream = stream

    def write(self, data: bytes) -> None:
        self._stream.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, tensors(), DESCRIPTION)
    before = path.read_bytes()
    atomic_write = checkpoint.atomic_write

    @contextlib.contextmanager
    def full(target: Path, *, durable: bool = False) -> Iterator[FullDisk]:
        with atomic_write(target, durable=durable) as stream:
            yield FullDisk(stream)

    monkeypatch.setattr(checkpoint, "atomic_write", full)
    with pytest.raises(PlanError, match=r"a\.safetensors: cannot be written: No space left on device; free space"):
        write_checkpoint(path, tensors(1), DESCRIPTION)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == before


def test_a_full_disk_at_the_last_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, tensors(), DESCRIPTION)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PlanError, match="No space left"):
        write_checkpoint(path, tensors(1), DESCRIPTION)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert torch.equal(read_checkpoint(path)[0]["half"], tensors()["half"])
