"""Size probes: copies without data, cut to random widths, whose forward shows which sizes in the code are wrong.

What is probed is a candidate: the units found in a model's graph, whose cut its live forward has yet to survive.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from setpoint.groups.build import Kept, Labels, OwnDim, Places, Units
from setpoint.groups.example import Example
from setpoint.groups.forward import PartialForward
from setpoint.groups.group import keep_all
from setpoint.groups.model_copy import computed, copy_of
from setpoint.groups.rng import preserved_rng_state
from setpoint.groups.sizes_in_code.place import write_size
from setpoint.groups.sizes_in_code.shim import COUNTED, CallSizes, parse, set_call_sizes
from setpoint.groups.walk import Call, Walk


class FakeForward:
    """Forwards of copies of a model on tensors without data, or on real ones where it needs data."""

    def __init__(self, model: nn.Module, example: Example, forward: PartialForward | None = None) -> None:
        self.model = model
        self._forward = forward or PartialForward.whole(example)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._needs_data: dict[bool, bool] = {}  # by whether the copy was in the other mode
        self._stand_ins: dict[int, Any] | None = None

    def run(
        self, prepare: Callable[[nn.Module], None] = lambda twin: None, *, other_mode: bool = False
    ) -> tuple[torch.Size, ...]:
        """Shapes of what a prepared copy returns, in the other of train and eval mode with `other_mode`."""
        if not self._needs_data.get(other_mode, False):
            try:
                with _quiet():
                    shapes = self._run(prepare, other_mode, fake=True)
            except Exception:
                # It may have asked for a value, or have no kernel for fake tensors: real ones tell.
                if self._needs_data.get(other_mode) is False:
                    raise
            else:
                self._needs_data[other_mode] = False
                return shapes
        gc.collect(1)  # earlier copies with data must not gather while collection waits
        shapes = self._run(prepare, other_mode, fake=False)
        self._needs_data[other_mode] = True
        return shapes

    def same_shapes(self, left: Sequence[torch.Size], right: Sequence[torch.Size], *, other_mode: bool = False) -> bool:
        """Whether two forwards returned the same shapes; where data was needed, it may have decided on sizes."""
        if not self._needs_data.get(other_mode, False):
            return tuple(left) == tuple(right)
        return [len(shape) for shape in left] == [len(shape) for shape in right]

    def _run(self, prepare: Callable[[nn.Module], None], other_mode: bool, *, fake: bool) -> tuple[torch.Size, ...]:
        # The memo makes deepcopy take the stand-ins for the tensors, so no data is copied.
        twin = copy_of(self.model, self._without_data() if fake else None, users_hooks=False)
        # A forward may write into its inputs: real ones are cloned.
        inputs = {
            id(x): self._fake.from_tensor(x.detach()) if fake else x.detach().clone() for x in self._forward.tensors
        }
        with self._fake if fake else nullcontext(), preserved_rng_state(self.model):
            if other_mode:
                twin.train(not self.model.training)
            prepare(twin)
            return tuple(tensor.shape for tensor in self._forward.with_tensors(inputs).run(twin))

    def _without_data(self) -> dict[int, Any]:
        """Tensors without data by id of those that they stand for; they serve all copies."""
        if self._stand_ins is None:
            self._stand_ins = {}
            for key, tensor in computed(self.model).items():
                self._stand_ins[key] = self._fake.from_tensor(tensor.detach())
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                fake = self._fake.from_tensor(tensor.detach())
                trained = isinstance(tensor, nn.Parameter)
                self._stand_ins[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if trained else fake
        return self._stand_ins


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what fake tensors log about a failing forward: real ones may do."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@dataclass(frozen=True, eq=False)
class Candidate:
    """What is known of a model before its forward is tried with fewer units."""

    forward: FakeForward  # the model's forward on copies
    shapes: tuple[torch.Size, ...]  # of the model's outputs
    walk: Walk  # the record of the walk over its graph
    dims: Sequence[OwnDim]  # of all parameters and buffers
    units: Units  # what can be dropped according to the graph
    outcomes: dict[Any, Outcome] = field(default_factory=dict)  # of copies that ran already

    @property
    def model(self) -> nn.Module:
        """The user's model, not touched."""
        return self.forward.model

    @property
    def everything(self) -> dict[str, np.ndarray]:
        """The choice that keeps every unit."""
        return keep_all(self.units.groups)

    def kept(self, keep: Mapping[str, np.ndarray] = MappingProxyType({})) -> Kept:
        """What survives where only these groups lose units; by default none does."""
        return Kept(self.units, {**self.everything, **keep})

    def kind_of(self, module: str) -> type[nn.Module]:
        """Class of a module, whose code all its modules share."""
        return type(self.model.get_submodule(module))


