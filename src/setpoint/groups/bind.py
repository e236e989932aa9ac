"""Bindings: every place in the live Python code that holds a size which a cut changes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from setpoint.groups.build import OwnDim, Units
from setpoint.groups.export import Example, fake_copy, inputs_of, mode_inputs, tensors_of
from setpoint.groups.group import Group, SizeBinding
from setpoint.groups.shim import CallSizes, parse
from setpoint.groups.walk import Call, Walk

Labels = np.ndarray

# Attributes of torch's own modules that name the size of a dim of one of their tensors.
_STANDARD: tuple[tuple[type[nn.Module], str, str, int], ...] = (
    (nn.Linear, "in_features", "weight", 1),
    (nn.Linear, "out_features", "weight", 0),
    (nn.modules.batchnorm._NormBase, "num_features", "weight", 0),
    (nn.modules.batchnorm._NormBase, "num_features", "running_mean", 0),
    (nn.GroupNorm, "num_channels", "weight", 0),
    (nn.Embedding, "embedding_dim", "weight", 1),
    (nn.PReLU, "num_parameters", "weight", 0),
)


def bind(model: nn.Module, example: Example, walk: Walk, units: Units, dims: Sequence[OwnDim]) -> tuple[Group, ...]:
    """Groups with the size bindings that make the live forward run at any widths."""
    places = _standard(model, walk, dims)
    calls = _calls_that_follow_units(walk, units)
    places |= _attributes(model, calls, places)
    places |= _needed_calls(model, example, units, dims, places, calls)
    return _with_sizes(units, places)


Places = dict[tuple[str, str], Labels]
"""Atoms along the dim that a place counts, by (module, place)."""


def _standard(model: nn.Module, walk: Walk, dims: Sequence[OwnDim]) -> Places:
    own = {(dim.tensor, dim.dim): dim.labels for dim in dims}
    places: Places = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for kind, attribute, tensor, dim in _STANDARD:
            labels = own.get((f"{prefix}{tensor}", dim))
            if isinstance(module, kind) and labels is not None and getattr(module, attribute, None) == len(labels):
                places[name, attribute] = labels
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            for position in range(len(module.normalized_shape)):
                labels = own.get((f"{prefix}weight", position))
                if labels is not None:
                    places[name, f"normalized_shape[{position}]"] = labels
    for (name, attribute), labels in walk.attributes.items():
        module = model.get_submodule(name)
        if isinstance(module, (nn.modules.conv._ConvNd, nn.GroupNorm)) and getattr(module, attribute) == len(labels):
            places[name, attribute] = labels
    return places


def _calls_that_follow_units(walk: Walk, units: Units) -> list[Call]:
    """Calls with a size that follows units; all sizes of such a call."""
    following = {(call.module, _call_of(call)) for call in walk.calls if units.among(call.labels)}
    return [call for call in walk.calls if (call.module, _call_of(call)) in following]


def _call_of(call: Call) -> str:
    return call.place.split("[", 1)[0]


def _attributes(model: nn.Module, calls: Iterable[Call], known: Places) -> Places:
    """Integer attributes of the user's own modules: bound where the forward's sizes leave one meaning."""
    evidence: dict[str, dict[int, list[Labels]]] = {}
    for call in calls:
        evidence.setdefault(call.module, {}).setdefault(call.size, []).append(call.labels)
    places: Places = {}
    for name, by_size in evidence.items():
        module = model.get_submodule(name)
        if type(module).__module__.startswith("torch.nn."):
            continue
        for attribute, value in vars(module).items():
            if type(value) is int and value > 1 and value in by_size and (name, attribute) not in known:
                meanings = by_size[value]
                if all(len(meaning) == value for meaning in meanings):
                    places[name, attribute] = meanings[0]
    return places


def _needed_calls(
    model: nn.Module, example: Example, units: Units, dims: Sequence[OwnDim], places: Places, calls: Sequence[Call]
) -> Places:
    """Run a copy without data at random widths and see which written sizes come out wrong."""
    if not calls:
        return {}
    keep = random_keep(units.groups)
    kept = _Kept(units, keep)
    dense: dict[str, dict[str, int]] = {}
    small: dict[str, dict[str, int]] = {}
    labels: Places = {}
    for call in calls:
        dense.setdefault(call.module, {})[call.place] = call.size
        small.setdefault(call.module, {})[call.place] = kept.count(call.labels)
        labels[call.module, call.place] = call.labels
    untrusted = _run(model, example, dense, None)
    for module in untrusted:
        dense.pop(module)
        small.pop(module)

    def cut(twin: nn.Module) -> None:
        _cut_shapes(twin, dims, kept)
        for (module, place), of in places.items():
            set_attribute(twin.get_submodule(module), place, kept.count(of))

    changed = _run(model, example, small, cut)
    needed = {(module, place.split("[", 1)[0]) for module, found in changed.items() for place in found}
    return {
        (module, place): of
        for (module, place), of in labels.items()
        if (module, place.split("[", 1)[0]) in needed and module in small
    }


class _Kept:
    """Which atoms survive a choice of units."""

    def __init__(self, units: Units, keep: Mapping[str, np.ndarray]) -> None:
        self.alive = np.ones(len(units.group_of), dtype=bool)
        for position, group in enumerate(units.groups):
            inside = units.group_of == position
            self.alive[inside] = keep[group.name][units.unit_of[inside]]

    def count(self, labels: Labels) -> int:
        """Number of surviving entries."""
        return int(self.alive[labels].sum())


def random_keep(groups: Sequence[Group], seed: int = 0) -> dict[str, np.ndarray]:
    """Random, unequal choices of units, at least two of each group where it has two."""
    generator = np.random.default_rng(seed)
    keep = {}
    for group in groups:
        low = max(min(2, group.num_units), group.min_units)
        high = max(low, min(group.num_units - 1, int(0.9 * group.num_units)))
        width = int(generator.integers(low, high + 1))
        chosen = generator.permutation(group.num_units)[:width]
        keep[group.name] = np.isin(np.arange(group.num_units), chosen)
    return keep


def _run(model: nn.Module, example: Example, sizes: Mapping[str, Mapping[str, int]], cut: Any) -> dict[str, set[str]]:
    """Places by module at which the live forward of a fake copy gives another size than listed."""
    args, kwargs = inputs_of(example)
    with fake_copy(model) as (twin, mode):
        if cut is not None:
            cut(twin)
        changed: dict[str, set[str]] = {}
        for name, wanted in sizes.items():
            found = changed.setdefault(name, set())
            module = twin.get_submodule(name)
            module.forward = _Watched(module, wanted, found)
        try:
            list(tensors_of(twin(*mode_inputs(mode, args), **mode_inputs(mode, kwargs))))
        except Exception:  # noqa: BLE001
            # A forward that stopped half-way shows nothing about later places: count them all.
            return {name: set(wanted) for name, wanted in sizes.items()}
    return {name: found for name, found in changed.items() if found}


class _Watched:
    """A forward that corrects sizes and notes where it had to."""

    def __init__(self, module: nn.Module, sizes: Mapping[str, int], changed: set[str]) -> None:
        self.module, self.calls, self.changed = module, parse(sizes), changed
        self.inner = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward under watch."""
        with CallSizes(self.calls, self.changed):
            if self.inner is not None:
                return self.inner(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)


