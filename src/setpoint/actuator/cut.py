"""A cut: which entries of every tensor dim, and which sizes, remain once units are dropped; whether they can be cut."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from setpoint.errors import GroupError
from setpoint.groups.group import Group, Place, SizeBinding, Slice
from setpoint.messages import a_type

# By group name, one boolean per active unit, True = stays. Groups that lose nothing may be absent.
Keep = Mapping[str, Bool[np.ndarray, " _units"]]
SizePlace = tuple[str, str]  # (qualified module name, place in that module), as in `SizeBinding`

Key = TypeVar("Key")


@dataclass(frozen=True, eq=False)
class Cut:
    """What a keep means for tensors and sizes: one boolean per entry, True = stays."""

    entries: Mapping[Place, Bool[np.ndarray, " _entries"]]  # by tensor and dim
    elements: Mapping[str, Bool[np.ndarray, " _elements"]]  # by tensor whose single elements are units, row-major
    sizes: Mapping[SizePlace, Bool[np.ndarray, " _entries"]]  # by place in Python code, of the entries that it counts
    # Places of groups that lose units. A forward may compute the size of a call from such a group, so the call is
    # corrected even where its right size stays the same.
    following: frozenset[SizePlace]

    def places(self) -> Iterator[tuple[str, int | None, Bool[np.ndarray, " _entries"]]]:
        """Tensor, dim, or None for single elements, and which entries stay."""
        yield from ((tensor, dim, kept) for (tensor, dim), kept in self.entries.items())
        yield from ((tensor, None, kept) for tensor, kept in self.elements.items())

    def dims(self) -> dict[str, dict[int, Int[np.ndarray, " _kept"]]]:
        """By tensor and dim, positions of the kept entries; only the dims that lose some."""
        found: dict[str, dict[int, Int[np.ndarray, " _kept"]]] = {}
        for (tensor, dim), kept in self.entries.items():
            if not kept.all():
                found.setdefault(tensor, {})[dim] = np.flatnonzero(kept)
        return found


def check_keep(groups: tuple[Group, ...], keep: Mapping[str, object]) -> dict[str, Bool[np.ndarray, " _units"]]:
    """`keep` completed with all-True vectors for the groups it leaves out; a GroupError for what does not fit."""
    names = [group.name for group in groups]
    if unknown := [name for name in keep if name not in names]:
        some = ", ".join(map(repr, sorted(names)[:5])) or "none"
        raise GroupError(f"keep names an unknown group {unknown[0]!r}: the model's groups are {some}, ...")
    full = {}
    for group in groups:
        kept, what = keep.get(group.name, np.ones(group.num_units, dtype=bool)), f"keep[{group.name!r}]"
        if not isinstance(kept, np.ndarray) or kept.dtype != np.bool_:
            kind = getattr(kept, "dtype", a_type(kept))
            raise GroupError(f"{what} must be an array of bool, True = stays, got {kind}")
        if kept.shape != (group.num_units,):
            raise GroupError(
                f"{what} has shape {kept.shape}, but the group has {group.num_units} active units: "
                "use the groups that the last cut returned"
            )
        # An empty layer would divide by zero in norms and attention.
        if kept.sum() < group.min_units:
            raise GroupError(f"{what} keeps {kept.sum()} units, but min_units is {group.min_units}: keep more of them")
        full[group.name] = kept
    return full


def plan_cut(groups: tuple[Group, ...], keep: Keep) -> Cut:
    """What remains of every tensor dim and size; a GroupError when `keep` does not fit the groups.

    An entry stays if every group that has a unit there keeps that unit:
    `stays[i] = AND over groups g of (index_g[i] == -1 or keep[g][index_g[i]])`.
    Several groups share a dim after a concatenation.
    """
    full = check_keep(groups, keep)
    entries: dict[Place, Bool[np.ndarray, " _entries"]] = {}
    elements: dict[str, Bool[np.ndarray, " _elements"]] = {}
    sizes: dict[SizePlace, Bool[np.ndarray, " _entries"]] = {}
    following: set[SizePlace] = set()
    for group in groups:
        # Entry -1 of the lengthened vector is True, which is what index -1 (no unit here) must give.
        kept = np.append(full[group.name], True)
        for part in group.slices:
            if part.dim is None:
                _narrow(elements, part.tensor, kept[part.index])
            else:
                _narrow(entries, (part.tensor, part.dim), kept[part.index])
        for size in group.sizes:
            _narrow(sizes, (size.module, size.place), kept[size.index])
            if not kept.all():
                following.add((size.module, size.place))
    return Cut(entries, elements, sizes, frozenset(following))


def _narrow(table: dict[Key, Bool[np.ndarray, " _entries"]], key: Key, stays: Bool[np.ndarray, " entries"]) -> None:
    before = table.get(key)
    if before is not None and before.shape != stays.shape:
        raise GroupError(f"two groups disagree about the length of {key}: {before.size} and {stays.size}")
    table[key] = stays if before is None else before & stays


def cut_groups(groups: tuple[Group, ...], keep: Keep) -> tuple[Group, ...]:
    """The groups of the smaller model: fewer units, shorter index tables, units renumbered from 0.

    >>> a = Group("a", "unit", 3, (Slice("fc.weight", 0, "produce", np.array([0, 1, 2])),))
    >>> (small,) = cut_groups((a,), {"a": np.array([True, False, True])})
    >>> small.num_units, small.slices[0].index.tolist()
    (2, [0, 1])
    """
    full, cut, remaining = check_keep(groups, keep), plan_cut(groups, keep), []
    for group in groups:
        kept = full[group.name]
        renumbered = np.append(np.cumsum(kept) - 1, -1)  # the last entry answers index -1
        slices, sizes = list[Slice](), list[SizeBinding]()
        for part in group.slices:
            stays = cut.elements[part.tensor] if part.dim is None else cut.entries[part.tensor, part.dim]
            same = stays.all() and kept.all()
            slices.append(part if same else replace(part, index=renumbered[part.index[stays]]))
        for size in group.sizes:
            stays = cut.sizes[size.module, size.place]
            same = stays.all() and kept.all()
            sizes.append(size if same else replace(size, index=renumbered[size.index[stays]]))
        remaining.append(replace(group, num_units=int(kept.sum()), slices=tuple(slices), sizes=tuple(sizes)))
    return tuple(remaining)


def check_lengths(cut: Cut, tensors: Mapping[str, Tensor], what: str) -> None:
    """Check that every tensor of the cut exists and has the length of its index tables, or raise a GroupError."""
    for name, dim, kept in cut.places():
        if name not in tensors:
            raise GroupError(f"{what} has no tensor {name!r}: use the groups of this very model, or copies= of it")
        shape = tuple(tensors[name].shape)
        found = tensors[name].numel() if dim is None else shape[dim] if dim < len(shape) else None
        if found != kept.size:
            where = name if dim is None else f"dim {dim} of {name}"
            raise GroupError(
                f"{where} should have {kept.size} entries, but in {what} the tensor's shape is {shape}: use the groups "
                "of this very model, as the last cut returned them; one of copies= must be cut together with it only"
            )


def check_cuttable(changing: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Check that each tensor in `changing` is of a kind that can change its shape in place, or raise a GroupError.

    `tensors` holds all tensors of the model by every name, so that shared memory is seen.
    """
    at: dict[tuple[torch.device, int], set[int]] = {}
    # An empty tensor has no memory of its own, nor has one on the meta device: all of them would seem to be tied.
    for tensor in tensors.values():
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if plain and tensor.numel() and not tensor.is_meta:
            at.setdefault((tensor.device, tensor.data_ptr()), set()).add(id(tensor))
    seen: dict[int, str] = {}
    for name, tensor in changing.items():
        fake = isinstance(tensor, FakeTensor)  # it has a shape and no memory, which a cut can change all the same
        plain = fake or type(tensor) in (Tensor, nn.Parameter)
        if not plain or tensor.is_quantized or tensor.layout != torch.strided:
            kind = a_type(tensor)
            raise GroupError(f"{name!r} is {kind} of layout {tensor.layout}, which cannot be cut: freeze its groups")
        # One tensor by two names would be cut twice.
        if id(tensor) in seen:
            raise GroupError(f"{name!r} and {seen[id(tensor)]!r} are one tensor: name it in slices by one name only")
        seen[id(tensor)] = name
        # `set_` gives this tensor memory of its own, and another one would keep the old values.
        if not fake and len(at.get((tensor.device, tensor.data_ptr()), ())) > 1:
            raise GroupError(
                f"{name!r} shares its memory with another tensor of the model: tie them by using one "
                "Parameter object in both places"
            )
