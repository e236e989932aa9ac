"""What is read from a file: an ordinary file, a JSON object, fields of the types that a dataclass declares."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from setpoint.errors import CheckpointError
from setpoint.messages import a_type

MOST = 2**53
"""Above it a file's number is no count of steps or units, and no float holds it exactly."""
LARGEST = 10**100
"""Above it a file's number is of nothing that was measured, and squares of it overflow."""


def ordinary_file(path: str | os.PathLike[str]) -> Path:
    """The path, unless it has a null byte or is of a pipe or a device; a folder is left for `open` to name."""
    file = Path(path)
    if "\0" in str(file):
        raise CheckpointError(f"{str(file)!r} has a null byte, which no path can have")
    if file.exists() and not file.is_file() and not file.is_dir():
        raise CheckpointError(f"{str(file)!r} is a pipe or a device, not an ordinary file: give the file itself")
    return file


def json_object(line: str) -> dict[str, Any] | None:
    """The JSON object that a line holds; None for anything else, such as half a line."""
    try:
        value = json.loads(line)
        if "\\ud" in line.lower():  # half of a pair of surrogates cannot be printed
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # a number of thousands of digits is a ValueError, too
        return None
    return value if isinstance(value, dict) else None


def fields_of(kind: type, row: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a JSON object that are fields of a dataclass; an integer is a count, a null number NaN.

    A ValueError names the first field of another type.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Cut:
    ...     step: int
    ...     loss: float = 0.0
    >>> fields_of(Cut, {"step": 3, "loss": 1, "more": "of a later version"})
    {'step': 3, 'loss': 1.0}
    """
    return {name: _read(row[name], declared, f"its {name}") for name, declared in _types(kind).items() if name in row}


@cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(value: Any, declared: Any, where: str) -> Any:
    origin, inside = get_origin(declared), get_args(declared)
    if origin in (Union, UnionType):
        if value is None and NoneType in inside:
            return None
        kinds = [kind for kind in inside if kind is not NoneType]
        # A float may stand as an integer in JSON, so that the first kind is tried where none is the value's own.
        return _read(value, type(value) if type(value) in kinds else kinds[0], where)
    if origin is not None and issubclass(origin, Mapping):
        if isinstance(value, dict):  # keys of JSON are strings
            return {key: _read(item, inside[1], f"{where}[{key!r:.80}]") for key, item in value.items()}
    elif origin in (tuple, list):  # JSON has lists only
        if isinstance(value, (list, tuple)):
            return origin(_read(item, inside[0], f"{where}[{number}]") for number, item in enumerate(value))
    elif declared is float:
        if value is None:
            return math.nan
        if type(value) is float or (type(value) is int and abs(value) <= LARGEST):
            return float(value)
    elif type(value) is declared and (declared is not int or 0 <= value <= MOST):
        return value
    # Not `repr`: a value may be nested deeper than Python's stack.
    found = a_type(value) if isinstance(value, (dict, list)) else reprlib.repr(value)
    raise ValueError(f"{where} must be {_NAMES.get(origin or declared, declared)}, got {found}")


_NAMES = {
    Mapping: "an object",
    list: "a list",
    tuple: "a list",
    float: "a number",
    int: "a count",
    str: "a text",
    bool: "true or false",
}
