"""Material: what of a model may be pruned, and what it costs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from torch.optim import Optimizer

from setpoint.actuator.shrink import named_tensors
from setpoint.actuator.verify import failing_groups, few_rows
from setpoint.cost.cost import Cost
from setpoint.cost.flops import flops_cost
from setpoint.cost.params import params_cost
from setpoint.errors import ExampleError, GroupError
from setpoint.groups.export import Example
from setpoint.groups.group import Group, Size
from setpoint.groups.trace import Trace
from setpoint.loop.parts import Sparsity


@dataclass(frozen=True, eq=False)
class Material:
    """What may be pruned.

    Args:
        groups: at dense widths.
        frozen: by name or place, why it is left whole.
        costs: by resource, over the widths of `groups`.
        passes: training steps' worth of FLOPs that it took to find out.
        sources: by resource, what its cost was modelled by.
        sparsity: what single weights are held to, None for whole units.
    """

    groups: tuple[Group, ...]
    frozen: Mapping[str, str]
    costs: Mapping[str, Cost]
    passes: float = 0.0
    sources: Mapping[str, str] = field(default_factory=dict)
    sparsity: Sparsity | None = None


def in_hand(
    model: nn.Module, optimizers: Sequence[Optimizer], groups: tuple[Group, ...]
) -> tuple[tuple[Group, ...], dict[str, str]]:
    """The groups whose trained tensors are all in these optimizers; another one would not survive a cut of them."""
    held = {id(p) for each in optimizers for settings in each.param_groups for p in settings["params"]}
    trained = {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held}
    strangers = {
        group.name: f"{piece.tensor} is trained, but by none of the given optimizers: pass them all"
        for group in groups
        for piece in group.slices
        if piece.tensor in trained
    }
    return tuple(group for group in groups if group.name not in strangers), strangers


def check_copies(model: nn.Module, groups: tuple[Group, ...], copies: Sequence[nn.Module]) -> None:
    """A copy must hold every tensor that will be cut, in the same shape."""
    own = named_tensors(model)
    for number, each in enumerate(copies):
        if not isinstance(each, nn.Module):
            raise GroupError(f"copies[{number}] must be a torch.nn.Module, got {type(each).__name__}")
        theirs = {name.removeprefix("module."): tensor for name, tensor in named_tensors(each).items()}
        for name in dict.fromkeys(piece.tensor for group in groups for piece in group.slices):
            if name not in theirs or theirs[name].shape != own[name].shape:
                raise GroupError(
                    f"copies[{number}] ({type(each).__name__}) is no copy of the model: it has no {name!r} of shape "
                    f"{tuple(own[name].shape)}; pass a deepcopy or an AveragedModel of the model"
                )


def check_some(groups: tuple[Group, ...], frozen: Mapping[str, str]) -> None:
    """Check that there is anything to prune."""
    if groups:
        return
    reasons = [f"{place}: {reason}" for place, reason in list(frozen.items())[:8]]
    more = f"; and {len(frozen) - 8} more" if len(frozen) > 8 else ""
    raise GroupError(f"nothing in this model can be pruned. Left whole: {'; '.join(reasons) or 'no dim at all'}{more}")


def unit_material(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    example: Example,
    found: Trace,
    groups: tuple[Group, ...],
    frozen: dict[str, str],
    copies: Sequence[nn.Module],
    verify: bool,
) -> Material:
    """What may be cut, of the groups that were chosen, with FLOPs and parameters."""
    active, strangers = in_hand(model, optimizers, groups)
    frozen = frozen | strangers
    check_copies(model, active, copies)
    passes = 0.0
    if verify:
        active, failed, passes = _verified(model, example, active)
        frozen |= failed
    check_some(active, frozen)
    costs = {"flops": flops_cost(restricted(found, active)), "params": params_cost(model, active)}
    return Material(active, frozen, costs, passes)


def _verified(
    model: nn.Module, example: Example, groups: tuple[Group, ...]
) -> tuple[tuple[Group, ...], dict[str, str], float]:
    """The groups that behave like their masked twins, why the others do not, and the passes that took."""
    if not groups:
        return groups, {}, 0.0
    few, share = few_rows(example)
    try:
        failed = failing_groups(model, few, groups)
    except ExampleError:
        if share == 1.0:
            raise
        share, failed = 1.0, failing_groups(model, example, groups)
    if failed:
        warnings.warn(
            f"left whole, because cutting them on a copy did not behave like masking them: {', '.join(failed)}",
            stacklevel=4,
        )
    reasons = dict.fromkeys(failed, "cutting it on a copy did not behave like masking it")
    # At most four forward and backward passes vouch for all groups at once; each culprit is found by bisection.
    passes = 4 + 2 * len(failed) * (2 + math.ceil(math.log2(len(groups))))
    return tuple(group for group in groups if group.name not in reasons), reasons, share * passes


def restricted(found: Trace, groups: tuple[Group, ...]) -> Trace:
    """The trace over the widths of these groups only; the widths of all others become constants."""
    active = {group.name for group in groups}
    fixed = {group.name: group.num_units for group in found.groups if group.name not in active}

    def restrict(size: Size) -> Size:
        constant = size.constant + sum(each * fixed[name] for name, each in size.parts if name in fixed)
        return Size(constant, tuple(part for part in size.parts if part[0] in active))

    contractions = tuple(replace(each, sizes=tuple(map(restrict, each.sizes))) for each in found.contractions)
    return replace(found, groups=groups, contractions=contractions)
