"""The tensorrt package, imported when it is first needed, and what it logs."""

from __future__ import annotations

import functools
import importlib
import re
from collections import deque
from typing import Any

from histoseg_fast.errors import EngineError

OLDEST = (10, 13)
"""The first TensorRT with every interface used here; the same code runs on 11.x."""
INSTALL = "pip install 'histoseg-fast[tensorrt]'"
KEPT_MESSAGES = 50
"""Messages of TensorRT kept for the error line; the last error is what it prints."""
MAX_REASON = 300


@functools.cache
def tensorrt() -> Any:
    """The tensorrt module. Raises EngineError, with the command that helps, where it is missing or too old."""
    try:
        trt = importlib.import_module("tensorrt")
        version = str(trt.__version__)
    except Exception as error:  # a missing library raises OSError, ImportError, FileNotFoundError or RuntimeError
        reason = str(error).splitlines()[0][:MAX_REASON] if str(error) else type(error).__name__
        raise EngineError(f"TensorRT is not to be had here ({reason})", fix=INSTALL) from error
    if version_of(version) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise EngineError(f"TensorRT {version} is installed; {needed} or newer is needed", fix=INSTALL + " --upgrade")
    return trt


def version() -> str:
    """TensorRT's version here, e.g. "10.13.3.9"."""
    return str(tensorrt().__version__)


def version_of(text: str) -> tuple[int, ...]:
    """The numbers of a version, e.g. (10, 13, 3, 9) of "10.13.3.9.post1"."""
    return tuple(int(number) for number in re.findall(r"\d+", text.partition(".post")[0])[:4])


class Log:
    """What TensorRT said: warnings and errors, newest last. One for the process, as TensorRT wants it."""

    def __init__(self) -> None:
        self.messages: deque[tuple[bool, str]] = deque(maxlen=KEPT_MESSAGES)

    def clear(self) -> None:
        """Forget what was said, before a step whose own message is wanted."""
        self.messages.clear()

    def reason(self) -> str:
        """The last error (the last warning where there is none), in one line; "it gave no reason" otherwise."""
        said = [text for bad, text in self.messages if bad] or [text for _, text in self.messages]
        return " ".join(said[-1].split())[:MAX_REASON] if said else "it gave no reason"


log = Log()


@functools.cache
def logger() -> Any:
    """The one `ILogger` of this process, which fills `log`."""
    trt = tensorrt()
    bad = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
    kept = (*bad, trt.ILogger.Severity.WARNING)

    class Logger(trt.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in kept:
                log.messages.append((severity in bad, msg))

    return Logger()
