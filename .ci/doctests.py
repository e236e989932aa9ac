"""An extension of griffe: doctests in docstrings become blocks of code, which Markdown would take for quotations."""

from __future__ import annotations

import textwrap
from itertools import groupby
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Puts a fence around each paragraph that begins with `>>>`, at its own indent."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _fenced(obj.docstring.value)


def _fenced(text: str) -> str:
    found: list[str] = []
    for blank, lines in groupby(text.splitlines(), key=lambda line: not line.strip()):
        block = list(lines)
        first = next((place for place, line in enumerate(block) if line.lstrip().startswith(">>> ")), None)
        if blank or first is None:
            found += block
            continue
        indent = block[first][: len(block[first]) - len(block[first].lstrip())]
        code = textwrap.indent(textwrap.dedent("\n".join(block[first:])), indent)
        found += [*block[:first], f"{indent}```pycon", code, f"{indent}```"]
    return "\n".join(found)
