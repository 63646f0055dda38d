"""The errors this package raises: each says what is wrong, where, and what to do.

Every class also inherits the builtin that a caller would expect, so `except ValueError` and
`except OSError` work on them. The command line prints the message as one line and never a traceback.
"""

from __future__ import annotations

import os


class HistosegError(Exception):
    """Base of all errors of this package.

    Parameters
    ----------
    what : one clause that says what is wrong ("label colours are off the palette").
    where : the file, option or member it concerns; printed first.
    fix : what the reader can do about it; printed last.
    """

    def __init__(self, what: str, *, where: str | os.PathLike[str] | None = None, fix: str | None = None):
        self.what = what
        self.where = None if where is None else os.fspath(where)
        self.fix = fix
        text = what if self.where is None else f"{self.where}: {what}"
        super().__init__(one_line(text if fix is None else f"{text}; {fix}"))


class PlanError(HistosegError, ValueError):
    """A plan or checkpoint that is damaged, hostile, of another version, or not for this use."""


class ImageError(HistosegError, OSError):
    """An image that cannot be read or written."""


class LabelError(HistosegError, ValueError):
    """A label image or palette that breaks the contract (colours, shapes, class ids)."""


class DataError(HistosegError, ValueError):
    """A training or evaluation folder that cannot be used."""


class EngineError(HistosegError, RuntimeError):
    """An engine that cannot run here (device, precision, driver) or failed while running."""


class UsageError(HistosegError, ValueError):
    """Arguments that do not make sense together: exit code 2."""


def one_line(text: str) -> str:
    """`text` with control characters escaped, so that a hostile file name cannot forge a second line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
