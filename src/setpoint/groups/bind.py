"""Bindings: every place in the live Python code that holds a size which a cut changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from setpoint.groups.build import OwnDim, Units
from setpoint.groups.export import Example
from setpoint.groups.group import Group, SizeBinding
from setpoint.groups.shim import HEADS
from setpoint.groups.trial import Places, Trial, as_python_counts, call_of, outcome_of, random_keep
from setpoint.groups.vanish import bypassed, empty
from setpoint.groups.walk import Call, Walk

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


def bind(
    model: nn.Module,
    example: Example,
    shapes: Sequence[torch.Size],
    walk: Walk,
    units: Units,
    dims: Sequence[OwnDim],
) -> tuple[Units, tuple[Group, ...]]:
    """Units whose cut the live forward survives, and their groups with the size bindings that it takes.

    Groups with which a copy without data does not run, or returns other `shapes`, are frozen, by name.
    """
    while True:
        places = _places(model, example, walk, units, dims)
        failing = _failing(model, example, shapes, units, dims, places)
        if not failing:
            staying = _vanishing(model, example, shapes, walk, units, dims, places)
            return units, tuple(_vanished(group, staying) for group in _with_sizes(walk, units, places))
        for name, why in failing.items():
            walk.atoms.frozen.append((np.zeros(1, dtype=np.int64), name, f"with fewer units {why}"))
        units = units.without(failing)


def _places(model: nn.Module, example: Example, walk: Walk, units: Units, dims: Sequence[OwnDim]) -> Places:
    """Every place that must be set when units are dropped."""
    places = {**_standard(model, walk, dims), **_heads(model, walk, units, dims)}
    calls = [
        call
        for call in _calls_that_follow_units(walk, units)
        if not isinstance(model.get_submodule(call.module), (nn.MultiheadAttention, nn.modules.conv._ConvNd))
    ]
    calls = as_python_counts(model, example, calls)
    if not calls:
        return places
    trials: list[Trial] = []
    for keep in _choices(units.groups):
        trials.append(Trial(model, example, units, dims, calls, keep))
        trials[-1].needed_calls(places)
        if not trials[-1].stopped:
            break  # every size was seen; otherwise fewer groups may show more
    attributes: Places = {}
    for trial in trials:
        attributes |= trial.needed_attributes({**places, **attributes})
    # Attributes that do not make the whole forward right would also change what else is worked out
    # from them (an attention scale from `C // num_heads`): there the calls alone are corrected.
    short = {kind for trial in trials for kind, _ in trial.needed_calls({**places, **attributes})}
    places |= {
        (module, attribute): labels
        for (module, attribute), labels in attributes.items()
        if type(model.get_submodule(module)) not in short
    }
    needed = {call for trial in trials for call in trial.needed_calls(places)}
    for call in calls:
        if (type(model.get_submodule(call.module)), call_of(call)) in needed:
            places[call.module, call.place] = call.labels
    return places


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
        follows = isinstance(module, (nn.modules.conv._ConvNd, nn.GroupNorm, nn.RNNBase, nn.RNNCellBase))
        if follows and getattr(module, attribute) == len(labels):
            places[name, attribute] = labels
    return places


def _heads(model: nn.Module, walk: Walk, units: Units, dims: Sequence[OwnDim]) -> Places:
    """Heads of torch's own attention module, which counts them itself once it has a forward that can.

    Torch's own forward insists on its sizes, so the other one is needed for any unit along a dim of the module.
    """
    places: Places = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        prefix = f"{name}." if name else ""
        inside = {(dim.tensor, dim.dim): dim.labels for dim in dims if dim.tensor.startswith(prefix)}
        if not any(units.among(labels) for labels in inside.values()):
            continue
        labels = inside.get((f"{prefix}out_proj.weight", 1), np.zeros(module.embed_dim, dtype=np.int64))
        heads = labels.reshape(module.num_heads, -1)
        roots = walk.atoms.find(heads)
        whole = (roots == roots[:, :1]).all()
        places[name, HEADS] = heads[:, 0] if whole else np.zeros(module.num_heads, dtype=np.int64)
    return places


def _calls_that_follow_units(walk: Walk, units: Units) -> list[Call]:
    """Calls with a size that follows units; all sizes of such a call."""
    following = {(call.module, call_of(call)) for call in walk.calls if units.among(call.labels)}
    return [call for call in walk.calls if (call.module, call_of(call)) in following]


def _choices(groups: Sequence[Group]) -> list[dict[str, np.ndarray]]:
    """Random choices that leave no written size right by accident: of all groups, and without the lossy ones."""
    lossless = tuple(group for group in groups if group.lossless)
    whole = {group.name: np.ones(group.num_units, dtype=bool) for group in groups}
    some = [{**whole, **random_keep(lossless)}] if 0 < len(lossless) < len(groups) else []
    return [random_keep(groups, seed=1), *some]


def _failing(
    model: nn.Module,
    example: Example,
    shapes: Sequence[torch.Size],
    units: Units,
    dims: Sequence[OwnDim],
    places: Places,
) -> dict[str, str]:
    """Groups whose cut copy without data does not run, gives other shapes or computes with other numbers; and why."""
    whole = {group.name: np.ones(group.num_units, dtype=bool) for group in units.groups}
    lossless = [group.name for group in units.groups if group.lossless]
    chosen = random_keep(units.groups, seed=2)
    dense = outcome_of(model, example, units, dims, places, whole)
    other = outcome_of(model, example, units, dims, places, whole, other_mode=True)

    def fault(names: Sequence[str]) -> str | None:
        keep = {**whole, **{name: chosen[name] for name in names}}
        found = outcome_of(model, example, units, dims, places, keep)
        if found.error:
            return f"the forward fails: {found.error}"
        if list(found.shapes) != list(shapes):
            return "its outputs change their shape"
        if set(names) <= set(lossless) and found.numbers != dense.numbers:
            return "a number that is worked out from its size would change"
        if not other.error:
            mode = "eval" if model.training else "train"
            turned = outcome_of(model, example, units, dims, places, keep, other_mode=True)
            if turned.error or turned.shapes != other.shapes:
                return f"the forward fails in {mode} mode: {turned.error or 'its outputs change their shape'}"
        return None

    if dense.error:
        return {}  # even the dense copy cannot be judged like this: real tensors will tell
    failing = _culprits(lossless, fault)
    return failing if len(lossless) == len(whole) else {**failing, **_culprits([*whole], fault)}


def _vanished(group: Group, staying: Mapping[str, str]) -> Group:
    """A group that the model goes round: its fewest units are 0, or a note says why it cannot lose all of them."""
    if group.name not in staying:
        return group
    why = staying[group.name]
    return replace(group, notes=(*group.notes, f"it cannot vanish: {why}")) if why else replace(group, min_units=0)


def _vanishing(
    model: nn.Module,
    example: Example,
    shapes: Sequence[torch.Size],
    walk: Walk,
    units: Units,
    dims: Sequence[OwnDim],
    places: Places,
) -> dict[str, str]:
    """Groups that the model goes round: with "" if all of their units may go, else with what stands against it.

    Groups whose names differ in numbers only (the layers of a stack) are tried together.
    """
    lossless = {group.name for group in units.groups if group.lossless}
    found = dict.fromkeys(sorted(bypassed(walk, units, walk.inputs, walk.outputs) & lossless), "")
    measured = walk.atoms.marked("measured")
    for name, group in zip([group.name for group in units.groups], range(len(units.groups)), strict=True):
        if name in found and measured[units.group_of == group].any():
            found[name] = "a weight is divided by a norm over its units, which would be 0"

    for call in walk.calls:
        if call.place.startswith("conv") and not isinstance(model.get_submodule(call.module), nn.modules.conv._ConvNd):
            gone = {units.groups[position].name for position in units.among(call.labels)}
            found |= dict.fromkeys(gone & set(found), "a convolution called as a function needs one group at least")

    def fault(names: Sequence[str]) -> str:
        outcome = outcome_of(model, example, units, dims, places, empty(names, units))
        return outcome.error or ("" if list(outcome.shapes) == list(shapes) else "outputs change their shape")

    fine = [name for name, why in found.items() if not why]
    if not fine or not fault(fine):
        return found
    alike: dict[str, list[str]] = {}
    for name in fine:
        alike.setdefault(re.sub(r"\d+", "0", name), []).append(name)
    for names in alike.values():
        found |= dict.fromkeys(names, fault(names))
    fine = [name for name, why in found.items() if not why]
    together = fault(fine) if fine else ""
    return found | dict.fromkeys(fine, together)


def _culprits(suspects: list[str], fault: Callable[[Sequence[str]], str | None]) -> dict[str, str]:
    """The groups that are at fault, by bisection."""
    failing: dict[str, str] = {}
    while suspects and fault(suspects) is not None:
        context: list[str] = []
        found = list(suspects)
        while len(found) > 1:
            left, right = found[: len(found) // 2], found[len(found) // 2 :]
            if fault([*context, *left]) is not None:
                found = left
            else:
                context, found = [*context, *left], right
        failing[found[0]] = fault([*context, *found]) or "the forward fails"
        suspects = [name for name in suspects if name != found[0]]
    return failing


def _with_sizes(walk: Walk, units: Units, places: Places) -> tuple[Group, ...]:
    """Hand every attribute to the groups it counts, and every corrected call to all groups that its module touches.

    The forward may work a call's size out of any of them, so that a cut of one of them alone makes it wrong, even
    where the right size is not changed by that cut.
    """
    sizes: dict[int, list[SizeBinding]] = {}
    by_module: dict[str, set[int]] = {}
    for (module, place), labels in places.items():
        members = set(units.among(labels))
        if "#" in place:
            if module not in by_module:
                by_module[module] = _touching(walk, units, module)
            members |= by_module[module]
        for position in sorted(members):
            sizes.setdefault(position, []).append(SizeBinding(module, place, units.index(labels, position)))
    return tuple(replace(group, sizes=tuple(sizes.get(position, ()))) for position, group in enumerate(units.groups))


def _touching(walk: Walk, units: Units, module: str) -> set[int]:
    """Groups with units along a dim of something that the module or a part of it reads or makes."""
    inside = f"{module}." if module else ""
    within = ((*read, *made) for name, read, made in walk.flow if name == module or name.startswith(inside))
    arrays = {id(labels): labels for values in within for v in values for labels in v.labels if labels is not None}
    return {group for labels in arrays.values() for group in units.among(labels)}
