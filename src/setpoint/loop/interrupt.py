"""An interrupt that waits: Ctrl-C in the middle of a change comes through once model and loop agree again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, the first SIGINT is kept until the end; a second one comes through at once, whatever it leaves behind.

    Whatever handles SIGINT (Python's own handler, which raises KeyboardInterrupt, or the user's) is put back and then
    called. Outside of the main thread, and where SIGINT is ignored or ends the process, nothing is changed.

    >>> with uninterrupted():
    ...     pass
    """
    usual = signal.getsignal(signal.SIGINT)
    if not callable(usual) or threading.current_thread() is not threading.main_thread():
        yield
        return
    kept: list[FrameType | None] = []

    def keep(number: int, frame: FrameType | None) -> None:
        if kept:
            signal.signal(signal.SIGINT, usual)
            usual(number, frame)
        kept.append(frame)

    signal.signal(signal.SIGINT, keep)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if kept:
            usual(signal.SIGINT, kept[0])
