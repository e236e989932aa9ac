"""The reserve: where dropped units rest in host memory, with their last weights, buffers and optimizer moments."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from setpoint.actuator.cut import Keep, SizePlace, check_keep, cut_groups, plan_cut
from setpoint.actuator.optimizer_state import Optimizers, as_sequence, moments_of
from setpoint.actuator.shrink import unwrapped
from setpoint.actuator.tensors import in_format, named_tensors
from setpoint.distributed import Ranks
from setpoint.errors import GroupError
from setpoint.groups.group import Group, keep_all
from setpoint.groups.sizes_in_code.place import is_call
from setpoint.groups.sizes_in_code.shim import get_call_sizes

Box = Mapping[int, Bool[np.ndarray, " _entries"]]
"""By dim of the dense tensor, which entries are in the box; all of them along a dim that is absent here."""


def count_entries(shape: Sequence[int], box: Box) -> int:
    """Number of entries of a tensor in a box."""
    return math.prod(int(box[dim].sum()) if dim in box else length for dim, length in enumerate(shape))


def resting_entries(shape: Sequence[int], known: Box, live: Box) -> Bool[Tensor, " *shape"]:
    """True at each entry whose units are all known, but not all of them active."""
    return _inside(shape, known) & ~_inside(shape, live)


def _inside(shape: Sequence[int], box: Box) -> Bool[Tensor, " *shape"]:
    inside = torch.ones(tuple(shape), dtype=torch.bool)
    for dim, kept in box.items():
        inside &= torch.from_numpy(kept).view([-1 if other == dim else 1 for other in range(len(shape))])
    return inside


def write(tensor: Shaped[Tensor, " *shape"], box: Box, values: Shaped[Tensor, " *small"]) -> None:
    """Fill the entries of a box, in place, with a tensor of the box's shape.

    >>> tensor = torch.zeros(2, 3)
    >>> write(tensor, {1: np.array([True, False, True])}, torch.ones(2, 2))
    >>> tensor.tolist()
    [[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]
    """
    positions = [np.flatnonzero(box[dim]) if dim in box else np.arange(n) for dim, n in enumerate(tensor.shape)]
    with torch.no_grad():
        tensor[tuple(torch.from_numpy(along).to(tensor.device) for along in np.ix_(*positions))] = values


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
        """The empty reserve of a model, before any cut that it is to remember; ValueError for a bad limit."""
        if limit_bytes is not None and (isinstance(limit_bytes, bool) or limit_bytes < 0):
            raise ValueError(f"limit_bytes is a number of bytes, at least 0, or None: got {limit_bytes!r}")
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

    def shares(self, name: str) -> bool:
        """Whether the resting entries of a tensor are sharded."""
        return self.mesh is not None and name not in self.own

    def present(self) -> tuple[Group, ...]:
        """The groups as they are in the model now."""
        return cut_groups(self.groups, self.active)

    def origins(self) -> dict[str, Int[np.ndarray, " resting"]]:
        """By group, origins of the units that rest here; groups with none are absent."""
        return {name: np.flatnonzero(units) for name, units in self.resting.items() if units.any()}

    def rest(
        self, model: nn.Module, optimizer: Optimizers, keep: Keep, copies: Sequence[nn.Module] = (), when: int = 0
    ) -> Reserve:
        """The reserve with the units that `keep` drops; call it just before `shrink` with the same arguments.

        Over the limit, the units that were dropped first are let go for good. Optimizers and copies are always the same
        ones in the same order, since `Key` numbers them. `when` is noted. GroupError: `keep` does not fit the active
        units.
        """
        full = check_keep(self.present(), keep)
        dropped = {name: np.flatnonzero(self.active[name])[~kept] for name, kept in full.items()}
        active, resting, dropped_at, drops = (
            {name: values.copy() for name, values in by_group.items()}
            for by_group in (self.active, self.resting, self.dropped_at, self.drops)
        )
        for name, origins in dropped.items():
            active[name][origins] = False
            resting[name][origins] = True
            dropped_at[name][origins] = when
            drops[name][origins] += 1
        after = replace(self, active=active, resting=resting, dropped_at=dropped_at, drops=drops, let_go={})
        sources = dict(held(model, optimizer, copies, self.names(dropped)))
        after = after._within_limit({key: rest.values for key, rest in self.tensors.items()} | sources, self)
        names = self.names(dropped) | self.names(after.let_go)
        return after.refilled(self.gathered(names), sources, names)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the groups and the limit, in tensors, numbers and strings; each rank has its own part."""
        by_group = {
            name: {key: torch.from_numpy(by_unit[name].copy()) for key, by_unit in self._by_group().items()}
            for name in self.active
        }
        tensors = []
        for key, rest in self.tensors.items():
            form = {"shape": tuple(rest.form.shape), "stride": rest.form.stride()}
            tensors.append({"key": tuple(key), "values": rest.values, "count": rest.count, **form})
        return {"units": by_group, "tensors": tensors}

    def resumed(self, state: Mapping[str, Any]) -> Reserve:
        """The reserve whose `state_dict` this is, from the empty one of its model; GroupError for another's."""
        units = state["units"].items()
        by_group = {key: {n: u[key].numpy().copy() for n, u in units if key in u} for key in self._by_group()}
        for part, old in self._by_group().items():
            for name, array in old.items():
                new = by_group[part].get(name)
                if new is None or (new.shape, new.dtype) != (array.shape, array.dtype):
                    raise GroupError(f"the reserve's {part} of group {name!r} is not one {array.dtype} per unit")
        tensors = {}
        for saved in state["tensors"]:
            key, count, values = Key(*saved["key"]), int(saved["count"]), saved["values"].cpu()
            mine = self.ranks.part(count) if self.shares(key.tensor) else slice(0, count)
            if len(values) != mine.stop - mine.start:
                raise GroupError("the reserve is of another rank, or of a run on another number of ranks")
            form = torch.empty_strided(saved["shape"], saved["stride"], dtype=values.dtype, device="meta")
            tensors[key] = Rest(values, form, count)
        after = replace(self, tensors=tensors, **by_group)  # type: ignore[arg-type]
        known, live = after.outlines(), after.boxes(after.active)
        for key, rest in tensors.items():
            shape = rest.form.shape
            if key.tensor not in known or any(len(kept) != shape[dim] for dim, kept in known[key.tensor].items()):
                raise GroupError(f"the reserve holds {key.tensor!r} of shape {tuple(shape)}, which no group has")
            if rest.count != count_entries(shape, known[key.tensor]) - count_entries(shape, live[key.tensor]):
                raise GroupError(f"the reserve lacks entries of {key.tensor!r}")
        return after

    def _by_group(self) -> dict[str, Mapping[str, np.ndarray]]:
        return {key: getattr(self, key) for key in ("active", "resting", "dropped_at", "drops")}

    def names(self, units: Mapping[str, Sequence[int] | Int[np.ndarray, " _units"]]) -> frozenset[str]:
        """Names of the tensors in which any of these units lie."""
        some = {name for name, origins in units.items() if len(origins)}
        groups = [group for group in self.groups if group.name in some]
        return frozenset(part.tensor for group in groups for part in group.slices if part.dim is not None)

    def boxes(self, units: Keep) -> dict[str, dict[int, Bool[np.ndarray, " _entries"]]]:
        """By tensor and dim, the entries that are present with these units."""
        found: dict[str, dict[int, Bool[np.ndarray, " _entries"]]] = {}
        for (name, dim), kept in plan_cut(self.groups, units).entries.items():
            found.setdefault(name, {})[dim] = kept
        return found

    def refilled(self, before: Reserve, sources: Mapping[Key, Tensor], names: frozenset[str]) -> Reserve:
        """This reserve with the entries that belong to its resting units, in the tensors whose resting entries change.

        They are taken from the reserve `before`, `gathered`, and from live tensors, which hold what was active in it.
        """
        known, live = before.outlines(), before.boxes(before.active)
        wanted, mine = self.outlines(), self.boxes(self.active)
        tensors = dict(self.tensors)
        keys = dict.fromkeys([*sources, *(key for key in before.tensors if key.tensor in names)])
        for key in keys:
            name = key.tensor
            source = sources.get(key)
            dense, form = before.unsharded(key, source, known[name], live[name])
            if source is not None:
                write(dense, live[name], source.detach().to("cpu", dense.dtype))
            values = dense[resting_entries(dense.shape, wanted[name], mine[name])]
            tensors.pop(key, None)
            if values.numel():
                part = values[self.ranks.part(len(values))].clone() if self.shares(name) else values
                tensors[key] = Rest(part, form, len(values))
        return replace(self, tensors=tensors)

    def gathered(self, names: Collection[str]) -> Reserve:
        """The reserve with all resting entries of these tensors only, unsharded; every rank calls this.

        All communication is here, so that no rank waits for one that fails at what it does with the entries.
        """
        if self.mesh is None:
            return self
        # Sorted, so that all ranks gather in the same order.
        wanted = {key: rest for key, rest in sorted(self.tensors.items()) if key.tensor in names}
        unsharded = {
            key: replace(rest, values=self.ranks.joined(rest.values, rest.count)) if self.shares(key.tensor) else rest
            for key, rest in wanted.items()
        }
        return replace(self, tensors=unsharded, mesh=None)

    def unsharded(self, key: Key, like: Tensor | None, known: Box, live: Box) -> tuple[Tensor, Tensor]:
        """A tensor at its dense size, unsharded in host memory, and its form; zero where nothing rests.

        `known` and `live` are the entries of units active or resting, and of the active ones. `like` is the live
        tensor.
        """
        rest = self.tensors.get(key)
        if rest is None and key.holder.startswith("copy"):  # made after the cut: what rests of it is as in the model
            rest = self.tensors.get(Key("model", key.tensor))
        if rest is not None:
            whole = torch.zeros(rest.form.shape, dtype=rest.values.dtype if like is None else like.dtype)
            whole[resting_entries(whole.shape, known, live)] = rest.values.to(whole.dtype)
            return whole, rest.form
        assert like is not None
        shape = [len(live[dim]) if dim in live else length for dim, length in enumerate(like.shape)]
        form = in_format(torch.empty(shape, dtype=like.dtype, device="meta"), like)
        return torch.zeros(shape, dtype=like.dtype), form

    def outlines(self) -> dict[str, dict[int, Bool[np.ndarray, " _entries"]]]:
        """Boxes of all units that are active or rest."""
        return self.boxes({name: units | self.resting[name] for name, units in self.active.items()})

    def _within_limit(self, tensors: Mapping[Key, Tensor], before: Reserve) -> Reserve:
        """This reserve without the units, first dropped first, for which there is no room."""
        shapes, limit = before._shapes(tensors), self.limit_bytes
        if limit is None or self._need(shapes, tensors) <= limit:
            return self
        resting = [(name, int(unit)) for name, units in self.resting.items() for unit in np.flatnonzero(units)]
        order = sorted((int(self.dropped_at[name][unit]), name, unit) for name, unit in resting)
        # The need falls with every unit let go, so the least number of them is found by bisection.
        number = bisect_left(
            range(len(order)), True, key=lambda n: self._without(order[:n])._need(shapes, tensors) <= limit
        )
        return self._without(order[:number])

    def _without(self, units: Sequence[tuple[int, str, int]]) -> Reserve:
        resting = {name: values.copy() for name, values in self.resting.items()}
        let_go: dict[str, list[int]] = {}
        for _, name, unit in units:
            resting[name][unit] = False
            let_go.setdefault(name, []).append(unit)
        return replace(self, resting=resting, let_go={name: tuple(sorted(gone)) for name, gone in let_go.items()})

    def _shapes(self, tensors: Mapping[Key, Tensor]) -> dict[Key, tuple[int, ...]]:
        live = self.boxes(self.active)
        return {
            key: tuple(self.tensors[key].form.shape)
            if key in self.tensors
            else tuple(len(live[key.tensor].get(dim, ())) or length for dim, length in enumerate(tensor.shape))
            for key, tensor in tensors.items()
        }

    def _need(self, shapes: Mapping[Key, tuple[int, ...]], tensors: Mapping[Key, Tensor]) -> int:
        """Bytes that the resting entries of these tensors take, on each rank."""
        known, live, ranks = self.outlines(), self.boxes(self.active), self.ranks.count
        total = 0
        for key, shape in shapes.items():
            count = count_entries(shape, known[key.tensor]) - count_entries(shape, live[key.tensor])
            total += tensors[key].itemsize * (-(-count // ranks) if self.shares(key.tensor) else count)
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
