"""A group: units, the smallest things kept or dropped (channels, neurons, heads), that lie in the same places."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from setpoint.errors import GroupError

# What a slice does with its unit: writes it, passes it on elementwise, or reads it out of the group.
Role = Literal["produce", "carry", "consume"]
Kind = Literal["unit", "weight", "state"]
Place = tuple[str, int]  # one dim of one tensor: (qualified tensor name, dim)


@dataclass(frozen=True, eq=False)
class Slice:
    """Where the units of a group lie along one dim of one parameter or buffer.

    Args:
        tensor: qualified name of the parameter or buffer, as in `named_parameters()`.
        dim: the dim along which units lie; `None` when every element of the tensor is a unit.
        role: "produce" (weights that write the unit), "carry" (per-unit bias, norm, depthwise
            filter, running statistics) or "consume" (weights that read the unit out of the group).
        index: `index[i]` is the unit that entry `i` along the dim belongs to; -1 where the entry
            belongs to no unit of this group.
        masked: whether a mask zeroes the entries of a dropped unit. False where zero would give 0 / 0 (the rows
            that weight norm divides by their length); another slice of the unit silences it there.
    """

    tensor: str
    dim: int | None
    role: Role
    index: Int[np.ndarray, " entries"] = field(repr=False)
    masked: bool = True


@dataclass(frozen=True, eq=False)
class SizeBinding:
    """A place in the live Python code that holds a size, and the units it counts.

    After a cut the place must hold the number of kept entries. Several groups may bind the same
    place (a concatenation); the count is then over the entries that every one of them keeps.

    Args:
        module: qualified name of the module ("" is the root).
        place: an attribute, `"out_channels"` or `"normalized_shape[0]"`; or a call in the module's
            forward, `"view#2[1]"` (size argument 1 of its third `view`), `"split#0[2]"` (size of
            piece 2 of its first `split`), rewritten by the size shim. `"view#2[1]=64"` says also that
            the code always gives 64 there: any other size shows that this is another call.
        index: as in `Slice`.
    """

    module: str
    place: str
    index: Int[np.ndarray, " entries"] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Group:
    """Units coupled across tensors in the same way.

    Args:
        name: unique and stable: it survives cuts.
        kind: "unit" (channels, heads, neurons), "weight" (single weights) or "state" (SSM states).
        num_units: the number of active units, the group's width.
        slices: every place where the units lie.
        sizes: every place in Python code that counts them.
        min_units: the fewest active units.
        multiple_of: block size of cuts, for fast kernels.
        usual_block: the block size that `find_groups` chose. Where it is `multiple_of`, the last cut may break a block.
        only_blocks: whether any other width fails (grouped matrix products need rows of a multiple of 16 bytes).
        lossless: True if a zeroed unit is exactly an absent one; False where zero is not absent
            (a LayerNorm over the units, a mean, a softmax).
        what: kind of unit in words: "channel", "neuron", "head", "feature".
        notes: remarks for people, such as why the group is not lossless.
    """

    name: str
    kind: Kind
    num_units: int
    slices: tuple[Slice, ...]
    sizes: tuple[SizeBinding, ...] = ()
    min_units: int = 1
    multiple_of: int = 1
    usual_block: int = 0
    only_blocks: bool = False
    lossless: bool = True
    what: str = "unit"
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Size:
    """The length of a dim as a function of widths: `constant + sum(per_unit * widths[group])`."""

    constant: int
    parts: tuple[tuple[str, int], ...] = ()

    def at(self, widths: Mapping[str, int]) -> int:
        """Length of the dim at these widths.

        >>> Size(3, (("a", 2),)).at({"a": 10})
        23
        """
        length = self.constant  # a plain loop: a decision asks some ten thousand times
        for name, per_unit in self.parts:
            length += per_unit * widths[name]
        return length


def keep_all(groups: tuple[Group, ...]) -> dict[str, Bool[np.ndarray, " units"]]:
    """The choice that keeps every unit, by group name."""
    return {group.name: np.ones(group.num_units, dtype=bool) for group in groups}


def on_grid(groups: Sequence[Group], grid: int) -> tuple[Group, ...]:
    """The groups, those of two blocks of the grid or more with cuts in whole ones; heads and states stay as they are.

    >>> [group.multiple_of for group in on_grid([Group("a", "unit", 64, ()), Group("b", "unit", 24, ())], 16)]
    [16, 1]
    """

    def gridded(group: Group) -> Group:
        if group.kind != "unit" or group.what == "head" or group.num_units < 2 * grid:
            return group
        block = int(np.lcm(group.multiple_of, grid))
        return replace(group, multiple_of=block, usual_block=0, min_units=-(-group.min_units // block) * block)

    return tuple(map(gridded, groups))


def widths_of(groups: tuple[Group, ...]) -> dict[str, int]:
    """Number of active units by group name."""
    return {group.name: group.num_units for group in groups}


def random_keep(groups: Sequence[Group], seed: int = 0) -> dict[str, np.ndarray]:
    """A random choice of every group's units, the same for the same seed; of unequal widths where possible."""
    generator = np.random.default_rng(seed)
    used: set[int] = set()
    keep = {}
    for group in groups:
        low = max(group.min_units, min(2, group.num_units - 1), 0)
        fitting = range(low, group.num_units)
        if group.only_blocks:
            fitting = range(-(-low // group.multiple_of) * group.multiple_of, group.num_units, group.multiple_of)
        # Two groups of one width could hide that a size was bound to the wrong one of them.
        widths = [width for width in fitting if width not in used]
        width = int(generator.choice(widths or fitting)) if fitting else group.num_units
        used.add(width)
        kept = np.zeros(group.num_units, dtype=bool)
        kept[generator.permutation(group.num_units)[:width]] = True
        keep[group.name] = kept
    return keep


def check_blocks(groups: Iterable[Group]) -> None:
    """Check that the blocks of a user's own groups hold units, or raise GroupError by name."""
    for group in groups:
        if not isinstance(group.multiple_of, (int, np.integer)) or group.multiple_of < 1:
            raise GroupError(
                f"multiple_of of group {group.name!r} is a whole number of units, at least 1; got {group.multiple_of!r}"
            )
