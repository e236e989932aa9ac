"""The notebook of the Trainer's tutorial, made from its page: python .ci/notebook.py"""

from __future__ import annotations

import json
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tutorials" / "trainer.md"
FENCE = re.compile(r"^```(py|text)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
SITE = "https://github.com/setpoint-developers/setpoint"
SETUP = f"!git clone -q {SITE}\n%pip install -q ./setpoint transformers accelerate datasets\n"


def notebook(page: str) -> dict[str, Any]:
    """A cell for each block of code and for the text between; output that the page shows stays out."""
    cells, at = [_code(SETUP)], 0
    for block in FENCE.finditer(page):
        cells += _text(page[at : block.start()])
        cells += [_code(dedent(block[2]))] if block[1] == "py" else []
        at = block.end()
    cells += _text(page[at:])
    return {"cells": cells, "metadata": {"language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 4}


def _code(text: str) -> dict[str, Any]:
    lines = text.strip().splitlines(keepends=True)
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": lines}


def _text(text: str) -> list[dict[str, Any]]:
    absolute = re.sub(r"\]\(\.\./\.\./", f"]({SITE}/blob/main/", text.strip())
    absolute = re.sub(r"\]\(\.\./", f"]({SITE}/blob/main/docs/", absolute)
    absolute = re.sub(r"\]\((?!http)", f"]({SITE}/blob/main/docs/tutorials/", absolute)
    return [{"cell_type": "markdown", "metadata": {}, "source": absolute.splitlines(keepends=True)}] if absolute else []


if __name__ == "__main__":
    made = notebook(PAGE.read_text(encoding="utf-8"))
    PAGE.with_suffix(".ipynb").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
