"""Interrupts: what must not be left half done keeps signals waiting."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = [s for s in signal.Signals if s.name[3:] in ("ALRM", "HUP", "INT", "TERM", "USR1", "USR2")]
_usual: dict[int, Callable[[int, FrameType | None], object]] = {}  # handlers of those that are kept now
_came: dict[int, FrameType | None] = {}


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, the first signal of a kind is kept until the end; a second one comes through at once, whatever it leaves.

    These are the signals whose handlers are Python's, and may raise: Ctrl-C, time limits, those of a scheduler.
    """
    here = threading.current_thread() is threading.main_thread()
    # A block inside of another leaves to that what it keeps.
    handlers = ((int(each), signal.getsignal(each)) for each in _SIGNALS if here and each not in _usual)
    usual = {number: handler for number, handler in handlers if callable(handler)}

    def keep(number: int, frame: FrameType | None) -> None:
        if number in _came:
            signal.signal(number, usual[number])
            usual[number](number, frame)
        _came[number] = frame

    # A KeyboardInterrupt between two tensors of a cut would leave the model half cut.
    for number in usual:
        signal.signal(number, keep)
    _usual.update(usual)
    try:
        yield
    finally:
        for number, handler in usual.items():
            del _usual[number]
            signal.signal(number, handler)
        for number, frame in {number: _came.pop(number) for number in usual if number in _came}.items():
            usual[number](number, frame)


def let_through() -> None:
    """Let a signal that is kept come through, and raise: for places of long work at which nothing is half done."""
    for number in list(_came) if threading.current_thread() is threading.main_thread() else ():
        _usual[number](number, _came.pop(number))
