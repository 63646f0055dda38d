"""Reading of hostile files in a process that may take little memory more than it has."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import PATIENCE

from histoseg_fast.errors import HistosegError
from histoseg_fast.images import open_image

ROOM = 128 << 20
"""Bytes of address space, those of the threads of the allocator included; the bombs here are larger."""
ROWS = 64


def confined(function: Callable[..., Any], *arguments: object, room: int = ROOM) -> Any:
    """What `function` returns, or the HistosegError it raises, from a process that gets `room` bytes more."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("the limit on memory is Linux's")
    server = multiprocessing.get_context("forkserver")
    receiver, sender = server.Pipe(duplex=False)
    child = server.Process(target=_work, args=(sender, room, function, arguments))
    child.start()
    sender.close()
    try:
        assert receiver.poll(PATIENCE), "it hangs"
        answer = receiver.recv()
    except EOFError:
        raise AssertionError("it crashed") from None
    finally:
        child.kill()
        child.join()
        receiver.close()
    if isinstance(answer, str):
        assert "not enough memory" not in answer, answer
        assert answer.isprintable() and len(answer) < 1000
        raise HistosegError(answer)
    return answer[0]


def read_all(paths: list[Path]) -> list[tuple[int, int] | str]:
    """Of each: what `read` gives, or what is wrong."""
    answers: list[tuple[int, int] | str] = []
    for path in paths:
        try:
            answers.append(read(path))
        except HistosegError as error:
            answers.append(str(error))
    return answers


def read(path: Path) -> tuple[int, int]:
    """Open an image and decode its first rows; its width and height."""
    with open_image(path) as image:
        rows = np.empty((min(image.height, ROWS), image.width, 3), np.uint8)
        image.read_rows(0, len(rows), rows)
        return image.width, image.height


def _work(sender: Connection, room: int, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    with open("/proc/self/statm") as stream:
        used = int(stream.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    try:
        sender.send((function(*arguments),))
    except HistosegError as error:
        sender.send(str(error))
