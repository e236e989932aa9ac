"""Even: groups of a model by the width that its config says, or by their place in repeated blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from setpoint.configs.families import configured, shared_widths
from setpoint.controller.even import Kind, same_place
from setpoint.cost.cost import flops_cost, params_cost
from setpoint.errors import GroupError
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import Trace
from setpoint.loop.candidates import Candidates, restricted

_NOTHING = "even=True leaves nothing to cut"
_INSTEAD = ". Attach without even=True: setpoint.save writes models of any widths"


@dataclass(frozen=True, eq=False)
class Even:
    """What may be cut evenly.

    Args:
        traced: with groups of which a cut writes the config.
        groups: those that may be cut.
        kinds: by name, which share a width.
        frozen: by name, why others are not pruned.
    """

    traced: Trace
    groups: tuple[Group, ...]
    kinds: tuple[Kind, ...]
    frozen: Mapping[str, str]

    def complete(self, found: Candidates, model: nn.Module) -> Candidates:
        """Without the kinds of which some layer is not pruned: the others would be narrower than that layer.

        Raises:
            GroupError: when nothing is left.
        """
        active, missing = {group.name for group in found.groups}, dict[str, str]()
        for kind in self.kinds:
            whole = [name for name in kind if name not in active]
            missing |= {
                name: f"even=True, and {whole[0]} is not pruned: {found.frozen.get(whole[0], 'not among the groups')}"
                for name in kind
                if whole and name in active
            }
        frozen = {**found.frozen, **self.frozen, **missing}
        if not missing:
            return replace(found, frozen=frozen)
        groups = tuple(group for group in found.groups if group.name not in missing)
        if not groups:
            raise GroupError(f"{_NOTHING}: {'; '.join(sorted(set(missing.values()))[:4])}{_INSTEAD}")
        # Costs are functions of the groups that may be pruned: they have to be made for those that are left.
        traced = restricted(self.traced, groups)
        return replace(
            found,
            groups=groups,
            frozen=frozen,
            costs={"flops": flops_cost(traced), "params": params_cost(model, groups)},
        )


def evened(model: nn.Module, traced: Trace, wanted: Sequence[Group] | None, *, allow_lossy: bool) -> Even:
    """The groups that a config has a place for, or that no config describes, and their kinds.

    Args:
        wanted: out of these groups; None for all.
        allow_lossy: also those in which a zeroed unit is not the same as an absent one.

    Raises:
        GroupError: when there are none.
    """
    chosen = {group.name for group in (traced.groups if wanted is None else wanted)}
    some = tuple(group for group in traced.groups if group.name in chosen and (group.lossless or allow_lossy))
    described, shared = dict(configured(model)), shared_widths(model, some)
    groups, placed = traced.groups, {name for width in shared for name in width.names}
    for width in shared:
        groups = width.bound(groups)
    frozen = {}
    for group in some:
        # A group that reaches into a described module is one whose width its config must be able to say.
        inside = next((name for name in described if any(_inside(part.tensor, name) for part in group.slices)), None)
        if inside is not None and group.name not in placed:
            config = type(described[inside].config).__name__
            frozen[group.name] = f"even=True, and {config} has no place for fewer of its {group.what}s"
    free = tuple(group for group in some if group.name not in frozen and group.name not in placed)
    if described and not shared and not free:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(frozen.items())[:4]) or "no group is lossless"
        raise GroupError(f"{_NOTHING}: {reasons}{_INSTEAD}")
    # Also those that are not lossless: why they are not pruned is said where candidates are chosen.
    left = tuple(group for group in groups if group.name in chosen and group.name not in frozen)
    kinds = (*(width.names for width in shared), *same_place(free, widths_of(free)))
    return Even(replace(traced, groups=groups), left, kinds, frozen)


def _inside(tensor: str, module: str) -> bool:
    return not module or tensor.startswith(f"{module}.")
