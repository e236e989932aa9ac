"""What is under way: a line on a terminal while something takes its time, and a record of the log elsewhere."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SCREEN: list[Any] = []
"""The progress that is shown now, by Rich; what begins inside it gets a line of its own there."""


@contextmanager
def under_way(what: str) -> Iterator[Callable[[float], None]]:
    """While inside, tell on a terminal's stderr that this is under way, and for how long; the line goes away again.

    Elsewhere the logger `setpoint` says so at INFO. Of several processes of `torchrun` the first does. Gives a function
    that takes the share that is done.

    >>> with under_way("measuring") as show:
    ...     show(0.5)
    """
    if _SCREEN:
        yield from _line(_SCREEN[-1], f"  {what}")
    elif os.environ.get("RANK", "0") != "0":
        yield lambda share: None
    elif not _on_terminal():
        logging.getLogger("setpoint").info("%s ...", what)
        yield lambda share: None
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        # What the model prints stays where it was sent to.
        settings: dict[str, Any] = {"transient": True, "redirect_stdout": False, "refresh_per_second": 5}
        with Progress(*columns, console=Console(stderr=True), **settings) as screen:
            _SCREEN.append(screen)
            try:
                yield from _line(screen, f"setpoint: {what}")
            finally:
                _SCREEN.pop()


def _on_terminal() -> bool:
    """Whether stderr is one; a program may have put something else there, or nothing, or closed it."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


def _line(screen: Any, text: str) -> Iterator[Callable[[float], None]]:
    task = screen.add_task(text, total=None)
    try:
        yield lambda share: screen.update(task, total=1.0, completed=share)
    finally:
        screen.remove_task(task)
