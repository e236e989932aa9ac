"""Reference tables: what a page of the API reference holds, for readers of the repository."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import setpoint


def reference_table(page: Path) -> str:
    """The names of a page of the reference, each with its arguments and the first sentence of its docstring."""
    lines = ["| name | what it is |", "|---|---|"]
    for dotted in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        module, _, name = dotted.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        shown = f"setpoint.{name}" if getattr(setpoint, name, None) is found else dotted
        if inspect.isfunction(found):
            stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
            parameters = inspect.signature(found).parameters.values()
            shown += f"({', '.join(stars.get(each.kind, '') + each.name for each in parameters)})"
        text = " ".join((inspect.getdoc(found) or "").split("\n\n")[0].split())
        first = re.split(r"(?<=[.;:]) (?=[A-Z])", text)[0].replace("|", r"\|")
        lines.append(f"| `{shown}` | {first} |")
    return "\n".join(lines)
