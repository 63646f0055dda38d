"""The plans that ship with the package, by name."""

from __future__ import annotations

import os
from pathlib import Path

from histoseg_fast.errors import UsageError
from histoseg_fast.plan import Plan, read_plan

FOLDER = Path(__file__).parent
SHIPPED = ("fast", "final")


def open_plan(name: str) -> Plan:
    """The plan in the file `name`, or the shipped plan of that name. UsageError: none such; PlanError: damaged."""
    if name in SHIPPED and not Path(name).is_file():
        return read_plan(FOLDER / f"{name}.plan")
    if not os.path.exists(name):  # False, too, for a name that no file can have
        raise UsageError("no such plan", where=name, fix=f"give a .plan file, or one of {', '.join(SHIPPED)}")
    return read_plan(name)
