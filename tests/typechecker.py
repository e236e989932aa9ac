"""The run-time check of shapes in the tests: jaxtyping with beartype, where an int may stand for a float, as in mypy.

A function inside of another is not checked: it would be prepared for that again whenever the outer one runs, which took
half of the time of the tests. A function without a shape in its signature is left to mypy: binding names of shapes took
three quarters of the time of the tests of controllers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, get_origin

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_jaxtyped: Callable[..., Any] = jaxtyping.jaxtyped
_WORD = re.compile(r"\w+")
_SHAPES = re.compile(r"\b(Bool|Complex|Float|Int|Num|Shaped)\w*\[")


def leave_nested_functions() -> None:
    """From now on the import hook of `--jaxtyping-packages` checks what names a shape, in modules and classes."""
    jaxtyping.jaxtyped = _where_it_pays


def _where_it_pays(*decorated: Any, typechecker: Any) -> Any:
    if not decorated:
        return partial(_where_it_pays, typechecker=typechecker)
    (what,) = decorated
    hints = " ".join(str(hint) for hint in getattr(what, "__annotations__", {}).values())
    shaped = _SHAPES.search(hints) or _aliases(what.__module__, set(_WORD.findall(hints)))
    return _jaxtyped(what, typechecker=typechecker) if shaped and "<locals>" not in what.__qualname__ else what


def _aliases(module: str, words: set[str]) -> bool:
    """Whether one of these names of a module stands for a shape."""
    values = [vars(sys.modules[module]).get(word) for word in words]
    return any("jaxtyping" in repr(value) for value in values if get_origin(value) or isinstance(value, type))
