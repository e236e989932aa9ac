"""A logger: how to know one, get one by its name, and write to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _nothing(to: Any, prefix: str = "") -> None:
    """Nothing is to be done."""


@dataclass(frozen=True)
class Logger:
    """A kind of logger.

    Args:
        fits: whether an object is of this kind, by its methods.
        opener: gives what makes one; raises a `ModuleNotFoundError` that says what to install.
        write: takes the object, metrics by name, and the step.
        prepare: called once, with the object and what all names begin with.
        close: called at the end of a run, with an object that was made here.
    """

    fits: Callable[[Any], bool]
    opener: Callable[[], Callable[[], Any]]
    write: Callable[[Any, Mapping[str, float], int], None]
    prepare: Callable[[Any, str], None] = _nothing
    close: Callable[[Any], None] = _nothing


def has(to: Any, *methods: str) -> bool:
    """Whether an object has all of these methods."""
    return all(callable(getattr(to, name, None)) for name in methods)


def not_installed(what: str, package: str) -> ModuleNotFoundError:
    """The error for a logger that is not there."""
    return ModuleNotFoundError(f"{what} is not installed: pip install {package}", name=package)
