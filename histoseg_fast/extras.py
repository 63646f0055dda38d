"""The optional parts: which packages each extra brings, and one clear line where one is missing."""

from __future__ import annotations

import importlib.util

from histoseg_fast.errors import UsageError


def has(*packages: str) -> bool:
    """Whether all `packages` are installed; imports none of them."""
    return all(importlib.util.find_spec(package) is not None for package in packages)


def need(extra: str, *packages: str) -> None:
    """Raise UsageError, with the command that helps, unless all `packages` of `extra` are installed."""
    if missing := [package for package in packages if not has(package)]:
        raise UsageError(f"this needs {', '.join(missing)}", fix=f"pip install 'histoseg-fast[{extra}]'")
