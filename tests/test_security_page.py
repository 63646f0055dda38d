"""docs/security.md names tests that exist and limits that have the values it says."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text("utf-8")
TESTS = sorted(set(re.findall(r"`(tests/[\w/.]+\.py)::(\w+)`", PAGE)))
LIMITS = re.findall(r"^\| `([\w.]+)\.(\w+)`[^|]* \| (\d+) \|$", PAGE, re.MULTILINE)


def test_every_test_that_is_named_exists() -> None:
    assert len(TESTS) > 50
    missing = []
    for path, name in TESTS:
        tree = ast.parse((ROOT / path).read_text("utf-8")) if (ROOT / path).is_file() else ast.parse("")
        if not any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body):
            missing.append(f"{path}::{name}")
    assert not missing


def test_every_row_of_threats_names_a_test() -> None:
    body = PAGE[PAGE.index("## Images") : PAGE.index("## Limits")]
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    heads = [line for line in rows if line.startswith(("| threat |", "| fault |", "| --- |"))]
    assert len(rows) - len(heads) > 35
    assert [line for line in rows if line not in heads and "::test_" not in line] == []


def test_every_fault_and_every_hostile_file_is_on_the_page() -> None:
    """The other way around: no file of these tests is left out."""
    files = {
        path.relative_to(ROOT).as_posix()
        for name in ("faults", "hostile")
        for path in (ROOT / "tests" / name).glob("test_*.py")
    }
    assert files and files == {path for path, _ in TESTS if path in files}


@pytest.mark.parametrize(("module", "name", "value"), LIMITS)
def test_limits_have_the_values_that_are_told(module: str, name: str, value: str) -> None:
    if module.startswith("histoseg_fast.training"):
        pytest.importorskip("torch")
    assert getattr(importlib.import_module(module), name) == int(value)


def test_limits_are_told() -> None:
    assert len(LIMITS) > 15
