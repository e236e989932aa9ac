"""Warn: a warning that points at the user's own line."""

from __future__ import annotations

import inspect
import os
import sysconfig
import warnings

_FOLDERS = (os.path.dirname(__file__), *(sysconfig.get_path(each) for each in ("stdlib", "purelib", "platlib")))
_INSTALLED = tuple(os.path.join(each, "") for each in _FOLDERS)


def warn(text: str) -> None:
    """A `UserWarning` at the innermost line of code that is not installed: neither a package nor Python's own."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_back is not None and frame.f_code.co_filename.startswith(_INSTALLED):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
