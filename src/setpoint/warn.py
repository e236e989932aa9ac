"""Warn: a warning that points at the user's own line."""

from __future__ import annotations

import sys
import sysconfig
import warnings
from pathlib import Path

_INSTALLED = (str(Path(__file__).parent), *(sysconfig.get_path(each) for each in ("stdlib", "purelib", "platlib")))


def warn(text: str) -> None:
    """A `UserWarning` at the innermost line of code that is not installed: neither a package nor Python's own."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSTALLED):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
