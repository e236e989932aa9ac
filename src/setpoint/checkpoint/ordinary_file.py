"""An ordinary file: what can be read to its end, and not a pipe, at which a reader waits for ever."""

from __future__ import annotations

import os
from pathlib import Path

from setpoint.errors import CheckpointError


def ordinary_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file that can be opened; a folder, or what does not exist, is left for `open` to name.

    Raises:
        CheckpointError: for a pipe, a device, or a path with a null byte.
    """
    file = Path(path)
    if "\0" in str(file):
        raise CheckpointError(f"{str(file)!r} has a null byte, which no path can have")
    if file.exists() and not file.is_file() and not file.is_dir():
        raise CheckpointError(f"{str(file)!r} is a pipe or a device, not an ordinary file: give the file itself")
    return file
