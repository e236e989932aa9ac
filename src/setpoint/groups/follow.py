"""TEMPORARY: replaced by the merge of `follow`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Change:
    keep: Mapping[str, Any] = field(default_factory=dict)
    regrown: Mapping[str, Any] = field(default_factory=dict)
    came: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    counted: bool = False
    num_dropped: Mapping[str, int] = field(default_factory=dict)
    num_grown: Mapping[str, int] = field(default_factory=dict)


def follow_by(part: Any, state: Any, change: Change) -> Any:
    if change.keep:
        state = part.cut(state, change.keep)
    if change.regrown:
        state = part.grow(state, change.regrown)
    if change.came and hasattr(part, "renew"):
        state = part.renew(state, change.came)
    return state


def spread(values, change):
    result = {name: each[change.keep[name]] if name in change.keep else each for name, each in values.items()}
    for name, came in change.regrown.items():
        if name in result:
            new = np.full(len(came), np.nan)
            new[~came] = result[name]
            result[name] = new
    return result


def check_follows(part):
    pass
