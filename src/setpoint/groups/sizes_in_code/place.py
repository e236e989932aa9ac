"""A place: where in live Python code a size stands, an attribute of a module or a call in its forward."""

import re
from typing import Any

from torch import nn

from setpoint.errors import GroupError

_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")


def is_call(place: str) -> bool:
    """Whether a place is a call in a module's forward (`"view#2[1]"`), not an attribute."""
    return "#" in place


def call_of(at: tuple[str, str]) -> tuple[str, str]:
    """The call that a place is an argument of: `("", "view#2[1]")` is of `("", "view#2")`."""
    return at[0], at[1].partition("[")[0]


def implied(place: str) -> int | None:
    """What an attribute place says to mean where nothing is written: 128 of `"config.n_inner=128"`; None without."""
    size = place.partition("=")[2]
    return int(size) if size.isdigit() and not is_call(place) else None


def read_size(module: nn.Module, place: str) -> int:
    """The integer at an attribute place: `"out_channels"`, `"normalized_shape[0]"`, `"config.hidden_size"`.

    An attribute that may be None or absent is written with what it then means, `"config.n_inner=128"`.

    Raises:
        GroupError: when there is no such attribute or it is not an integer.

    >>> read_size(nn.LayerNorm(7), "normalized_shape[0]")
    7
    """
    value: Any = module
    *owners, last = _path(place)
    try:
        for step in owners:
            value = value[step] if isinstance(step, int) else getattr(value, step)
        if (meant := implied(place)) is not None and getattr(value, str(last), None) is None:
            return meant
        value = value[last] if isinstance(last, int) else getattr(value, last)
    except Exception as error:  # a property may raise anything
        raise GroupError(f"{type(module).__name__} has no {place!r}: {error}") from error
    # True and False are integers to Python, and no size.
    if not isinstance(value, int) or isinstance(value, bool):
        raise GroupError(f"{type(module).__name__}.{place} is not an integer but {value!r}")
    return value


def write_size(module: nn.Module, place: str, size: int) -> None:
    """Set the integer at an attribute place; sequences are replaced by a copy, never changed in place.

    >>> norm = nn.LayerNorm(7)
    >>> write_size(norm, "normalized_shape[0]", 5)
    >>> norm.normalized_shape
    (5,)
    """
    _write(module, _path(place), size)


def _path(place: str) -> list[str | int]:
    place = place.partition("=")[0]
    steps = [int(match[2]) if match[2] else match[1] for match in _STEP.finditer(place)]
    whole = "".join(match[0] for match in _STEP.finditer(place)) == place and "__" not in place
    if not whole or not steps or isinstance(steps[0], int):
        raise GroupError(f"{place!r} is not a place: write an attribute such as 'config.sizes[0]'")
    return steps


def _write(owner: Any, path: list[str | int], size: int) -> Any:
    """Write along the path and return `owner`, or its changed copy where it is a sequence."""
    step, rest = path[0], path[1:]
    if isinstance(step, int):
        items = list(owner)
        items[step] = _write(items[step], rest, size) if rest else size
        return items if isinstance(owner, list) else type(owner)(items)
    old = getattr(owner, step) if rest else None
    new = _write(old, rest, size) if rest else size
    if new is not old:
        setattr(owner, step, new)
    return owner
