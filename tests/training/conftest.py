"""How tests train: on one thread, a tiny network, a folder that is easy to learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_folders import easy_folder
from tiny_training import OPTIONS, TinyNetwork

from histoseg_fast.training import loop
from histoseg_fast.training.loop import train


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On networks this small a second thread only waits, and waits long on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> type[TinyNetwork]:
    """Make the loop build TinyNetwork whatever the architecture."""
    monkeypatch.setattr(TinyNetwork, "poison", None)
    monkeypatch.setattr(loop, "make_network", TinyNetwork)
    return TinyNetwork


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images to train on, one to validate on, easy to tell apart by colour."""
    return easy_folder(tmp_path_factory.mktemp("data") / "easy", side=24)


@pytest.fixture
def fit(tiny: type[TinyNetwork], folder: Path) -> Callable[..., dict[str, Any]]:
    """`fit(out, option=value, ...)` trains the tiny network on `folder`; `lines` collects what it reports."""

    def run(out: Path, root: Path = folder, lines: list[str] | None = None, **changes: Any) -> dict[str, Any]:
        return train(root, out, replace(OPTIONS, **changes), ([] if lines is None else lines).append)

    return run