def _cut_shapes(twin: nn.Module, dims: Sequence[OwnDim], kept: _Kept) -> None:
    by_tensor: dict[str, dict[int, int]] = {}
    for own in dims:
        by_tensor.setdefault(own.tensor, {})[own.dim] = kept.count(own.labels)
    replaced: dict[int, Any] = {}
    names = dict(twin.named_parameters()) | dict(twin.named_buffers())
    for name, sizes in by_tensor.items():
        old = names[name]
        shape = [sizes.get(dim, size) for dim, size in enumerate(old.shape)]
        if list(old.shape) == shape:
            continue
        new: torch.Tensor = torch.empty(shape, dtype=old.dtype, device=old.device)
        replaced[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    for module in twin.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None and id(tensor) in replaced:
                    table[key] = replaced[id(tensor)]


_PLACE = re.compile(r"([\w.]+)(?:\[(\d+)\])?")


def set_attribute(module: nn.Module, place: str, size: int) -> None:
    """Set `"out_channels"`, `"normalized_shape[0]"` or `"config.hidden"` of a module."""
    match = _PLACE.fullmatch(place)
    assert match, f"not an attribute place: {place}"
    owner: Any = module
    *path, attribute = match[1].split(".")
    for step in path:
        owner = getattr(owner, step)
    if match[2] is None:
        setattr(owner, attribute, size)
    else:
        values = list(getattr(owner, attribute))
        values[int(match[2])] = size
        setattr(owner, attribute, type(getattr(owner, attribute))(values))


def _with_sizes(units: Units, places: Places) -> tuple[Group, ...]:
    """Hand every place to the groups it counts; a constant size of a corrected call goes to all of its groups."""
    sizes: dict[int, list[SizeBinding]] = {}
    by_call: dict[tuple[str, str], set[int]] = {}
    for (module, place), labels in places.items():
        by_call.setdefault((module, place.split("[", 1)[0]), set()).update(units.among(labels))
    for (module, place), labels in places.items():
        members = by_call[module, place.split("[", 1)[0]] if "#" in place else units.among(labels)
        for position in members:
            sizes.setdefault(position, []).append(SizeBinding(module, place, units.index(labels, position)))
    return tuple(
        replace(group, sizes=tuple(sizes.get(position, ()))) for position, group in enumerate(units.groups)
    )
