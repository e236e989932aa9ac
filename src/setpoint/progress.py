"""Progress: a line on a terminal or below a notebook's cell while work is done; elsewhere a record of the log."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_RUNNING: list[str] = []
"""What is being done now, the outermost first."""


@contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """While inside, stderr shows what is being done; at the end the line is erased.

    Where stderr is no terminal, the logger `setpoint` says so at INFO. Of several processes of `torchrun` the first
    does. Yields a function that takes the share that is done.

    >>> with progress("measuring") as show:
    ...     show(0.5)
    """
    if os.environ.get("RANK", "0") != "0" or not _on_terminal():
        if os.environ.get("RANK", "0") == "0":
            logging.getLogger("setpoint").info("%s ...", what)
        yield lambda share: None
        return
    _RUNNING.append(what)
    _draw()
    try:
        yield lambda share: _draw(f" {share:.0%}")
    finally:
        _RUNNING.pop()
        _draw()


def _draw(share: str = "") -> None:
    width = shutil.get_terminal_size().columns - 1
    text = f"setpoint: {': '.join(_RUNNING)}{share}"[:width] if _RUNNING else ""
    # Spaces erase what a longer line left; notebooks know a carriage return, but no escape sequence that erases.
    sys.stderr.write(f"\r{' ' * width}\r{text}")
    sys.stderr.flush()


def _on_terminal() -> bool:
    """Whether stderr is one; a program may have put something else there, or nothing, or closed it."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False
