"""Regrow: bring units back from the reserve into a live model and its optimizer state, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.cut import SizePlace, check_cuttable, check_lengths, plan_cut
from setpoint.actuator.optimizer_state import Optimizers, as_sequence, map_tensors
from setpoint.actuator.shrink import Change, Job, commit, unwrapped
from setpoint.actuator.tensors import in_format, named_tensors, take
from setpoint.errors import GroupError
from setpoint.groups.group import Group
from setpoint.groups.sizes_in_code.place import call_of, is_call
from setpoint.regrowth.reserve import Reserve, Units, held


def regrow(
    model: nn.Module,
    optimizer: Optimizers,
    groups: tuple[Group, ...],
    reserve: Reserve,
    grow: Units,
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
    widths = {name: int(units.sum()) for name, units in reserve.active.items()}
    for group in groups:
        if widths.get(group.name) != group.num_units:
            raise GroupError(
                f"group {group.name!r} has {group.num_units} units, but by the reserve's account "
                f"{widths.get(group.name, 'none')}: call Reserve.rest before each shrink, and use the last reserve"
            )
    active, names = with_units(reserve, grow), reserve.names(grow)
    resting = {name: units & ~active[name] for name, units in reserve.resting.items()}
    after, tensors = replace(reserve, active=active, resting=resting, let_go={}), reserve.elsewhere(names)
    # All communication comes before the first check that may fail on one rank only.
    before = reserve.gathered(names)
    modules = [(model, as_sequence(optimizer)), *((copied, ()) for copied in unwrapped(sorted(names), model, copies))]
    for module, _ in modules:
        found = named_tensors(module)
        check_lengths(plan_cut(reserve.present(), {}), found, type(module).__name__)
        check_cuttable({name: found[name] for name in sorted(names)}, found)
    larger = dict[int, Tensor]()  # by the id of a live one
    for key, live in held(model, optimizer, copies, names):
        dense, form = before.dense(key, live)
        tensors |= after.resting_of(key, dense, form)
        kept = {dim: np.flatnonzero(entries) for dim, entries in after.live[key.tensor].items()}
        larger[id(live)] = in_format(take(dense, kept).to(live.device), form)
    sizes = _new_sizes(after, grow)
    with ExitStack() as undo:
        for module, optimizers in modules:
            commit(Job(module, tuple(_changes(module, optimizers, names, larger)), sizes), undo)
        torch.clear_autocast_cache()
        agreed()
        undo.pop_all()  # nothing failed: forget the way back
    return after.present(), replace(after, tensors=tensors)


def with_units(reserve: Reserve, grow: Units) -> dict[str, Bool[np.ndarray, " units"]]:
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


def _changes(
    module: nn.Module, optimizers: Sequence[Optimizer], names: frozenset[str], larger: Mapping[int, Tensor]
) -> Iterator[Change]:
    """Each tensor of these names, and its state in optimizers, with what takes its place."""
    tensors = named_tensors(module)
    for tensor, name in ((tensors[name], name) for name in sorted(names)):
        states = []
        for optimizer in optimizers:
            if isinstance(tensor, nn.Parameter) and tensor in optimizer.state:
                kept = optimizer.state[tensor]
                state = {
                    part: map_tensors(v, lambda live, _: larger.get(id(live), live), part) for part, v in kept.items()
                }
                states.append((optimizer, state))
        yield Change(name, tensor, larger[id(tensor)], tuple(states))


def _new_sizes(reserve: Reserve, grow: Units) -> dict[SizePlace, int | None]:
    """The new value of every size that counts regrown units; None for a call that needs no correction any more."""
    some = {name for name, origins in grow.items() if len(origins)}
    places = {(size.module, size.place) for group in reserve.groups if group.name in some for size in group.sizes}
    after = plan_cut(reserve.groups, reserve.active)
    calls = {call_of(at) for at in places if is_call(at[1])}  # all sizes of a call go together
    places |= {at for at in after.sizes if is_call(at[1]) and call_of(at) in calls}
    # A forward may compute the size of a call from any group that it touches, even where that size is dense again.
    cut = {call_of(at) for at in after.sizes if at in after.following or at in reserve.corrected}
    return {
        at: int(after.sizes[at].sum()) if not is_call(at[1]) or call_of(at) in cut else None for at in sorted(places)
    }
