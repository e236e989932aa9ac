"""An inspection: the groups, costs and frozen places of a model, before any training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from setpoint.actuator.verify import failing_on_few_rows
from setpoint.controller.ladder import lowest_width
from setpoint.cost.flops import flops_cost
from setpoint.cost.params import params_cost
from setpoint.errors import UsageError
from setpoint.groups.export import Example, inputs_of, tensors_of
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import Frozen, trace
from setpoint.messages import a_type, counted
from setpoint.report.own_function import is_own_function, named_errors, own_function
from setpoint.report.parameters import Part, params_along, parts, share_along
from setpoint.report.zoo import named_model, noise

MOST_NUMBERS = 2**28
"""In an example that is filled with noise: a gigabyte of them."""


@dataclass(frozen=True)
class GroupReport:
    """One group for readers. Fields of the same name as in `Group` have its meaning.

    Args:
        each: entries of a unit along a dim of the weight that writes it: 4 where it is four channels, or four gates.
        kept_whole: why `attach` does not prune it by default; empty if it may be pruned.
        params: parameters that lie along its units; one may lie along units of two groups.
        flops_share: share of the model's FLOPs saved by cutting this group alone to its fewest units.
        places: (tensor, dim, role) of each of its slices.
    """

    name: str
    what: str
    num_units: int
    min_units: int
    multiple_of: int
    each: int
    kept_whole: str
    params: int
    params_share: float
    flops_share: float
    places: tuple[tuple[str, int | None, str], ...]

    @property
    def units(self) -> str:
        """So many units in words: "16 channels", or "4 units of 4 channels". A neuron is one, whatever its gates."""
        if self.each == 1 or self.what != "channel":
            return counted(self.num_units, self.what)
        return f"{counted(self.num_units, 'unit')} of {self.each} channels"


@dataclass(frozen=True)
class Inspection:
    """Groups, costs and frozen places of a model.

    Args:
        prunable_params_share: share of the parameters that lie along a unit of a group that may be pruned.
        cheapest_flops, cheapest_params: both with every group that may be pruned cut to its fewest units.
        parts: every parameter once, by tensor and group.
    """

    model: str
    inputs: tuple[tuple[int, ...], ...]
    verified: bool
    groups: tuple[GroupReport, ...]
    flops: float
    params: int
    prunable_params_share: float
    cheapest_flops: float
    cheapest_params: int
    frozen: tuple[Frozen, ...]
    parts: tuple[Part, ...]


def inspect_model(name: str, model: nn.Module, example: Example, *, verify: bool = True) -> Inspection:
    """Trace a model, try its cuts on a copy as `attach` does, and report groups and costs.

    The model, which is not touched, is any module that `torch.export` can follow. On the "meta" device it has no
    weights to try cuts on, so it is not verified.

    Raises:
        ExampleError: the model does not accept the example.
        ExportError: the model cannot be exported.
    """
    found = trace(model, example)
    verify = verify and not any(parameter.is_meta for parameter in model.parameters())
    flops, params = flops_cost(found), params_cost(model, found.groups)
    dense = widths_of(found.groups)
    lossless = tuple(group for group in found.groups if group.lossless)
    whole = {g.name: "" if g.lossless else "; ".join(g.notes) or "not lossless" for g in found.groups}
    if verify and lossless:
        failing = failing_on_few_rows(model, example, lossless)[0]
        whole |= dict.fromkeys(failing, "cutting it on a copy did not behave like masking it")
    pruned = tuple(group for group in found.groups if not whole[group.name])
    fewest = dense | {group.name: lowest_width(group) for group in pruned}
    spent, total = flops.total(dense), int(params.total(dense))
    reports = []
    for group in found.groups:
        low, along = lowest_width(group), params_along(model, (group,))
        report = GroupReport(
            name=group.name,
            what=group.what,
            num_units=group.num_units,
            min_units=low,
            multiple_of=group.multiple_of,
            each=_each(group),
            kept_whole=whole[group.name],
            params=along,
            params_share=along / total if total else 0.0,
            flops_share=flops.saving(dense, group.name, group.num_units - low) / spent if spent else 0.0,
            places=tuple((place.tensor, place.dim, place.role) for place in group.slices),
        )
        reports.append(report)
    args, kwargs = inputs_of(example)
    return Inspection(
        model=name,
        inputs=tuple(tuple(tensor.shape) for tensor in tensors_of([*args, *kwargs.values()])),
        verified=verify,
        groups=tuple(reports),
        flops=spent,
        params=total,
        prunable_params_share=share_along(model, pruned),
        cheapest_flops=flops.total(fewest),
        cheapest_params=int(params.total(fewest)),
        frozen=found.frozen,
        parts=parts(model, found.groups, [name for name, why in whole.items() if why]),
    )


def _each(group: Group) -> int:
    written = next((place for place in group.slices if place.role == "produce" and place.dim is not None), None)
    return 1 if written is None else int((written.index >= 0).sum()) // group.num_units


def load_target(target: str, shape: tuple[int, ...] | None = None) -> tuple[nn.Module, Example]:
    """The model and example that `module.py:function` returns, or a library's model of that name.

    Args:
        target: a file and a function of no arguments that returns a model and its inputs (a tuple, or a dict of
            keyword inputs), or a model alone if `shape` says what it takes; or the name of a model of torchvision,
            timm or transformers.
        shape: of the example, filled with noise; None for the usual size of a library's model.

    Raises:
        UsageError: there is no such file, function or model, it raises, it returns no inputs and no shape is given,
            or the shape does not fit it.
    """
    if shape is not None and min(shape) < 1:
        raise UsageError(f"sizes of an example are at least 1, got {','.join(map(str, shape))}")
    if shape is not None and math.prod(shape) > MOST_NUMBERS:
        raise UsageError(
            f"an example of {','.join(map(str, shape))} is too large to inspect a model with, at most {MOST_NUMBERS:,} "
            "numbers: give a smaller batch, since groups and shares are the same"
        )
    if target.endswith(".py"):
        raise UsageError(f"{target} is a file: name the function in it that returns the model, {target}:function")
    if not is_own_function(target):
        return named_model(target, shape)
    with named_errors(target):
        made = own_function(target)()
    if isinstance(made, tuple) and len(made) != 2:
        raise UsageError(
            f"{target} returned {counted(len(made), 'thing')}: return a model and its inputs, as `model, (x,)`"
        )
    if isinstance(made, tuple) and shape is not None:
        raise UsageError(f"{target} returns inputs of its own: leave out --input {','.join(map(str, shape))}")
    model, example = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{target} returned {a_type(model)}: return a torch.nn.Module, or one and its inputs")
    if example is None and shape is None:
        raise UsageError(
            f"{target} returned a model without inputs: return `model, (x,)`, or `model, {{'x': x}}` for keyword "
            "inputs; or say the shape of its one input of floats, for images --input 2,3,224,224"
        )
    example = (noise(shape),) if shape is not None else example
    return model, (example,) if isinstance(example, Tensor) else example
