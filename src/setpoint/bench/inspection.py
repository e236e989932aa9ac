"""An inspection: what Setpoint would find in a model, before any training."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.actuator.verify import failing_groups
from setpoint.bench.task import BenchError
from setpoint.controller.ladder import lowest_width
from setpoint.cost.cost import Cost
from setpoint.cost.flops import flops_cost
from setpoint.cost.params import params_cost
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import Frozen, trace


@dataclass(frozen=True)
class GroupReport:
    """One group as people read it.

    Args:
        name: its name.
        what: what a unit is: "channel", "head", "neuron".
        num_units: units of the dense model.
        min_units: the fewest it can be cut to.
        multiple_of: cuts happen in blocks of this many units.
        kept_whole: why `attach` leaves it whole by default; empty if it may be pruned.
        flops_share: share of the model's FLOPs that is gone when this group alone is cut to its fewest units.
        places: (tensor, dim, role) of each of its slices.
    """

    name: str
    what: str
    num_units: int
    min_units: int
    multiple_of: int
    kept_whole: str
    flops_share: float
    places: tuple[tuple[str, int | None, str], ...]


@dataclass(frozen=True)
class Inspection:
    """What Setpoint would find in a model.

    Args:
        model: what was inspected.
        groups: in the order of the model.
        flops: FLOPs of one optimizer step, forward and backward, at the example's batch shape.
        params: number of parameters.
        cheapest_flops: the FLOPs with every group that may be pruned cut to its fewest units.
        frozen: what stays whole, and why.
    """

    model: str
    groups: tuple[GroupReport, ...]
    flops: float
    params: float
    cheapest_flops: float
    frozen: tuple[Frozen, ...]


def inspect_model(name: str, model: nn.Module, example: tuple[Tensor, ...], *, verify: bool = True) -> Inspection:
    """Trace a model, try its cuts on a copy as `attach` does, and report groups and costs.

    Args:
        name: what to call it.
        model: any module that `torch.export` can follow; it is not touched.
        example: positional inputs.
        verify: whether to try the cuts.

    Raises:
        ExampleError: the model does not accept the example.
        ExportError: the model cannot be exported.
    """
    found = trace(model, example)
    flops = flops_cost(found)
    dense = widths_of(found.groups)
    whole = _kept_whole(model, example, found.groups, verify)
    fewest = dense | {group.name: lowest_width(group) for group in found.groups if not whole[group.name]}
    return Inspection(
        model=name,
        groups=tuple(_group_report(group, flops, dense, whole[group.name]) for group in found.groups),
        flops=flops.total(dense),
        params=params_cost(model, found.groups).total(dense),
        cheapest_flops=flops.total(fewest),
        frozen=found.frozen,
    )


def load_target(target: str, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model and example that `module.py:function` returns, or a torchvision model of that name.

    Args:
        target: a file and a function of no arguments that returns a model, or a model and a tuple of
            positional inputs; or the name of a torchvision model.
        shape: shape of the example, filled with noise, unless the function returns one.

    Raises:
        BenchError: there is no such file, function or model.
    """
    if ".py:" not in target:
        return _torchvision_model(target), (_noise(shape),)
    made = _function(target)()
    model, example = made if isinstance(made, tuple) else (made, (_noise(shape),))
    if not isinstance(model, nn.Module):
        raise BenchError(f"{target} returned a {type(model).__name__}: return a torch.nn.Module, or one and its inputs")
    return model, example if isinstance(example, tuple) else (example,)


def _kept_whole(
    model: nn.Module, example: tuple[Tensor, ...], groups: tuple[Group, ...], verify: bool
) -> dict[str, str]:
    """By group, why it is left whole; empty where it may be pruned."""
    why = {group.name: "" if group.lossless else "; ".join(group.notes) or "not lossless" for group in groups}
    tried = tuple(group for group in groups if group.lossless)
    if verify and tried:
        failing = failing_groups(model, example, tried)
        why |= dict.fromkeys(failing, "cutting it on a copy did not behave like masking it")
    return why


def _group_report(group: Group, flops: Cost, dense: Mapping[str, int], kept_whole: str) -> GroupReport:
    fewest = lowest_width(group)
    saving = flops.saving(dense, group.name, group.num_units - fewest)
    return GroupReport(
        name=group.name,
        what=group.what,
        num_units=group.num_units,
        min_units=fewest,
        multiple_of=group.multiple_of,
        kept_whole=kept_whole,
        flops_share=saving / flops.total(dense),
        places=tuple((place.tensor, place.dim, place.role) for place in group.slices),
    )


def _noise(shape: tuple[int, ...]) -> Tensor:
    """An example input; zeros would leave BatchNorm nothing to normalise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _torchvision_model(name: str) -> nn.Module:
    """An untrained torchvision model."""
    try:
        from torchvision import models
    except ImportError as error:
        raise BenchError(f'{name!r} needs torchvision: pip install "setpoint[bench]"') from error
    if name not in models.list_models():
        raise BenchError(
            f"unknown model {name!r}: name a torchvision model such as resnet50, "
            "or give module.py:function that returns your own"
        )
    model: nn.Module = models.get_model(name, weights=None)
    return model


def _function(target: str) -> Callable[[], Any]:
    """The function of a Python file."""
    file, _, name = target.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise BenchError(f"no file {path}: give an existing Python file as module.py:function")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    function = getattr(module, name, None)
    if not callable(function):
        raise BenchError(f"{path} has no function {name!r}")
    return function  # type: ignore[no-any-return]