Wrong = dict[str, dict[str, int]]
"""Places by module at which the live forward gives a wrong size, and that size."""


def call_of(call: Call) -> str:
    """The call that a place belongs to: "view#2" of "view#2[1]"."""
    return call.place.split("[", 1)[0]


class SizeProbe:
    """Runs copies without data with the choice `keep`, and finds which of the written sizes in `calls` are wrong."""

    def __init__(self, candidate: Candidate, calls: Sequence[Call], keep: Mapping[str, np.ndarray]) -> None:
        self.candidate, self.calls = candidate, calls
        self.kept = candidate.kept(keep)
        self._seen: dict[frozenset[tuple[str, str]], Wrong | None] = {}

    def stops(self, known: Places) -> bool:
        """Whether the forward fails even with every written size corrected."""
        return self._run(known) is None

    def needed_attributes(self, known: Places) -> Places:
        """Integer attributes of the user's own modules from which the forward computes sizes."""
        places: Places = {}
        before = self._wrong(known)
        by_class: dict[type, list[Places]] = {}
        for (kind, _), candidates in self._candidates(known, before).items():
            by_class.setdefault(kind, []).append(candidates)
        # Attributes of one class seldom matter to another, so classes are tried together, an attribute of each.
        for together in zip_longest(*by_class.values(), fillvalue={}):
            joint: Places = {place: labels for candidates in together for place, labels in candidates.items()}
            for candidates in together if self.stops({**known, **joint}) else [joint]:
                wrong = self._wrong({**known, **candidates})
                for (module, attribute), labels in candidates.items():
                    size = len(labels)
                    meant = {call.place for call in self.calls if call.module == module and call.size == size}
                    if len(wrong.get(module, {}).keys() & meant) < len(before.get(module, {}).keys() & meant):
                        places[module, attribute] = labels
        return places

    def needed_calls(self, known: Places) -> set[tuple[type, str]]:
        """Calls, by class, with a size still wrong with right attributes: one module may be right by accident."""
        return {
            (self.candidate.kind_of(module), place.split("[", 1)[0])
            for module, found in self._wrong(known).items()
            for place in found
        }

    def written_calls(self, known: Places) -> dict[tuple[type, str], bool]:
        """By class and place with a wrong live size: whether it is that of the example, so a constant of the code."""
        found = self._run(known) or {}
        shown: dict[tuple[type, str], bool] = {}
        for call in self.calls:
            live = found.get(call.module, {}).get(call.place)
            if live is not None:
                key = self.candidate.kind_of(call.module), call.place
                shown[key] = shown.get(key, True) and live == call.size
        return shown

    def _candidates(self, known: Places, wrong: Wrong) -> dict[tuple[type, str], Places]:
        """By class and name, attributes that equal a wrong written size, where that size has one meaning only."""
        meanings: dict[tuple[str, int], list[Labels]] = {}
        for call in self.calls:
            if len(call.labels) == call.size and call.place in wrong.get(call.module, ()):
                meanings.setdefault((call.module, call.size), []).append(call.labels)
        result: dict[tuple[type, str], Places] = {}
        for (name, size), labels in meanings.items():
            module = self.candidate.model.get_submodule(name)
            if size < 2 or len({self.kept.count(meaning) for meaning in labels}) > 1:
                continue
            for attribute, value in vars(module).items():
                if type(value) is int and value == size and (name, attribute) not in known:
                    result.setdefault((type(module), attribute), {})[name, attribute] = labels[0]
        return result

    def _wrong(self, places: Places) -> Wrong:
        found = self._run(places)
        # A forward that stopped half-way shows nothing about later places: count them all.
        return by_module(self.calls) if found is None else found

    def _run(self, places: Places) -> Wrong | None:
        key = frozenset(places)  # a place has one meaning, so its labels need not be in the key
        if key not in self._seen:
            watch = Watch(self.calls, self.kept)
            outcome = outcome_of(self.candidate, places, self.kept, watch=watch)
            self._seen[key] = None if outcome.error else watch.wrong
        return self._seen[key]


