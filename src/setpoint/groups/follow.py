"""Follow: every state that has something for each unit is cut and grown as the units were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from setpoint.errors import LoopError

State = TypeVar("State")
Values = TypeVar("Values")

_UNITS, _WEIGHTS = "by unit", "by weight"
_NONE = np.zeros(0, dtype=bool)

ByUnit = Annotated[Values, _UNITS]
"""Of a field: an array or tensor with an entry for each active unit along its first dim.

`Mapping[str, ByUnit[...]]` holds one for each group. A bare `ByUnit[...]` holds all groups one after the other, in a
state whose fields `names` and `num_units` say which they are, and how wide.
"""

ByWeight = Annotated[Values, _WEIGHTS]
"""Of a field `Mapping[str, ByWeight[...]]`: by name of a tensor, an entry for each of its weights, active or not."""


@dataclass(frozen=True, eq=False)
class Change:
    """What an act has done to the units: first some went, then others came back."""

    # By group, one boolean per unit that was active before, True = stayed; a group that lost nothing may be absent.
    keep: Mapping[str, Bool[np.ndarray, " _units"]] = field(default_factory=dict)
    # By group, one boolean per unit that is active afterwards, True = has just come back.
    regrown: Mapping[str, Bool[np.ndarray, " _units"]] = field(default_factory=dict)
    # Where units are single weights, by tensor, those that have just come in.
    grown: Mapping[str, Bool[Tensor, "..."]] = field(default_factory=dict)
    note: str = ""  # what is to be said of it
    counted: bool = False  # whether single weights were dropped, which a ledger counts and does not list
    num_dropped: Mapping[str, int] = field(default_factory=dict)  # how many of them, by group
    num_grown: Mapping[str, int] = field(default_factory=dict)  # likewise, how many were grown

    def of(self, names: Iterable[str]) -> Change:
        """The same of these groups only."""
        keep, regrown = ({n: units[n] for n in names if n in units} for units in (self.keep, self.regrown))
        return replace(self, keep=keep, regrown=regrown)


def fresh(value: float | str) -> dict[str, Any]:
    """Metadata of a field by unit or weight: what an entry just back holds, a number or a field's name; else 0."""
    return {"fresh": value}


def of_groups(names: str | None) -> dict[str, Any]:
    """Metadata of a field that holds another state: the field that names the groups which that is about, or None."""
    return {"groups": names}


FOUND_ANEW: Mapping[str, Any] = {"live": True, "anew": True}
"""Metadata of a field that points into the model and has to be found again after each change: it becomes None."""


def follow(state: State, change: Change) -> State:
    """The state after a change of the units.

    In a dataclass, every field annotated `ByUnit[...]` or `ByWeight[...]` is cut and grown, and so are the dataclasses
    in its fields and in tuples there. Anything else has nothing by unit, and is returned as it is. A state that puts
    something off has a method `folded`, which returns it with nothing put off.

    Raises:
        LoopError: for a dict with an array for each unit of a group, which would stay as wide as it was.
    """
    if isinstance(state, type) or not is_dataclass(state):
        check_follows(state, {name: len(kept) for name, kept in change.keep.items()})
        return state
    held: Any = state.folded() if hasattr(state, "folded") else state
    made: dict[str, Any] = {}
    for part, how in _fields_that_follow(held.__class__):
        value, fill = getattr(held, part.name), part.metadata.get("fresh", 0)
        fill = getattr(held, fill) if isinstance(fill, str) else fill
        if how == "anew":
            made[part.name] = None
        elif how == "by group":
            keep_of, came_of = change.keep.get, change.regrown.get
            made[part.name] = {name: _rows(rows, keep_of(name), came_of(name), fill) for name, rows in value.items()}
        elif how == "in a row":
            keep, grown = _in_a_row(held, change)
            made[part.name] = _rows(value, np.concatenate([_NONE, *keep]), np.concatenate([_NONE, *grown]), fill)
            made["num_units"] = tuple(map(len, grown))
        elif how == "by weight":
            came = {name: where for name, where in change.grown.items() if name in value}
            begun = {n: torch.where(where, torch.as_tensor(fill).to(value[n]), value[n]) for n, where in came.items()}
            made[part.name] = {**value, **begun}
        elif is_dataclass(value) or isinstance(value, tuple):
            names = part.metadata.get("groups", ...)  # which groups the state in it is about; all where nothing is said
            seen = change if names is ... else change.of(() if names is None else getattr(held, names))
            made[part.name] = tuple(follow(v, seen) for v in value) if isinstance(value, tuple) else follow(value, seen)
    result: State = replace(held, **made) if made else held
    return result


