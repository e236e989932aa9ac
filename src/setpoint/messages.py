"""Messages: how a sentence counts things and names types, the nearest known name, and warnings at the user's line."""

from __future__ import annotations

import difflib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterable

_FOLDERS = (os.path.dirname(__file__), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
_INSTALLED = tuple(os.path.join(folder, "") for folder in _FOLDERS)


def counted(number: float, what: str) -> str:
    """A number of things, in singular or plural.

    >>> counted(1, "group"), counted(1200, "unit"), counted(0, "cut")
    ('1 group', '1,200 units', '0 cuts')
    """
    return f"{number:,.0f} {what}{'' if number == 1 else 's'}"


def a_type(value: object) -> str:
    """The type of a value, with its article.

    >>> a_type(3), a_type({})
    ('an int', 'a dict')
    """
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeio' else 'a'} {name}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The known names nearest to an unknown one, as the hint of an error message; empty where none is near.

    >>> did_you_mean("FLOP", ["flops", "params"]), did_you_mean("joule", ["flops"])
    ('did you mean flops? ', '')
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(str(name).lower(), by_lower, 3)
    return f"did you mean {' or '.join(by_lower[lower] for lower in close)}? " if close else ""


def warn(text: str) -> None:
    """A `UserWarning` at the innermost line of code that is not installed: neither a package nor Python's own."""
    # The one place that reads frames: hooks are called by PyTorch, so no fixed stacklevel points at the user's line.
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_back is not None and frame.f_code.co_filename.startswith(_INSTALLED):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
