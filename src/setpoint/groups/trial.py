"""A trial: a copy without data, cut at random widths, whose forward shows which sizes come out wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from setpoint.groups.build import OwnDim, Units
from setpoint.groups.export import Example, run_without_data
from setpoint.groups.group import Group
from setpoint.groups.shim import CallSizes, parse, set_call_sizes
from setpoint.groups.vanish import fit_forward
from setpoint.groups.walk import Call

Labels = np.ndarray

Places = dict[tuple[str, str], Labels]
"""Atoms along the dim that a place counts, by (module, place)."""


def call_of(call: Call) -> str:
    """The call that a place belongs to: "view#2" of "view#2[1]"."""
    return call.place.split("[", 1)[0]


def random_keep(groups: Sequence[Group], seed: int = 0) -> dict[str, np.ndarray]:
    """A random choice of every group's units, of unequal widths where possible, the same for the same seed.

    Equal widths would hide a size that follows the wrong group, and a width of 1 passes by broadcasting.
    """
    generator = np.random.default_rng(seed)
    used: set[int] = set()
    keep = {}
    for group in groups:
        low = max(group.min_units, min(2, group.num_units - 1), 0)
        fitting = range(low, group.num_units)
        if group.only_blocks:
            fitting = range(-(-low // group.multiple_of) * group.multiple_of, group.num_units, group.multiple_of)
        widths = [width for width in fitting if width not in used]
        width = int(generator.choice(widths or fitting)) if fitting else group.num_units
        used.add(width)
        kept = np.zeros(group.num_units, dtype=bool)
        kept[generator.permutation(group.num_units)[:width]] = True
        keep[group.name] = kept
    return keep


class Kept:
    """Which atoms survive a choice of units."""

    def __init__(self, units: Units, keep: Mapping[str, np.ndarray]) -> None:
        first = np.cumsum([0, *(group.num_units for group in units.groups)])
        flat = np.concatenate([*(keep[group.name] for group in units.groups), [True]])  # the last one: always there
        unit = first[np.maximum(units.group_of, 0)] + units.unit_of
        self.alive: np.ndarray = flat[np.where(units.group_of >= 0, unit, len(flat) - 1)]

    def count(self, labels: Labels) -> int:
        """Number of surviving entries."""
        return int(self.alive[labels].sum())


class Trial:
    """Runs copies without data at random widths, and sees which written sizes come out wrong.

    Args:
        model: the user's model, not touched.
        example: its example.
        units: what can be dropped.
        dims: dims of all tensors.
        calls: the written sizes that follow units.
        keep: the choice of units to try.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        units: Units,
        dims: Sequence[OwnDim],
        calls: Sequence[Call],
        keep: Mapping[str, np.ndarray],
    ) -> None:
        self.model, self.example, self.dims = model, example, dims
        self.kept = Kept(units, keep)
        self.stopped = False
        self._seen: dict[frozenset[tuple[str, str]] | None, dict[str, set[str]]] = {}
        dense: dict[str, dict[str, int]] = {}
        for call in calls:
            dense.setdefault(call.module, {})[call.place] = call.size
        # Where even the dense model disagrees, the calls are not numbered as the forward runs them.
        untrusted = self._wrong(dense, None)
        self.calls = [call for call in calls if call.module not in untrusted]
        self.small: dict[str, dict[str, int]] = {}
        for call in self.calls:
            self.small.setdefault(call.module, {})[call.place] = self.kept.count(call.labels)

    def needed_attributes(self, known: Places) -> Places:
        """Integer attributes of the user's own modules that the forward's sizes come from."""
        places: Places = {}
        before = self._wrong(self.small, known)
        for candidates in self._candidates(known).values():
            wrong = self._wrong(self.small, {**known, **candidates})
            for (module, attribute), labels in candidates.items():
                meant = {call.place for call in self.calls if call.module == module and call.size == len(labels)}
                if len(wrong.get(module, set()) & meant) < len(before.get(module, set()) & meant):
                    places[module, attribute] = labels
        return places

    def needed_calls(self, known: Places) -> set[tuple[type, str]]:
        """Calls with a size that is still wrong once the attributes are right.

        By class and call: modules of one class run the same code, and one of them may be right by accident.
        """
        wrong = self._wrong(self.small, known)
        return {
            (type(self.model.get_submodule(module)), place.split("[", 1)[0])
            for module, found in wrong.items()
            for place in found
        }

    def _candidates(self, known: Places) -> dict[tuple[type, str], Places]:
        """Attributes that equal a written size with one meaning only, by class and name."""
        meanings: dict[tuple[str, int], list[Labels]] = {}
        for call in self.calls:
            if len(call.labels) == call.size:
                meanings.setdefault((call.module, call.size), []).append(call.labels)
        result: dict[tuple[type, str], Places] = {}
        for (name, size), labels in meanings.items():
            module = self.model.get_submodule(name)
            if size < 2 or len({self.kept.count(meaning) for meaning in labels}) > 1:
                continue
            for attribute, value in vars(module).items():
                if type(value) is int and value == size and (name, attribute) not in known:
                    result.setdefault((type(module), attribute), {})[name, attribute] = labels[0]
        return result

    def _wrong(self, sizes: Mapping[str, Mapping[str, int]], places: Places | None) -> dict[str, set[str]]:
        """Places by module at which the live forward gives another size; `places=None`: the dense model."""
        key = None if places is None else frozenset(places)
        if key not in self._seen:
            self._seen[key] = self._run(sizes, places)
        return self._seen[key]

    def _run(self, sizes: Mapping[str, Mapping[str, int]], places: Places | None) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {name: set() for name in sizes}

        def prepare(twin: nn.Module) -> None:
            if places is not None:
                _cut_shapes(twin, self.dims, self.kept)
                _set_places(twin, places, self.kept)
            for name, wanted in sizes.items():
                found[name].clear()
                twin.get_submodule(name).forward = _Watched(twin.get_submodule(name), wanted, found[name])

        try:
            run_without_data(self.model, self.example, prepare)
        except Exception:  # noqa: BLE001 - a foreign forward may do anything
            # A forward that stopped half-way shows nothing about later places: count them all.
            self.stopped = True
            return {name: set(wanted) for name, wanted in sizes.items()}
        return {name: places_found for name, places_found in found.items() if places_found}


