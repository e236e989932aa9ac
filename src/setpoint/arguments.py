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


def check_flags(**flags: object) -> None:
    """Check that each is True or False, or raise ValueError: any word would count as True, "no" too."""
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name} is True or False, got {value!r}")


def check_settings(settings: Iterable[str], of: Callable[..., Any], passed_on_to: Callable[..., Any]) -> None:
    """Raise a TypeError for settings that one function passes on and another does not take by keyword.

    >>> check_settings(["revers"], print, sorted)
    Traceback (most recent call last):
    TypeError: print() got an unexpected keyword argument 'revers': did you mean reverse? sorted takes key, reverse
    """
    own = inspect.signature(of).parameters
    parameters = inspect.signature(passed_on_to).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for name in settings:
        if name not in known:
            raise TypeError(
                f"{of.__name__}() got an unexpected keyword argument {name!r}: {did_you_mean(name, [*own, *known])}"
                f"{passed_on_to.__name__} takes {', '.join(known)}"
            )
