"""The reserve: where dropped units rest in host memory with their weights and moments, and how they come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.cut import Keep, SizePlace, check_keep, check_lengths, cut_groups, plan_cut
from setpoint.actuator.shrink import Change, Job, commit, unwrapped
from setpoint.actuator.tensors import Optimizers, as_sequence, in_format, map_tensors, moments_of, named_tensors, take
from setpoint.distributed import Ranks
from setpoint.errors import CheckpointError, GroupError
from setpoint.groups.group import Group, keep_all, widths_of
from setpoint.groups.sizes_in_code.place import call_of, is_call
from setpoint.groups.sizes_in_code.shim import get_call_sizes

Units = Mapping[str, Sequence[int] | Int[np.ndarray, " _units"]]  # by group name, origins of units
# By dim of the dense tensor, which entries are in the box; all of them along a dim that is absent here.
Box = Mapping[int, Bool[np.ndarray, " _entries"]]

_ALONE = Ranks()
_BY_UNIT = ("active", "resting", "dropped_at", "drops")  # fields of a reserve with an entry for each dense unit


def _count(shape: Sequence[int], box: Box) -> int:
    return math.prod(int(box[dim].sum()) if dim in box else length for dim, length in enumerate(shape))


def _inside(shape: Sequence[int], box: Box) -> Bool[Tensor, " *shape"]:
    inside = torch.ones(tuple(shape), dtype=torch.bool)
    for dim, kept in box.items():
        inside &= torch.from_numpy(kept).view([-1 if other == dim else 1 for other in range(len(shape))])
    return inside


class Key(NamedTuple):
    """The owner of a resting tensor."""

    holder: str  # "model", "optimizer 0", "copy 0", ...
    tensor: str  # qualified name of the parameter or buffer
    part: str = ""  # of the optimizer's state, "exp_avg" for example; "" for the tensor itself


@dataclass(frozen=True, eq=False)
class Rest:
    """The resting entries of one tensor, in row-major order of the dense one, in host memory; or this rank's shard."""

    values: Shaped[Tensor, " part_of_resting"]
    form: Tensor  # shape and strides of the dense tensor, without data
    count: int  # number of resting entries, on all ranks together


