"""Every line of docs/algorithm.md links to code that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "algorithm.md"
LINK = re.compile(r"\[`(?P<name>\w+)`\]\((?P<path>[^)#]+\.py)\)")
LINES = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| *[\d' -]* *\| ", line)]


def defined(path: Path) -> set[str]:
    """Names of all functions, methods and classes that a file defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)}


def broken(line: str) -> list[str]:
    """Links of a line that lead nowhere."""
    found = [(match["name"], (PAGE.parent / match["path"]).resolve()) for match in LINK.finditer(line)]
    return [f"{name} in {path}" for name, path in found if not path.exists() or name not in defined(path)]


@pytest.mark.parametrize("line", [line for line in LINES if "| step |" not in line and "| instead |" not in line])
def test_each_line_links_to_its_code(line: str) -> None:
    """A line of the method has a link at least, and what it names is defined in the file it points to."""
    assert LINK.search(line), "a line of the method without a link"
    assert broken(line) == []


def test_the_method_is_numbered_through() -> None:
    """The main lines are numbered from 1 without a gap, so that they can be cited."""
    numbers = [int(match[1]) for line in LINES if (match := re.match(r"\| (\d+) \|", line))]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 20