@dataclass(frozen=True)
class Outcome:
    """What a forward without data came to.

    Args:
        shapes: of its outputs.
        numbers: every number that it computed with: factors, divisors, exponents.
        error: what it raised; then there is nothing else.
    """

    shapes: tuple[torch.Size, ...] = ()
    numbers: tuple[float, ...] = ()
    error: str = ""


def outcome_of(
    model: nn.Module,
    example: Example,
    units: Units,
    dims: Sequence[OwnDim],
    places: Places,
    keep: Mapping[str, np.ndarray],
    *,
    other_mode: bool = False,
) -> Outcome:
    """The forward of a copy without data, cut; in the other of train and eval mode if asked."""
    kept = Kept(units, keep)
    numbers = _Numbers()

    def prepare(twin: nn.Module) -> None:
        numbers.seen.clear()
        if other_mode:
            twin.train(not model.training)
        _cut_shapes(twin, dims, kept)
        _set_places(twin, places, kept)

    try:
        with numbers:
            shapes = run_without_data(model, example, prepare)
    except Exception as error:  # noqa: BLE001 - any failure of a foreign forward counts
        return Outcome(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}")
    return Outcome(tuple(shapes), tuple(numbers.seen))


_ARITHMETIC = {"tensor", "mul", "mul_", "div", "div_", "true_divide", "add", "sub", "pow", "floor_divide"}
_ARITHMETIC |= {f"__{side}{name}__" for side in ("", "r", "i") for name in ("mul", "truediv", "add", "sub", "pow")}
"""Functions in which a whole number is no size but something to compute with."""


class _Numbers(TorchFunctionMode):
    """Notes the numbers that a forward computes with; those that differ after a cut were worked out from a size."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The same call."""
        kwargs = kwargs or {}
        kinds = (int, float) if getattr(func, "__name__", "") in _ARITHMETIC else (float,)
        self.seen.extend(value for value in (*args, *kwargs.values()) if type(value) in kinds)
        return func(*args, **kwargs)


def _set_places(twin: nn.Module, places: Places, kept: Kept) -> None:
    """Set attributes, and correct calls, to what is left."""
    calls: dict[str, dict[str, int]] = {}
    for (module, place), labels in places.items():
        if "#" in place:
            calls.setdefault(module, {})[place] = kept.count(labels)
        else:
            set_attribute(twin.get_submodule(module), place, kept.count(labels))
            fit_forward(twin.get_submodule(module))
    for module, sizes in calls.items():
        set_call_sizes(twin.get_submodule(module), sizes)


def as_python_counts(model: nn.Module, example: Example, calls: Sequence[Call]) -> list[Call]:
    """Calls with slices numbered as the live forward counts them; the graph holds only those that take less than all.

    A number beyond those is left out; one that came out wrong is found by the trial of the dense model.
    """
    modules = sorted({call.module for call in calls if call.place.startswith("slice#")})
    if not modules:
        return list(calls)
    live: dict[str, list[int]] = {}

    def prepare(twin: nn.Module) -> None:
        for name in modules:
            live[name] = []
            twin.get_submodule(name).forward = _Watched(twin.get_submodule(name), {}, set(), live[name])

    try:
        run_without_data(model, example, prepare)
    except Exception:  # noqa: BLE001 - a foreign forward may do anything
        live = {}
    renumbered = []
    for call in calls:
        if not call.place.startswith("slice#"):
            renumbered.append(call)
            continue
        number, argument = call.place.removeprefix("slice#").split("[")
        numbers = live.get(call.module, [])
        if int(number) < len(numbers):
            renumbered.append(replace(call, place=f"slice#{numbers[int(number)]}[{argument}"))
    return renumbered


class _Watched:
    """A forward that corrects sizes and notes where it had to, and which of its slices took less than all."""

    def __init__(
        self, module: nn.Module, sizes: Mapping[str, int], changed: set[str], narrowing: list[int] | None = None
    ) -> None:
        self.module, self.calls, self.changed, self.narrowing = module, parse(sizes), changed, narrowing
        self.inner = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward under watch."""
        with CallSizes(self.calls, self.changed) as sizes:
            try:
                if self.inner is not None:
                    return self.inner(*args, **kwargs)
                return type(self.module).forward(self.module, *args, **kwargs)
            finally:
                if self.narrowing is not None:
                    self.narrowing[:] = sizes.narrowing


def _cut_shapes(twin: nn.Module, dims: Sequence[OwnDim], kept: Kept) -> None:
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
        if isinstance(module, nn.RNNBase):  # it keeps a list of its weights besides
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


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