def check_follows(state: Any, widths: Mapping[str, int], where: str = "") -> None:
    """Check that what has an entry for each unit of a group is annotated so in a state, or raise LoopError."""
    if isinstance(state, tuple):
        for part in state:
            check_follows(part, widths)
    elif is_dataclass(state):
        for part, how in _fields_that_follow(state.__class__):
            if how == "as it is":
                check_follows(getattr(state, part.name), widths, f"{type(state).__name__}.{part.name}")
    elif isinstance(state, Mapping):
        where = where or f"a {type(state).__name__}"
        for name, values in state.items():
            if name in widths and isinstance(values, (np.ndarray, Tensor)) and values.shape[:1] == (widths[name],):
                raise LoopError(
                    f"the state of a sensor or controller has {widths[name]} numbers for the units of {name!r} in "
                    f"{where}, which cannot follow a cut: make the state a frozen dataclass, and annotate the field as "
                    "Mapping[str, ByUnit[...]] (setpoint.groups.follow)"
                )
            check_follows(values, widths, where)


@lru_cache(maxsize=256)
def _fields_that_follow(kind: type) -> tuple[tuple[Field[Any], str], ...]:
    try:
        hints = get_type_hints(kind, include_extras=True)
    except NameError as error:  # what is imported for type checkers only is of no use here
        hints = {}
        if any(f"By{what}" in str(part.type) for part in fields(kind) for what in ("Unit", "Weight")):
            raise LoopError(
                f"the annotations of {kind.__name__} cannot be read ({error}): import what they name at the top of the "
                "module, outside of `if TYPE_CHECKING`"
            ) from error
    return tuple((part, how) for part in fields(kind) if (how := _how(part, hints.get(part.name))))


def _how(part: Field[Any], hint: Any) -> str:
    if part.metadata.get("anew"):
        return "anew"
    if part.metadata.get("live"):
        return ""
    if _UNITS in getattr(hint, "__metadata__", ()):
        return "in a row"
    marks = getattr((get_args(hint) or (None,))[-1], "__metadata__", ())
    return "by group" if _UNITS in marks else "by weight" if _WEIGHTS in marks else "as it is"


def _in_a_row(state: Any, change: Change) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Which units stayed and which have come back, of each group of a state that holds them one after the other."""
    keep = [change.keep.get(n, np.ones(width, bool)) for n, width in zip(state.names, state.num_units, strict=True)]
    left = zip(state.names, keep, strict=True)
    return keep, [change.regrown.get(name, np.zeros(int(kept.sum()), bool)) for name, kept in left]


def _rows(values: Any, keep: np.ndarray | None, grown: np.ndarray | None, fill: float) -> Any:
    """Entries of the units that stayed, and `fill` for those that have come back."""
    if keep is not None and not keep.all():
        values = values[_positions(keep, values)]
    if grown is None or not grown.any():
        return values
    shape = (len(grown), *values.shape[1:])
    made = values.new_full(shape, fill) if isinstance(values, Tensor) else np.full(shape, fill, dtype=values.dtype)
    made[_positions(~grown, values)] = values
    return made


def _positions(units: np.ndarray, like: Any) -> Any:
    found = np.flatnonzero(units)
    return torch.from_numpy(found).to(like.device) if isinstance(like, Tensor) else found
