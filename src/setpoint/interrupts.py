"""Interrupts: what must not be left half done keeps signals waiting."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = [s for s in signal.Signals if s.name[3:] in ("ALRM", "HUP", "INT", "TERM", "USR1", "USR2")]
_kept: set[int] = set()  # those that are kept now: a block inside of another leaves them to that


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, the first signal of a kind is kept until the end; a second one comes through at once, whatever it leaves.

    These are the signals whose handlers are Python's, and may raise: Ctrl-C, time limits, those of a scheduler.
    """
    here = threading.current_thread() is threading.main_thread()
    handlers = ((int(each), signal.getsignal(each)) for each in _SIGNALS if here and each not in _kept)
    usual = {number: handler for number, handler in handlers if callable(handler)}
    kept: dict[int, FrameType | None] = {}

    def keep(number: int, frame: FrameType | None) -> None:
        if number in kept:
            signal.signal(number, usual[number])
            usual[number](number, frame)
        kept[number] = frame

    # A KeyboardInterrupt between two tensors of a cut would leave the model half cut.
    for number in usual:
        signal.signal(number, keep)
    _kept.update(usual)
    try:
        yield
    finally:
        _kept.difference_update(usual)
        for number, handler in usual.items():
            signal.signal(number, handler)
        for number, frame in kept.items():
            usual[number](number, frame)
