"""What a user writes and reads: numbers, and sentences that count, hint, warn at the user's line and show progress."""

import difflib
import inspect
import logging
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from numbers import Real
from typing import Any

import numpy as np

_FOLDERS = (os.path.dirname(__file__), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
_INSTALLED = tuple(os.path.join(folder, "") for folder in _FOLDERS)
_RUNNING: list[str] = []  # what is being done now, the outermost first


def plain_number(value: Any) -> Any:
    """A number of NumPy's, or an array that is one, as Python's own; anything else as it is."""
    single = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)
    return value.item() if single else value


def is_number(value: Any) -> bool:
    """Whether it is a real number, NumPy's too, and neither True nor False."""
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_))


def plain_fields(settings: Any) -> None:
    """Have all fields of a frozen dataclass hold Python's own numbers; called as it is made."""
    for field in fields(settings):
        object.__setattr__(settings, field.name, plain_number(getattr(settings, field.name)))


def counts(**settings: object) -> list[int]:
    """These settings as Python's own numbers; ValueError for one that is no positive integer."""
    numbers = [plain_number(value) for value in settings.values()]
    for name, value in zip(settings, numbers, strict=True):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return numbers


def counted(number: float, what: str) -> str:
    """A number of things, such as "1 group" or "1,200 units"."""
    return f"{number:,.0f} {what}{'' if number == 1 else 's'}"


def a_type(value: object) -> str:
    """The type of a value with its article, such as "an int"; of a class its name."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeio' else 'a'} {name}"


def listed(items: Sequence[str], limit: int, between: str = ", ") -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return between.join(items[:limit]) + more


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The hint of an error message that names the known names nearest to an unknown one; "" where none is near."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(str(name).lower(), by_lower, 3, cutoff=0.53)  # "onnx" is near "onnxruntime"
    return f"did you mean {' or '.join(by_lower[lower] for lower in close)}? " if close else ""


def warn(text: str) -> None:
    """A `UserWarning` at the innermost line of code that is not installed: neither a package nor Python's own."""
    # The one place that reads frames: hooks are called by PyTorch, so no fixed stacklevel points at the user's line.
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_back is not None and frame.f_code.co_filename.startswith(_INSTALLED):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """While inside, a line on the first rank's stderr shows what is done; if that is no terminal, the log says so."""
    first_rank = os.environ.get("RANK", "0") == "0"
    # A program may have closed stderr, or have none.
    if not first_rank or getattr(sys.stderr, "closed", True) or not sys.stderr.isatty():
        if first_rank:
            logging.getLogger("setpoint").info("%s ...", what)
        yield
        return
    _RUNNING.append(what)
    _draw()
    try:
        yield
    finally:
        _RUNNING.pop()
        _draw()


def _draw() -> None:
    width = shutil.get_terminal_size().columns - 1
    text = f"setpoint: {': '.join(_RUNNING)}"[:width] if _RUNNING else ""
    # Spaces erase what a longer line left; notebooks know a carriage return, but no escape sequence that erases.
    sys.stderr.write(f"\r{' ' * width}\r{text}")
    sys.stderr.flush()
