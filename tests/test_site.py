"""Site: every page is in the navigation, every error has its mend, every option is explained, every line of the
algorithm links to code that exists, and the site builds.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

import setpoint
from setpoint import errors
from setpoint.cli import app

ROOT = Path(__file__).parents[1]
ALGORITHM = ROOT / "docs" / "algorithm.md"
PAGES = list((ROOT / "docs").rglob("*.md"))


def test_every_page_is_in_the_navigation() -> None:
    """Claim: each page of docs/ stands in mkdocs.yml once, and the guide has at most 22."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = re.findall(r"[:-] ([\w/-]+\.md)$", nav, re.M)
    assert len(named) == len(set(named)) and set(named) == {str(page.relative_to(ROOT / "docs")) for page in PAGES}
    assert nav.partition("- Evidence:")[0].count(".md\n") <= 22


def test_the_site_is_short() -> None:
    """Claim: the pages have fewer than 60,000 words in all."""
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in PAGES) < 60_000


def test_every_error_has_its_cause_and_mend() -> None:
    """Claim: each class of errors.py has a section of troubleshooting.md, and no section is of none."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    classes = {name for name, each in vars(errors).items() if inspect.isclass(each) and issubclass(each, Exception)}
    classes -= {"SetpointError"}
    assert set(re.findall(r"^## (\w+(?:Error|Unavailable))$", text, re.M)) == classes


def test_pages_use_the_words_of_the_field() -> None:
    """Claim: pages say baseline, resume and again, and none of the words that once stood in their place."""
    words = re.compile(r"\b(level with|alike|anew|for certain|clear of 0|open loop|goe?s? on|beside)\b", re.I)
    assert {page.name: found for page in PAGES if (found := words.findall(page.read_text(encoding="utf-8")))} == {}


def test_every_option_is_explained() -> None:
    """Claim: cli.md names each command and each of its options."""
    pytest.importorskip("setpoint_bench")
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"setpoint {name}" in text
        for option in (each for each in command.params if each.opts[0].startswith("--")):
            assert f"`{option.opts[0]}" in text, (name, option.opts)


def test_every_public_name_is_in_the_reference() -> None:
    """Claim: each name of `setpoint` stands on the page of the Python API, or is an error."""
    page = (ROOT / "docs" / "api" / "use.md").read_text(encoding="utf-8")
    shown = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith("::: ")}
    assert set(setpoint.__all__) - {"SetpointError"} <= shown


LINK = re.compile(r"\[`(?P<name>\w+)`\]\((?P<path>[^)#]+\.py)\)")
LINES = [line for line in ALGORITHM.read_text(encoding="utf-8").splitlines() if re.match(r"\| *[\d' -]* *\| ", line)]


def defined(path: Path) -> set[str]:
    """Names of all functions, methods and classes that a file defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)}


def broken(line: str) -> list[str]:
    """Links of a line that lead nowhere."""
    found = [(match["name"], (ALGORITHM.parent / match["path"]).resolve()) for match in LINK.finditer(line)]
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


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Claim: it builds without a warning: no page, link, anchor or name of the reference is missing."""
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "troubleshooting" / "index.html").is_file()
