"""What is under way: a line on a terminal or in a notebook, while it takes its time; elsewhere a record of the log."""

from __future__ import annotations

import html
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

_SCREEN: list[Any] = []
"""The progress that is shown now; what begins inside it gets a line of its own there."""
_REDRAWN_S = 0.2


@contextmanager
def under_way(what: str) -> Iterator[Callable[[float], None]]:
    """While inside, tell on a terminal's stderr that this is under way, and for how long; the line goes away again.

    A notebook shows the line below the cell, without the time. Elsewhere the logger `setpoint` says so at INFO. Of
    several processes of `torchrun` the first does. Gives a function that takes the share that is done.

    >>> with under_way("measuring") as show:
    ...     show(0.5)
    """
    if _SCREEN:
        yield from _line(_SCREEN[-1], f"  {what}")
    elif os.environ.get("RANK", "0") != "0":
        yield lambda share: None
    elif (display := _display()) is not None:
        yield from _on(_Cell(display), what)
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
            yield from _on(screen, what)


def _on(screen: Any, what: str) -> Iterator[Callable[[float], None]]:
    _SCREEN.append(screen)
    try:
        yield from _line(screen, f"setpoint: {what}")
    finally:
        _SCREEN.pop()


def _display() -> Callable[..., Any] | None:
    """IPython's `display` in a notebook, which is a shell with a kernel; None elsewhere."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    session = getattr(getattr(shell, "kernel", None), "session", None)
    if session is None or session.pid != os.getpid():  # a process that was forked cannot reach the notebook
        return None
    from IPython.display import display

    found: Callable[..., Any] = display
    return found


class _Cell:
    """Lines below a notebook's cell, with the methods of Rich's `Progress` that are called here."""

    def __init__(self, display: Callable[..., Any]) -> None:
        self._lines: dict[int, str] = {}
        self._shares: dict[int, float] = {}
        self._numbers = count()
        self._drawn = 0.0
        self._handle = display(self._bundle(), raw=True, display_id=True)

    def add_task(self, text: str, total: float | None) -> int:
        """A line below the others; its number."""
        number = next(self._numbers)
        self._lines[number] = text
        self._draw()
        return number

    def update(self, task: int, total: float, completed: float) -> None:
        """Tell which share of the work of a line is done."""
        self._shares[task] = completed / total
        if time.monotonic() - self._drawn >= _REDRAWN_S:
            self._draw()

    def remove_task(self, task: int) -> None:
        """Take the line away."""
        self._lines.pop(task)
        self._shares.pop(task, None)
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._handle.update(self._bundle(), raw=True)

    def _bundle(self) -> dict[str, str]:
        shares = {number: f" {share:.0%}" for number, share in self._shares.items()}
        text = "\n".join(line + shares.get(number, "") for number, line in self._lines.items())
        return {"text/plain": text, "text/html": f"<pre>{html.escape(text)}</pre>" if text else ""}


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
