"""What a command says on stderr while it runs: lines for people, or one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
from datetime import datetime, timezone
from typing import Any

from histoseg_fast.errors import one_line

FORMATS = ("text", "json")

_json = False
_lock = threading.Lock()


def use(name: str) -> None:
    """Take one of `FORMATS` from now on; as JSON also what libraries warn of."""
    global _json
    _json = name == "json"
    warned = logging.getLogger("py.warnings")
    logging.captureWarnings(_json)
    if _json:
        logging.lastResort = _HANDLER
        warned.addHandler(_HANDLER)
    else:
        logging.lastResort = _LAST_RESORT
        warned.removeHandler(_HANDLER)


def as_json() -> bool:
    """Whether lines are JSON objects."""
    return _json


def write(level: str, event: str, text: str, **fields: Any) -> None:
    """One line. level : "info", "warning" or "error". event : what happened, in a word.

    As text it is `text`; as JSON an object of time, level, event, `fields` and, as message, `text`. Bytes of file names
    that are no UTF-8 come as the six characters of \\udc80 to \\udcff: no reader of JSON stumbles over them.
    """
    line = one_line(text)
    if _json:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        values = {"time": now, "level": level, "event": event, **fields, "message": line}
        line = json.dumps(_encodable(values), ensure_ascii=True, allow_nan=False, default=str)
    # Several threads tell what they finished. A log that is full, or that nobody reads any more, ends no run.
    with _lock, contextlib.suppress(OSError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(v) for v in value]
    return value


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= logging.ERROR else "warning"
        write(level, "notice", " ".join(record.getMessage().split()))


_LAST_RESORT, _HANDLER = logging.lastResort, _Handler(logging.WARNING)
