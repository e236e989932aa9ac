"""Words that tasks share: splits, metrics, scores, free widths, and the error for what cannot run as asked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from setpoint.errors import UsageError
from setpoint.messages import did_you_mean

Split = Literal["validation", "test"]
Metric = Literal["accuracy", "loss"]


class BenchError(UsageError):
    """A benchmark that cannot run as asked: unknown task or method, missing data, missing extra."""


@dataclass(frozen=True)
class Dimension:
    """One free width of a task's model.

    Args:
        dense: units of the dense model.
        multiple_of: step in which a model built from scratch chooses this width.
    """

    dense: int
    multiple_of: int = 1


@dataclass(frozen=True)
class Score:
    """What an evaluation found: mean loss in nats, and the share of right answers if there are any."""

    loss: float
    accuracy: float | None = None


PLAIN = "use letters, digits and . _ - + @, not only dots"


def fits_a_folder(name: str) -> bool:
    """Whether a name can be part of a folder's name on every system, and leads nowhere else.

    >>> fits_a_folder("my-task.2"), fits_a_folder("../other"), fits_a_folder("a b")
    (True, False, False)
    """
    return re.fullmatch(r"[\w.+@-]*[\w+@-][\w.+@-]*", name, re.ASCII) is not None


def split_named(name: str) -> Split:
    """The split of that name.

    Raises:
        BenchError: there is none.
    """
    for split in get_args(Split):
        if split == name:
            return split  # type: ignore[no-any-return]
    raise BenchError(f"unknown split {name!r}: {did_you_mean(name, get_args(Split))}use {' or '.join(get_args(Split))}")