class Watch:
    """Corrects the written sizes in `calls` to what `kept` counts, and notes by module where they were wrong."""

    def __init__(self, calls: Sequence[Call], kept: Kept) -> None:
        self.sizes: dict[str, dict[str, int]] = {}
        for call in calls:
            self.sizes.setdefault(call.module, {})[call.place] = kept.count(call.labels)
        self._found: Wrong = {name: {} for name in self.sizes}

    def over(self, twin: nn.Module) -> None:
        """Watch the forwards of this copy, and forget what was noted of another."""
        for name, sizes in self.sizes.items():
            self._found[name].clear()
            twin.get_submodule(name).forward = _Watched(twin.get_submodule(name), sizes, self._found[name])

    @property
    def wrong(self) -> Wrong:
        return {name: places for name, places in self._found.items() if places}


def by_module(calls: Sequence[Call]) -> Wrong:
    """All these places, with the sizes at the example."""
    places: Wrong = {}
    for call in calls:
        places.setdefault(call.module, {})[call.place] = call.size
    return places


@dataclass(frozen=True)
class Outcome:
    """Outcome of a forward without data."""

    shapes: tuple[torch.Size, ...] = ()  # of its outputs
    numbers: tuple[float, ...] = ()  # every number that it computed with: factors, divisors, exponents
    code: int = 0  # hash of the functions that it called, with the integers that it gave them
    error: str = ""  # the exception; then the other fields are empty


def outcome_of(
    candidate: Candidate, places: Places, kept: Kept, *, other_mode: bool = False, watch: Watch | None = None
) -> Outcome:
    """Outcome of the forward of a cut copy without data; of the other of train and eval mode with `other_mode`."""
    counts = frozenset((*place, kept.count(labels)) for place, labels in places.items())
    key = counts, hash(kept.alive.tobytes()), other_mode
    if watch is None and key in candidate.outcomes:
        return candidate.outcomes[key]
    notes = _Notes()

    def prepare(twin: nn.Module) -> None:
        _cut_shapes(twin, candidate.dims, kept)
        _set_places(twin, places, kept)
        if watch is not None:
            watch.over(twin)
        notes.clear()  # what was noted so far is not of the forward, or of one that failed without data

    try:
        with notes:
            shapes = candidate.forward.run(prepare, other_mode=other_mode)
    except Exception as error:  # noqa: BLE001 - any failure of a foreign forward counts
        outcome = Outcome(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}")
    else:
        outcome = Outcome(shapes, tuple(notes.numbers), hash(tuple(notes.code)))
    if watch is None:
        candidate.outcomes[key] = outcome
    return outcome


def dense_outcome(
    candidate: Candidate, places: Places, calls: Sequence[Call]
) -> tuple[Outcome, list[Call], list[Call]]:
    """Outcome of the dense model's forward; calls that it numbers as the graph does; and calls that it does not."""
    kept = candidate.kept()
    calls = _as_python_counts(candidate.forward, calls)
    watch = Watch(calls, kept)
    outcome = outcome_of(candidate, places, kept, watch=watch)
    untrusted = by_module(calls) if outcome.error else watch.wrong
    if untrusted:  # something was corrected, so that was not the model's own forward
        outcome = outcome_of(candidate, places, kept)
    return (
        outcome,
        [call for call in calls if call.module not in untrusted],
        [call for call in calls if call.module in untrusted and not outcome.error],
    )


def lost_in_other_mode(candidate: Candidate, calls: Sequence[Call]) -> list[Call]:
    """Calls whose numbers differ between train and eval mode."""
    kept = candidate.kept()
    watch = Watch(calls, kept)
    outcome = outcome_of(candidate, {}, kept, other_mode=True, watch=watch)
    if outcome.error and outcome_of(candidate, {}, kept, other_mode=True).error:
        return []  # the dense model does not run in that mode either
    return [call for call in calls if outcome.error or call.module in watch.wrong]


