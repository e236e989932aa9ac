"""Arguments: numbers and flags as users write them, turned into Python's own, and checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import numpy as np

from setpoint.messages import did_you_mean


def plain_number(value: Any) -> Any:
    """A number of NumPy's, or an array that is one, as Python's own; anything else as it is.

    >>> plain_number(np.int32(3)), plain_number(np.float16(0.5)), plain_number("half")
    (3, 0.5, 'half')
    """
    single = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)
    return value.item() if single else value


def check_settings(settings: Iterable[str], of: Callable[..., Any], passed_on_to: Callable[..., Any]) -> None:
    """Check that settings which one function passes on are keyword arguments of another.

    Raises:
        TypeError: for any other, with the nearest name.

    >>> check_settings(["revers"], print, sorted)
    Traceback (most recent call last):
    TypeError: print() got an unexpected keyword argument 'revers': did you mean reverse? sorted takes key, reverse
    """
    own = [
        name
        for name, parameter in inspect.signature(of).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    taken = inspect.signature(passed_on_to).parameters.values()
    known = [parameter.name for parameter in taken if parameter.kind is parameter.KEYWORD_ONLY]
    for name in settings:
        if name not in known:
            raise TypeError(
                f"{of.__name__}() got an unexpected keyword argument {name!r}: {did_you_mean(name, [*own, *known])}"
                f"{passed_on_to.__name__} takes {', '.join(known)}"
            )


def plain_fields(settings: Any) -> None:
    """Have all fields of a frozen dataclass hold Python's own numbers; called as it is made."""
    for field in fields(settings):
        object.__setattr__(settings, field.name, plain_number(getattr(settings, field.name)))


def counts(**given: object) -> list[int]:
    """These settings as Python's own numbers; ValueError for one that is no positive integer."""
    found = [plain_number(value) for value in given.values()]
    for name, value in zip(given, found, strict=True):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return found


def check_flags(**flags: object) -> None:
    """Check that each is True or False, or raise ValueError: any word would count as True, "no" too."""
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name} is True or False, got {value!r}")
