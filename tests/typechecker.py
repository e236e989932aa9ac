"""The run-time check of shapes in the tests: jaxtyping with beartype, where an int may stand for a float, as in mypy.

A function inside of another is not checked: it would be prepared for that again whenever the outer one runs, which took
half of the time of the tests. A function without a shape in its signature is left to mypy: binding names of shapes took
three quarters of the time of the tests of controllers. A function that a test calls again and again is checked
in its first calls, and then now and then.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial, wraps
from types import FunctionType
from typing import Any, get_origin

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_jaxtyped: Callable[..., Any] = jaxtyping.jaxtyped
_WORD = re.compile(r"\w+")
_FIRST, _THEN = 3, 25
"""Calls in each test that are checked, and how many go by until the next one is."""
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
    if not shaped or "<locals>" in what.__qualname__:
        return what
    if isinstance(what, type):
        made = vars(what).get("__init__")
        _jaxtyped(what, typechecker=typechecker)
        if made is not None and vars(what)["__init__"] is not made:  # a dataclass
            what.__init__ = _now_and_then(made, vars(what)["__init__"])  # type: ignore[misc]
        return what
    checked = _jaxtyped(what, typechecker=typechecker)
    return _now_and_then(what, checked) if isinstance(what, FunctionType) else checked


_calls: dict[Callable[..., Any], int] = {}


def begin_test() -> None:
    """Count calls anew."""
    _calls.clear()


def _now_and_then(function: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which is checked in the first calls of a test and in every so many after that."""

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        calls = _calls[function] = _calls.get(function, 0) + 1
        return (checked if calls <= _FIRST or calls % _THEN == 0 else function)(*args, **kwargs)

    return called


def _aliases(module: str, words: set[str]) -> bool:
    """Whether one of these names of a module stands for a shape."""
    values = [vars(sys.modules[module]).get(word) for word in words]
    return any("jaxtyping" in repr(value) for value in values if get_origin(value) or isinstance(value, type))
