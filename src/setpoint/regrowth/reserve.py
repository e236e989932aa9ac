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

from setpoint.actuator.cut import Keep, SizePlace, check_cuttable, check_keep, check_lengths, cut_groups, plan_cut
from setpoint.actuator.shrink import Change, Job, commit, unwrapped
from setpoint.actuator.tensors import Optimizers, as_sequence, in_format, map_tensors, moments_of, named_tensors, take
from setpoint.distributed import Ranks
from setpoint.errors import GroupError
from setpoint.groups.group import Group, keep_all
from setpoint.groups.sizes_in_code.place import call_of, is_call
from setpoint.groups.sizes_in_code.shim import get_call_sizes

Units = Mapping[str, Sequence[int] | Int[np.ndarray, " _units"]]
"""By group name, origins of units."""

Box = Mapping[int, Bool[np.ndarray, " _entries"]]
"""By dim of the dense tensor, which entries are in the box; all of them along a dim that is absent here."""

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

    Over a mesh of ranks the entries are sharded in equal parts, as `fully_shard` does with parameters; all ranks then
    call every method together.
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
    mesh: Any = None  # None: not sharded
    own: frozenset[str] = frozenset()  # tensors that differ between ranks, as buffers do: never sharded

    @classmethod
    def of(
        cls, model: nn.Module, groups: tuple[Group, ...], limit_bytes: int | None = None, mesh: Any = None
    ) -> Reserve:
        """The empty reserve of a model, before any cut that it is to remember."""
        places = {(size.module, size.place) for group in groups for size in group.sizes if is_call(size.place)}
        corrected = frozenset(at for at in places if at[1] in get_call_sizes(model.get_submodule(at[0])))
        own = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
        resting = {group.name: np.zeros(group.num_units, dtype=bool) for group in groups}
        dropped_at = {group.name: np.full(group.num_units, -1) for group in groups}
        drops = {group.name: np.zeros(group.num_units, dtype=np.int64) for group in groups}
        return cls(groups, keep_all(groups), resting, {}, corrected, limit_bytes, dropped_at, drops, {}, mesh, own)

    @property
    def ranks(self) -> Ranks:
        """The ranks among which entries are sharded."""
        return Ranks() if self.mesh is None else Ranks(self.mesh.get_group(), torch.device(self.mesh.device_type))

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
        """The groups at their present widths."""
        return cut_groups(self.groups, self.active)

    def origins(self) -> dict[str, Int[np.ndarray, " resting"]]:
        """By group, origins of the units that rest here; groups with none are absent."""
        return {name: np.flatnonzero(units) for name, units in self.resting.items() if units.any()}

    def names(self, units: Units) -> frozenset[str]:
        """Names of the tensors in which any of these units lie."""
        groups = [group for group in self.groups if len(units.get(group.name, ()))]
        return frozenset(part.tensor for group in groups for part in group.slices if part.dim is not None)

    def with_units(self, grow: Units) -> dict[str, Bool[np.ndarray, " units"]]:
        """By group, which units are active once these are regrown, or GroupError for what does not rest here."""
        active = {name: units.copy() for name, units in self.active.items()}
        for name, origins in grow.items():
            if name not in active:
                known = ", ".join(sorted(active)[:5])
                raise GroupError(f"grow names an unknown group {name!r}: the reserve knows {known}")
            rests = np.flatnonzero(self.resting[name])
            for number in map(int, origins):
                if number not in rests:
                    raise GroupError(
                        f"unit {number} of {name!r} does not rest in the reserve: of this group it holds "
                        f"{rests.tolist() or 'none'}"
                    )
                active[name][number] = True
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
        before, tensors = self.gathered(names), after.elsewhere(names)
        for key, live in held(model, optimizer, copies, names):
            tensors |= after.resting_of(key, *before.dense(key, live))
        return replace(after, tensors=tensors)

    def emptied(self) -> Reserve:
        """The reserve of which nothing comes back any more."""
        return replace(self, tensors={}, resting={name: np.zeros_like(units) for name, units in self.resting.items()})

    def state_dict(self) -> dict[str, Any]:
        """Everything but the groups and the limit, in tensors, numbers and strings; each rank has its own part."""
        units = {
            name: {part: torch.from_numpy(getattr(self, part)[name].copy()) for part in _BY_UNIT}
            for name in self.active
        }
        tensors = []
        for key, rest in self.tensors.items():
            form = {"shape": tuple(rest.form.shape), "stride": rest.form.stride()}
            tensors.append({"key": tuple(key), "values": rest.values, "count": rest.count, **form})
        return {"units": units, "tensors": tensors}

    def resumed(self, state: Mapping[str, Any]) -> Reserve:
        """The reserve whose `state_dict` this is, from the empty one of its model; GroupError for another's."""
        by_unit: dict[str, Any] = {
            part: {name: state["units"][name][part].numpy().copy() for name in self.active} for part in _BY_UNIT
        }
        for part, by_group in by_unit.items():
            if any(len(values) != len(self.active[name]) for name, values in by_group.items()):
                raise GroupError(f"the reserve's {part} is of another model")
        tensors = {}
        for saved in state["tensors"]:
            key, count, values = Key(*saved["key"]), int(saved["count"]), saved["values"].cpu()
            mine = self._part(key.tensor, count)
            if len(values) != mine.stop - mine.start:
                raise GroupError("the reserve is of another rank, or of a run on another number of ranks")
            form = torch.empty_strided(saved["shape"], saved["stride"], dtype=values.dtype, device="meta")
            tensors[key] = Rest(values, form, count)
        return replace(self, tensors=tensors, **by_unit)

    def _is_shared(self, name: str) -> bool:
        """Whether the resting entries of a tensor are sharded."""
        return self.mesh is not None and name not in self.own

    def _part(self, name: str, count: int) -> slice:
        """Which of the resting entries of a tensor are on this rank."""
        return self.ranks.part(count) if self._is_shared(name) else slice(0, count)

    def gathered(self, names: Collection[str]) -> Reserve:
        """The reserve with all resting entries of these tensors only, unsharded; every rank calls this.

        All communication is here, so that no rank waits for one that fails at what it does with the entries.
        """
        if self.mesh is None:
            return self
        tensors = {}
        for key, rest in sorted(self.tensors.items()):  # all ranks gather in the same order
            if key.tensor in names:
                shared = self._is_shared(key.tensor)
                tensors[key] = replace(rest, values=self.ranks.joined(rest.values, rest.count)) if shared else rest
        return replace(self, tensors=tensors, mesh=None)

    def elsewhere(self, names: Collection[str]) -> dict[Key, Rest]:
        """What rests of all tensors but those of these names."""
        return {key: rest for key, rest in self.tensors.items() if key.tensor not in names}

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
        # A part is a view, which would keep the entries of all ranks in memory.
        part = values[self._part(key.tensor, len(values))].clone() if self._is_shared(key.tensor) else values
        return {key: Rest(part, form, len(values))}

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
            total += itemsize * (-(-count // self.ranks.count) if self._is_shared(key.tensor) else count)
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
    active, names = reserve.with_units(grow), reserve.names(grow)
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
    jobs = [Job(module, tuple(_changes(module, held_by, names, larger)), sizes) for module, held_by in modules]
    commit(jobs, agreed)
    return after.present(), replace(after, tensors=tensors)


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
