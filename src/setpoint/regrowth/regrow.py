"""Regrow: bring units back from the reserve into a live model and its optimizer state, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from setpoint.actuator.cut import SizePlace, check_cuttable, check_lengths, plan_cut
from setpoint.actuator.optimizer_state import Optimizers, as_sequence, map_tensors
from setpoint.actuator.shrink import Change, Job, commit, unwrapped
from setpoint.actuator.tensors import in_format, named_tensors, take
from setpoint.errors import GroupError
from setpoint.groups.group import Group
from setpoint.groups.sizes_in_code.place import call_of, is_call
from setpoint.regrowth.reserve import Box, Key, Reserve, write

Grow = Mapping[str, Sequence[int] | Int[np.ndarray, " _units"]]
"""By group name, origins of the units to bring back."""


def regrow(
    model: nn.Module,
    optimizer: Optimizers,
    groups: tuple[Group, ...],
    reserve: Reserve,
    grow: Grow,
    copies: Sequence[nn.Module] = (),
    *,
    agreed: Callable[[], None] = lambda: None,
) -> tuple[tuple[Group, ...], Reserve]:
    """Bring units back from the reserve, and return the groups as they are then and the reserve without them.

    The inverse of `shrink`: dropping units and regrowing the same ones at once restores every weight, buffer,
    optimizer moment and size bit for bit. Units always lie in the order of their origins. Later, every
    entry comes back with its last value and moments. Scalars of an optimizer's state, such as the count of steps,
    are those of the live parameter. Parameters and buffers keep their identity; gradients of those that change
    become None. Call it between `optimizer.step()` and the next `backward()`.

    On any exception model, optimizers, copies and reserve are as they were.

    Args:
        optimizer, copies: the ones that `Reserve.rest` was given.
        groups: as the last cut or regrowth returned them.
        agreed: as in `shrink`.

    Raises:
        GroupError: when a unit does not rest in the reserve, or the reserve does not fit groups, model or a copy.

    >>> from setpoint.actuator.shrink import shrink
    >>> from setpoint.groups.group import SizeBinding, Slice
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> unit = np.arange(3)
    >>> places = [("0.weight", 0, "produce"), ("0.bias", 0, "carry"), ("2.weight", 1, "consume")]
    >>> slices = tuple(Slice(tensor, dim, role, unit) for tensor, dim, role in places)
    >>> sizes = (SizeBinding("0", "out_features", unit), SizeBinding("2", "in_features", unit))
    >>> groups = (Group("hidden", "unit", 3, slices, sizes),)
    >>> weight, keep = model[0].weight.tolist(), {"hidden": np.array([True, False, False])}
    >>> reserve = Reserve.of(model, groups).rest(model, None, keep)
    >>> groups = shrink(model, None, groups, keep)
    >>> groups, reserve = regrow(model, None, groups, reserve, {"hidden": [1, 2]})
    >>> model[0].weight.tolist() == weight, reserve.num_bytes
    (True, 0)
    """
    _check_same_widths(groups, reserve)
    active = with_units(reserve, grow)
    resting = {name: units & ~active[name] for name, units in reserve.resting.items()}
    after = replace(reserve, active=active, resting=resting, let_go={})
    names = reserve.names(grow)
    # All communication comes before the first check that may fail on one rank only.
    reserve = reserve.gathered(names)
    modules = [(model, "model", as_sequence(optimizer))]
    modules += [(copied, f"copy {number}", ()) for number, copied in enumerate(unwrapped(sorted(names), model, copies))]
    sizes, boxes = _new_sizes(reserve, active, grow), reserve.boxes(active)
    jobs = []
    for module, holder, optimizers in modules:
        tensors = named_tensors(module)
        check_lengths(plan_cut(reserve.present(), {}), tensors, type(module).__name__)
        check_cuttable({name: tensors[name] for name in sorted(names)}, tensors)
        jobs.append(Job(module, tuple(_changes(module, holder, optimizers, reserve, boxes, names)), sizes))
    after = after.refilled(reserve, {}, names)
    with ExitStack() as undo:
        for job in jobs:
            commit(job, undo)
        torch.clear_autocast_cache()
        agreed()
        undo.pop_all()  # nothing failed: forget the way back
    return after.present(), after


def with_units(reserve: Reserve, grow: Grow) -> dict[str, Bool[np.ndarray, " units"]]:
    """By group, which units are active once these are regrown, or GroupError for what does not rest in the reserve."""
    active = {name: units.copy() for name, units in reserve.active.items()}
    for name, origins in grow.items():
        if name not in active:
            raise GroupError(f"grow names an unknown group {name!r}: the reserve knows {', '.join(sorted(active)[:5])}")
        for origin in origins:
            number = int(origin)
            if not 0 <= number < len(active[name]) or not reserve.resting[name][number]:
                rests = np.flatnonzero(reserve.resting[name])
                raise GroupError(
                    f"unit {number} of {name!r} does not rest in the reserve: "
                    f"of this group it holds {rests.tolist() or 'none'}"
                )
            active[name][number] = True
    return active


def _check_same_widths(groups: tuple[Group, ...], reserve: Reserve) -> None:
    widths = {name: int(units.sum()) for name, units in reserve.active.items()}
    for group in groups:
        if widths.get(group.name) != group.num_units:
            raise GroupError(
                f"group {group.name!r} has {group.num_units} units, but by the reserve's account "
                f"{widths.get(group.name, 'none')}: call Reserve.rest before each shrink, and use the last reserve"
            )


def _changes(
    module: nn.Module,
    holder: str,
    optimizers: Sequence[torch.optim.Optimizer],
    reserve: Reserve,
    boxes: Mapping[str, Box],
    names: frozenset[str],
) -> Iterator[Change]:
    """Each tensor of these names, and its state in optimizers, with the entries that lie in its box then."""
    tensors = named_tensors(module)

    def enlarged(key: Key, live: Tensor) -> Tensor:
        dense, form = reserve.unsharded(key, live)
        box, before = boxes[key.tensor], reserve.live[key.tensor]
        new = take(dense, {dim: np.flatnonzero(kept) for dim, kept in box.items()}).to(live.device, live.dtype)
        write(new, {dim: before[dim][kept] for dim, kept in box.items()}, live.detach())
        return in_format(new, form)

    for name in sorted(names):
        tensor, states = tensors[name], []
        for number, optimizer in enumerate(optimizers):

            def of_state(value: Tensor, part: str, number: int = number, name: str = name) -> Tensor:
                key = Key(f"optimizer {number}", name, part)
                return enlarged(key, value) if value.shape == tensors[name].shape else value

            if isinstance(tensor, nn.Parameter) and tensor in optimizer.state:
                kept = optimizer.state[tensor]
                states.append((optimizer, {part: map_tensors(value, of_state, part) for part, value in kept.items()}))
        yield Change(name, tensor, enlarged(Key(holder, name), tensor), tuple(states))


def _new_sizes(
    reserve: Reserve, active: Mapping[str, Bool[np.ndarray, " units"]], grow: Grow
) -> dict[SizePlace, int | None]:
    """The new value of every size that counts regrown units; None for a call that needs no correction any more."""
    some = {name for name, origins in grow.items() if len(origins)}
    places = {(size.module, size.place) for group in reserve.groups if group.name in some for size in group.sizes}
    after = plan_cut(reserve.groups, active)
    calls = {call_of(at) for at in places if is_call(at[1])}  # all sizes of a call go together
    places |= {at for at in after.sizes if is_call(at[1]) and call_of(at) in calls}
    # A forward may compute the size of a call from any group that it touches, even where that size is dense again.
    cut = {call_of(at) for at in after.sizes if at in after.following or at in reserve.corrected}
    return {
        at: int(after.sizes[at].sum()) if not is_call(at[1]) or call_of(at) in cut else None for at in sorted(places)
    }
