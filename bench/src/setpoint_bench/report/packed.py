"""Packed results: the files of a results folder as compressed tables, small enough to be committed."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from setpoint.errors import ReportError

SUFFIX = ".xz"
"""What a packed file's name ends with."""
HISTORIES = f"histories.jsonl{SUFFIX}"


def file_of(folder: Path, name: str) -> Path:
    """The file of this name in a results folder, packed if the folder is.

    Raises:
        ReportError: the folder holds both.
    """
    plain, packed = folder / name, folder / f"{name}{SUFFIX}"
    if plain.exists() and packed.exists():
        raise ReportError(
            f"{folder} holds {plain.name} and {packed.name}: pack the runs into it, or move one of the two"
        )
    return packed if packed.exists() else plain


def text_of(path: Path) -> str:
    """What a file of results holds, packed or not; bytes that are no UTF-8 are replaced.

    Raises:
        ReportError: a packed file is damaged.
    """
    if path.suffix != SUFFIX:
        return path.read_text(encoding="utf-8", errors="replace")
    try:
        with lzma.open(path, "rt", encoding="utf-8", errors="replace") as file:
            return file.read()
    except (EOFError, lzma.LZMAError) as error:
        raise ReportError(f"{path} is damaged: restore it, or pack its runs again") from error


def write_packed(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON objects as a packed file, one a line; the file is replaced at once, so it is never half old."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    unfinished = path.with_name(f"{path.name}.partial")
    unfinished.write_bytes(lzma.compress(text.encode(), preset=9))
    unfinished.replace(path)


def packed_history(folder: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The lines of a cell's history as one object: a list by key, None where a line lacks it.

    >>> packed_history("cell", [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4, "accuracy": 0.9}])
    {'folder': 'cell', 'history': {'step': [1, 2], 'loss': [0.5, 0.4], 'accuracy': [None, 0.9]}}
    """
    keys = dict.fromkeys(key for line in lines for key in line)
    return {"folder": folder, "history": {key: [line.get(key) for line in lines] for key in keys}}


def read_histories(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of the packed histories of a folder, by cell's folder; none where the folder is not packed."""
    path = folder / HISTORIES
    if not path.is_file():
        return {}
    try:
        found = map(json.loads, text_of(path).splitlines())
        return {str(each["folder"]): _lines(each["history"]) for each in found}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ReportError(f"{path} is damaged: restore it, or pack its runs again") from error


def _lines(history: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    rows = zip(*history.values(), strict=True)
    return [{key: value for key, value in zip(history, row, strict=True) if value is not None} for row in rows]