_ARITHMETIC = {"tensor", "as_tensor", "new_tensor", "full", "new_full", "full_like", "fill_", "masked_fill", "where"}
_ARITHMETIC |= {"clamp", "clamp_", "clamp_min", "clamp_max", "maximum", "minimum"}
_ARITHMETIC |= {"mul", "mul_", "div", "div_", "true_divide", "add", "sub", "pow", "floor_divide"}
_ARITHMETIC |= {f"__{side}{name}__" for side in ("", "r", "i") for name in ("mul", "truediv", "add", "sub", "pow")}
"""Functions in which an integer is an operand and no size."""


class _Notes(TorchFunctionMode):
    """Notes the numbers that a forward computes with (which differ if they come from a size), and what it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[float] = []
        self.code: list[Any] = []

    def clear(self) -> None:
        self.numbers.clear()
        self.code.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = (*args, *kwargs.values())
        name = getattr(func, "__name__", "")
        kinds = (int, float, np.integer, np.floating) if name in _ARITHMETIC else (float, np.floating)
        self.numbers.extend(float(value) for value in values if isinstance(value, kinds) and type(value) is not bool)
        if not (args and isinstance(args[0], torch.Tensor) and args[0].dim() == 0):  # a norm in training counts batches
            self.code.append(name)
            self.code.extend(value for value in _flat(values) if type(value) is int)
        return func(*args, **kwargs)


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        elif isinstance(value, slice):
            yield from (value.start, value.stop, value.step)
        else:
            yield value


def _set_places(twin: nn.Module, places: Places, kept: Kept) -> None:
    calls: dict[str, dict[str, int]] = {}
    for (module, place), labels in places.items():
        if "#" in place:
            calls.setdefault(module, {})[place] = kept.count(labels)
        else:
            write_size(twin.get_submodule(module), place, kept.count(labels))
    for module, sizes in calls.items():
        set_call_sizes(twin.get_submodule(module), sizes)


def _as_python_counts(forward: FakeForward, calls: Sequence[Call]) -> list[Call]:
    """Calls with slices numbered as in the live forward, not as in the graph, which holds only those of a part."""
    modules = sorted({call.module for call in calls if call.place.startswith("slice#")})
    if not modules:
        return list(calls)
    live: dict[str, list[int]] = {}

    def prepare(twin: nn.Module) -> None:
        for name in modules:
            live[name] = []
            twin.get_submodule(name).forward = _Watched(twin.get_submodule(name), {}, {}, live[name])

    try:
        forward.run(prepare)
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
    """A forward that corrects sizes and notes where they were wrong, and which of its slices took a part only."""

    def __init__(
        self, module: nn.Module, sizes: Mapping[str, int], changed: dict[str, int], narrowing: list[int] | None = None
    ) -> None:
        self.module, self.calls, self.changed, self.narrowing = module, parse(sizes)[0], changed, narrowing
        self.inner = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with CallSizes(self.calls, changed=self.changed) as sizes:
            try:
                inner = self.inner or partial(type(self.module).forward, self.module)
                result = inner(*args, **kwargs)
            finally:
                if self.narrowing is not None:
                    self.narrowing[:] = sizes.narrowing
        for (name, number), wanted in self.calls.items():
            if name in COUNTED and number >= sizes.numbers.get(name, 0):  # it was never made
                self.changed |= {f"{name}#{number}[{argument}]": 0 for argument in wanted}
        return result


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
        if isinstance(old, FakeTensor):
            new = torch.empty(shape, dtype=old.dtype, device=old.device)  # quicker than to slice
        else:
            new = old.detach()[tuple(map(slice, shape))].clone()  # its own numbers, where a forward looks at them
        replaced[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    for module in twin.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None and id(tensor) in replaced:
                    table[key] = replaced[id(tensor)]
        if isinstance(module, nn.RNNBase):  # its forward reads a list of its weights, not its attributes
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
