"""The run-time type check of the tests: beartype, where an int may stand for a float, as in mypy.

A function inside of another is not checked: it would be prepared for that again whenever the outer one runs, which took
half of the time of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_jaxtyped: Callable[..., Any] = jaxtyping.jaxtyped


def leave_nested_functions() -> None:
    """From now on the import hook of `--jaxtyping-packages` passes over functions and classes inside of functions."""
    jaxtyping.jaxtyped = _outermost_only


def _outermost_only(*decorated: Any, typechecker: Any) -> Any:
    if not decorated:
        return partial(_outermost_only, typechecker=typechecker)
    nested = "<locals>" in getattr(decorated[0], "__qualname__", "")
    return decorated[0] if nested else _jaxtyped(decorated[0], typechecker=typechecker)