@dataclass(frozen=True, eq=False)
class Reserve:
    """Dropped units with their weights, buffers and moments, by origin; a value: each change makes a new one.

    An entry of a tensor is in the model exactly if all its units are. Every other entry rests here with the last
    value it had in the model, as long as all its units can be regrown. This settles what becomes of a weight
    between a unit u of one group and a unit v of another. If u is dropped and v later, the weight rests as it
    was when u was dropped. If u alone is regrown, it is fitted to the present width of the other group, and the weight
    rests until v is regrown too. So units may be regrown in any order, and each entry with its last unit.

    Optimizer state that did not exist yet when a unit was dropped is zero when the unit is regrown.

    Over several ranks the entries are sharded in equal parts, as parameters by `fully_shard`; all ranks call every
    method together.
    """

    groups: tuple[Group, ...]  # the dense groups, whose unit indices are the origins
    active: Mapping[str, Bool[np.ndarray, " units"]]  # by group, which units are in the model
    resting: Mapping[str, Bool[np.ndarray, " units"]]  # which rest here; one in neither has been let go
    tensors: Mapping[Key, Rest] = field(default_factory=dict)  # resting entries
    corrected: frozenset[SizePlace] = frozenset()  # calls whose sizes were corrected before any cut
    limit_bytes: int | None = None  # upper limit for the resting entries, on each rank; None: no limit
    # By group and unit, when it was last dropped, in whatever the caller counts, and how often.
    dropped_at: Mapping[str, Int[np.ndarray, " units"]] = field(default_factory=dict)
    drops: Mapping[str, Int[np.ndarray, " units"]] = field(default_factory=dict)
    let_go: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # by the last `rest`, for want of room
    ranks: Ranks = _ALONE  # among which entries are sharded
    own: frozenset[str] = frozenset()  # tensors that differ between ranks, as buffers do: never sharded

    @classmethod
    def of(
        cls, model: nn.Module, groups: tuple[Group, ...], limit_bytes: int | None = None, ranks: Ranks = _ALONE
    ) -> Reserve:
        """The empty reserve of a model, before any cut that it is to remember."""
        places = {(size.module, size.place) for group in groups for size in group.sizes if is_call(size.place)}
        corrected = frozenset(at for at in places if at[1] in get_call_sizes(model.get_submodule(at[0])))
        own = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
        resting = {group.name: np.zeros(group.num_units, dtype=bool) for group in groups}
        dropped_at = {group.name: np.full(group.num_units, -1) for group in groups}
        drops = {group.name: np.zeros(group.num_units, dtype=np.int64) for group in groups}
        return cls(groups, keep_all(groups), resting, {}, corrected, limit_bytes, dropped_at, drops, {}, ranks, own)

    @property
    def num_bytes(self) -> int:
        """Host memory of the resting entries on this rank."""
        return sum(rest.values.numel() * rest.values.itemsize for rest in self.tensors.values())

    @cached_property
    def live(self) -> dict[str, dict[int, Bool[np.ndarray, " _entries"]]]:
        """By tensor, the box of the active units."""
        return self._boxes(self.active)

    @cached_property
    def known(self) -> dict[str, dict[int, Bool[np.ndarray, " _entries"]]]:
        """By tensor, the box of all units that are active or rest."""
        return self._boxes({name: units | self.resting[name] for name, units in self.active.items()})

    def _boxes(self, units: Keep) -> dict[str, dict[int, Bool[np.ndarray, " _entries"]]]:
        found: dict[str, dict[int, Bool[np.ndarray, " _entries"]]] = {}
        for (name, dim), kept in plan_cut(self.groups, units).entries.items():
            found.setdefault(name, {})[dim] = kept
        return found

    def present(self) -> tuple[Group, ...]:
        return cut_groups(self.groups, self.active)

    def origins(self) -> dict[str, Int[np.ndarray, " resting"]]:
        """By group, origins of the units that rest here; groups with none are absent."""
        return {name: np.flatnonzero(units) for name, units in self.resting.items() if units.any()}

    def names(self, units: Units) -> frozenset[str]:
        """Of the tensors in which any of these units lie."""
        groups = [group for group in self.groups if len(units.get(group.name, ()))]
        return frozenset(part.tensor for group in groups for part in group.slices if part.dim is not None)

    def with_units(self, grow: Units) -> dict[str, Bool[np.ndarray, " units"]]:
        """By group, which units are active once these are regrown, or GroupError for what does not rest here."""
        active = {name: units.copy() for name, units in self.active.items()}
        for name, origins in grow.items():
            if name not in active:
                raise GroupError(f"grow names an unknown group {name!r}: the reserve knows {', '.join(active)}")
            units, rests = np.asarray(origins, dtype=np.int64), np.flatnonzero(self.resting[name])
            if len(away := np.setdiff1d(units, rests)):
                raise GroupError(
                    f"unit {away[0]} of {name!r} does not rest in the reserve: of this group it holds {rests.tolist()}"
                )
            active[name][units] = True
        return active

    def rest(
        self, model: nn.Module, optimizer: Optimizers, keep: Keep, copies: Sequence[nn.Module] = (), when: int = 0
    ) -> Reserve:
        """The reserve with the units that `keep` drops; call it just before `shrink` with the same arguments.

        Over the limit, the units of the first cuts are let go for good. Optimizers and copies are always the same
        ones in the same order, since `Key` numbers them. `when` is noted. GroupError: `keep` does not fit the active
        units.
        """
        full = check_keep(self.present(), keep)
        dropped = {name: np.flatnonzero(self.active[name])[~kept] for name, kept in full.items()}
        by_unit: dict[str, Any] = {part: {n: v.copy() for n, v in getattr(self, part).items()} for part in _BY_UNIT}
        for name, origins in dropped.items():
            by_unit["active"][name][origins] = False
            by_unit["resting"][name][origins] = True
            by_unit["dropped_at"][name][origins] = when
            by_unit["drops"][name][origins] += 1
        after = replace(self, let_go={}, **by_unit)
        if self.limit_bytes is not None:
            shapes = {key: (tuple(rest.form.shape), rest.values.itemsize) for key, rest in self.tensors.items()}
            for key, live in held(model, optimizer, copies, self.names(dropped)):
                shapes[key] = self._dense_shape(key, live), shapes[key][1] if key in shapes else live.itemsize
            while after._need(shapes) > self.limit_bytes:
                after = after._without_oldest()
        names = self.names(dropped) | self.names(after.let_go)
        before, tensors = self.gathered(names), {k: rest for k, rest in self.tensors.items() if k.tensor not in names}
        for key, live in held(model, optimizer, copies, names):
            tensors |= after.resting_of(key, *before.dense(key, live))
        return replace(after, tensors=tensors)

    def emptied(self) -> Reserve:
        """The reserve of which nothing comes back any more."""
        return replace(self, tensors={}, resting={name: np.zeros_like(units) for name, units in self.resting.items()})

    def state_dict(self) -> dict[str, Any]:
        """Everything but the groups and the limit; each rank has its own part."""
        units = {
            name: {part: torch.from_numpy(getattr(self, part)[name].copy()) for part in _BY_UNIT}
            for name in self.active
        }
        tensors = []
        for key, rest in self.tensors.items():
            form = {"shape": tuple(rest.form.shape), "stride": rest.form.stride()}
            tensors.append({"key": tuple(key), "values": rest.values, "count": rest.count, **form})
        return {"units": units, "tensors": tensors, "ranks": self.ranks.count}

    def resumed(self, state: Mapping[str, Any], *, lasting: bool = True) -> Reserve:
        """The reserve whose `state_dict` this is, from the empty one of its model.

        On another number of ranks, whose parts are others, it is empty unless it is to be `lasting`.

        Raises:
            CheckpointError: for a state of another rank, or of another number of ranks.
        """
        by_unit: dict[str, Any] = {
            part: {name: state["units"][name][part].numpy().copy() for name in self.active} for part in _BY_UNIT
        }
        if (count := state.get("ranks", self.ranks.count)) != self.ranks.count:
            if lasting and state["tensors"]:
                raise CheckpointError(
                    f"units rest in parts on {count} ranks, and may come back: continue this run on as many, not on "
                    f"{self.ranks.count}"
                )
            return replace(self, **by_unit).emptied()
        tensors = {}
        for saved in state["tensors"]:
            key, count, values = Key(*saved["key"]), int(saved["count"]), saved["values"].cpu()
            mine = self._sharers(key.tensor).part(count)
            if len(values) != mine.stop - mine.start:
                raise CheckpointError("the reserve is that of another rank: load the state that this rank has saved")
            form = torch.empty_strided(saved["shape"], saved["stride"], dtype=values.dtype, device="meta")
            tensors[key] = Rest(values, form, count)
        return replace(self, tensors=tensors, **by_unit)

    def _sharers(self, name: str) -> Ranks:
        return _ALONE if name in self.own else self.ranks

    def gathered(self, names: Collection[str]) -> Reserve:
        """The reserve with all resting entries of these tensors only, unsharded; every rank calls this.

        All communication is here, so that no rank waits for one that fails at what it does with the entries.
        """
        # All ranks gather in the same order.
        found = [(key, rest) for key, rest in sorted(self.tensors.items()) if key.tensor in names]
        joined = {
            key: replace(rest, values=self._sharers(key.tensor).joined(rest.values, rest.count)) for key, rest in found
        }
        return replace(self, tensors=joined, ranks=_ALONE)

    def dense(self, key: Key, live: Tensor) -> tuple[Tensor, Tensor]:
        """A tensor at its dense size in host memory, and its form; zero where nothing is live or rests."""
        rest, name = self.tensors.get(key), key.tensor
        if rest is None and key.holder.startswith("copy"):  # made after the cut: what rests of it is as in the model
            rest = self.tensors.get(Key("model", name))
        shape = self._dense_shape(key, live) if rest is None else rest.form.shape
        dense = torch.zeros(shape, dtype=live.dtype)
        if rest is not None:
            dense[self._resting_entries(name, shape)] = rest.values.to(live.dtype)
        dense[_inside(shape, self.live[name])] = live.detach().cpu().reshape(-1)
        return dense, in_format(torch.empty_like(dense, device="meta"), live) if rest is None else rest.form

    def resting_of(self, key: Key, dense: Tensor, form: Tensor) -> dict[Key, Rest]:
        """What rests of a tensor, as `dense` gives it; {} if nothing does."""
        values = dense[self._resting_entries(key.tensor, dense.shape)]
        if not values.numel():
            return {}
        part = values[self._sharers(key.tensor).part(len(values))]
        # A part is a view, which would keep the entries of all ranks in memory.
        return {key: Rest(values if len(part) == len(values) else part.clone(), form, len(values))}

    def _resting_entries(self, name: str, shape: Sequence[int]) -> Bool[Tensor, " *shape"]:
        """True at each entry whose units are all known, but not all of them active."""
        return _inside(shape, self.known[name]) & ~_inside(shape, self.live[name])

    def _dense_shape(self, key: Key, live: Tensor) -> tuple[int, ...]:
        box = self.live[key.tensor]
        return tuple(len(box[dim]) if dim in box else length for dim, length in enumerate(live.shape))

    def _without_oldest(self) -> Reserve:
        """This reserve without the units that were dropped first: of a cut in part, none could be taken back."""
        first = min(int(self.dropped_at[name][units].min()) for name, units in self.resting.items() if units.any())
        gone = {name: units & (self.dropped_at[name] == first) for name, units in self.resting.items()}
        resting = {name: units & ~gone[name] for name, units in self.resting.items()}
        origins = {name: tuple(np.flatnonzero(units).tolist()) for name, units in gone.items() if units.any()}
        let_go = {name: self.let_go.get(name, ()) + units for name, units in origins.items()}
        return replace(self, resting=resting, let_go={**self.let_go, **let_go})

    def _need(self, shapes: Mapping[Key, tuple[Sequence[int], int]]) -> int:
        """Bytes that the resting entries of tensors of these dense shapes and item sizes take, on each rank."""
        total = 0
        for key, (shape, itemsize) in shapes.items():
            count = _count(shape, self.known[key.tensor]) - _count(shape, self.live[key.tensor])
            total += itemsize * -(-count // self._sharers(key.tensor).count)
        return total


def held(
    model: nn.Module, optimizer: Optimizers, copies: Sequence[nn.Module], names: frozenset[str]
) -> Iterator[tuple[Key, Tensor]]:
    """Every live tensor of these names: the model's, the state that optimizers keep for it, and the copies'."""
    tensors = named_tensors(model)
    for name in sorted(names):
        yield Key("model", name), tensors[name]
        for number, one in enumerate(as_sequence(optimizer)):
            for part, value in moments_of(one, tensors[name]):
                yield Key(f"optimizer {number}", name, part), value
    for number, copied in enumerate(unwrapped(names, model, copies)):
        theirs = named_tensors(copied)
        yield from ((Key(f"copy {number}", name), theirs[name]) for name in sorted(names) if name in theirs)


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
    """Bring units back from the reserve: the groups as they are then, and the reserve without these units.

    The inverse of `shrink`: dropping units and regrowing the same ones at once restores everything, bit for bit. Units
    always lie in the order of their origins. Later, every entry comes back with its last value and moments;
    scalars of an optimizer's state, such as the count of steps, are those of the live parameter. Gradients of what
    changes become None, so call it between `optimizer.step()` and the next `backward()`. Optimizer and copies are those
    that `Reserve.rest` was given, `agreed` is as in `shrink_live`.

    On any exception, such as a GroupError for what does not rest here, model, optimizers and copies are as they were.
    """
    widths = {name: int(units.sum()) for name, units in reserve.active.items()}
    if widths_of(groups) != widths:
        raise GroupError(
            f"the groups have {widths_of(groups)} units, but by the reserve's account {widths}: call Reserve.rest "
            "before each shrink, and use the last reserve"
        )
    active, names = reserve.with_units(grow), reserve.names(grow)
    resting = {name: units & ~active[name] for name, units in reserve.resting.items()}
    after = replace(reserve, active=active, resting=resting, let_go={})
    tensors = {key: rest for key, rest in reserve.tensors.items() if key.tensor not in names}
    # All communication comes before the first check that may fail on one rank only.
    before = reserve.gathered(names)
    modules = [(model, as_sequence(optimizer)), *((copied, ()) for copied in unwrapped(sorted(names), model, copies))]
    for module, _ in modules:
        check_lengths(plan_cut(reserve.present(), {}), named_tensors(module), type(module).__name__)
    larger = dict[int, Tensor]()  # by the id of a live one
    for key, live in held(model, optimizer, copies, names):
        dense, form = before.dense(key, live)
        tensors |= after.resting_of(key, dense, form)
        kept = {dim: np.flatnonzero(entries) for dim, entries in after.live[key.tensor].items()}
        larger[id(live)] = in_format(take(dense, kept).to(live.device), form)
    sizes = _new_sizes(after, grow)
    commit([Job(module, _changes(module, held_by, names, larger), sizes) for module, held_by in modules], agreed)
    return after.present(), replace(after, tensors=tensors)


def _changes(
    module: nn.Module, optimizers: Sequence[Optimizer], names: Collection[str], larger: Mapping[int, Tensor]
) -> tuple[Change, ...]:
    """Each tensor of these names, and its state in optimizers, with what takes its place."""

    def grown(live: Tensor, part: str) -> Tensor:
        return larger.get(id(live), live)

    found, tensors = list[Change](), named_tensors(module)
    for name in sorted(names):
        tensor = tensors[name]
        holders = [optimizer for optimizer in optimizers if tensor in optimizer.state]
        states = tuple((holder, map_tensors(holder.state[tensor], grown, name)) for holder in holders)
        found.append(Change(name, tensor, larger[id(tensor)], states))
    return tuple(found)


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
