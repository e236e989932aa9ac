"""Material: what of a model may be pruned, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.optim import Optimizer

from setpoint.actuator.shrink import named_tensors
from setpoint.cost.cost import Cost
from setpoint.errors import GroupError
from setpoint.groups.group import Group
from setpoint.loop.costing import Costing
from setpoint.loop.parts import Sparsity


@dataclass(frozen=True, eq=False)
class Material:
    """What may be pruned.

    Args:
        groups: at dense widths.
        frozen: by name or place, why it is left whole.
        costs: by resource, over the widths of `groups`.
        passes: training steps' worth of FLOPs that it took to find out.
        costing: how costs beyond FLOPs and parameters were found.
        sparsity: what single weights are held to, None for whole units.
    """

    groups: tuple[Group, ...]
    frozen: Mapping[str, str]
    costs: Mapping[str, Cost]
    passes: float = 0.0
    costing: Costing = field(default_factory=Costing)
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
