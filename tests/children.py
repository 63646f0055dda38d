"""`histoseg-fast` in processes that can be broken: forked off a server that has imported everything, so that one costs
hundredths of a second, with a fault of the test's choice inside.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from running import PATIENCE, FakeEngine

Fault = Callable[[], None]
"""Called in the child before the command runs. A function of a module, or a partial of one: it travels by name."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["histoseg_fast.cli", "histoseg_fast.pipeline.run", "openvino", "tifffile", "running"])
_numbers = itertools.count()


@dataclass(frozen=True)
class Ended:
    """How a child ended. code : as `subprocess` has it, negative for a signal."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that say what went wrong: all of stderr but what `infer` says as it starts."""
        return [line for line in self.err.splitlines() if "image(s) on cpu" not in line]


class Child:
    """`histoseg-fast ARGUMENTS...` in a process of its own; what it prints goes to files in `folder`."""

    def __init__(self, folder: Path, *arguments: object, fault: Fault | None = None, bug: bool = False):
        """bug : whether the command is to say that it met one; no other does."""
        folder.mkdir(parents=True, exist_ok=True)
        self._bug = bug
        self._said = [folder / f"{os.getpid()}-{next(_numbers)}.{name}" for name in ("out", "err")]
        self.process = _server.Process(target=_main, args=([*map(str, arguments)], *map(str, self._said), fault))
        self.process.start()

    def wait(self) -> Ended:
        """Wait for its end, which must come."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"the command hangs; it said: {self._said[1].read_text(errors='replace')}")
        assert self.process.exitcode is not None
        out, err = (path.read_text(errors="backslashreplace") for path in self._said)
        assert "Traceback" not in err and ("unexpected" in err) == self._bug, err
        return Ended(self.process.exitcode, out, err)


def run_child(folder: Path, *arguments: object, fault: Fault | None = None, bug: bool = False) -> Ended:
    """Run a child to its end."""
    return Child(folder, *arguments, fault=fault, bug=bug).wait()


def fake_engine() -> None:
    """A fault that is none: infer without OpenVINO, for tests of all the rest."""
    from histoseg_fast.pipeline import run

    run.open_engine = lambda plan, **options: FakeEngine()  # type: ignore[assignment]


def _main(arguments: list[str], out: str, err: str, fault: Fault | None) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = ["histoseg-fast", *arguments]
    if fault is not None:
        fault()
    from histoseg_fast.cli import main

    main()
