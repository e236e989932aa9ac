"""Bindings: every place in the live Python code that holds a size which a cut changes.

Copies without data, cut to random widths, show by their forward which sizes in the code would be wrong.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from setpoint.groups.atoms import Atoms
from setpoint.groups.build import Labels, OwnDim, Places, Units, standard_places
from setpoint.groups.example import Example, MethodForward
from setpoint.groups.forward import PartialForward
from setpoint.groups.group import keep_all, random_keep
from setpoint.groups.sizes_in_code.place import write_size
from setpoint.groups.sizes_in_code.shim import COUNTED, HEADS, CallSizes, get_call_sizes, parse, set_call_sizes
from setpoint.groups.untouched import computed, copy_of, preserved_rng_state
from setpoint.groups.walk import Call, Walk

_MAKING_CALLS = {"zeros", "ones", "full", "new_zeros", "expand", "repeat", "tile"}
"""Calls that make new dims, which in the graph may be the model's or the data's."""

_ARITHMETIC = {"tensor", "as_tensor", "new_tensor", "full", "new_full", "full_like", "fill_", "masked_fill", "where"}
_ARITHMETIC |= {"clamp", "clamp_", "clamp_min", "clamp_max", "maximum", "minimum"}
_ARITHMETIC |= {"mul", "mul_", "div", "div_", "true_divide", "add", "sub", "pow", "floor_divide"}
_ARITHMETIC |= {f"__{side}{name}__" for side in ("", "r", "i") for name in ("mul", "truediv", "add", "sub", "pow")}
"""Functions in which an integer is an operand and no size."""

Sizes = dict[str, dict[str, int]]
"""Sizes by module and place."""


class FakeForward:
    """Forwards of copies of a model on tensors without data, or on real ones where it needs data."""

    def __init__(self, model: nn.Module, example: Example, forward: PartialForward | None = None) -> None:
        self.model, self.users_hooks = model, False
        self._forward = forward or PartialForward.whole(example)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._needs_data: dict[bool, bool] = {}  # by whether the copy was in the other mode
        self._stand_ins: dict[int, Any] | None = None

    def run(
        self, prepare: Callable[[nn.Module], None] = lambda twin: None, *, other_mode: bool = False
    ) -> tuple[torch.Size, ...]:
        """Shapes of what a prepared copy returns, in the other of train and eval mode with `other_mode`."""
        if not self._needs_data.get(other_mode, False):
            log = logging.getLogger("torch._subclasses.fake_tensor")
            level = log.level
            log.setLevel(logging.CRITICAL)  # what it says of a failing forward: with real tensors that may run
            try:
                shapes = self._run(prepare, other_mode, fake=True)
            except Exception:
                # It may have asked for a value, or have no kernel for fake tensors: real ones tell.
                if self._needs_data.get(other_mode) is False:
                    raise
            else:
                self._needs_data[other_mode] = False
                return shapes
            finally:
                log.setLevel(level)
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
        twin = copy_of(self.model, self._without_data() if fake else None, users_hooks=self.users_hooks)
        # A forward may write into its inputs: real ones are cloned.
        inputs = {
            id(x): (self._fake.from_tensor(x.detach()) if fake else x.detach().clone()).requires_grad_(x.requires_grad)
            for x in self._forward.tensors
        }
        hush = warnings.catch_warnings(action="ignore")  # the user's own forward says it, too
        with self._fake if fake else nullcontext(), preserved_rng_state(self.model), hush:
            if other_mode:
                twin.train(not self.model.training)
            prepare(twin)
            return tuple(tensor.shape for tensor in self._forward.with_tensors(inputs).run(twin))

    def _without_data(self) -> dict[int, Any]:
        """Tensors without data by id of those that they stand for; they serve all copies."""
        if self._stand_ins is None:
            left = computed(self.model).items()
            self._stand_ins = {key: self._fake.from_tensor(tensor.detach()) for key, tensor in left}
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                fake = self._fake.from_tensor(tensor.detach())
                trained = isinstance(tensor, nn.Parameter)
                self._stand_ins[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if trained else fake
        return self._stand_ins


class Kept:
    """Which atoms survive a choice of units."""

    def __init__(self, units: Units, keep: Mapping[str, np.ndarray]) -> None:
        first = np.cumsum([0, *(group.num_units for group in units.groups)])
        # The last entry answers for atoms of no group, which always stay.
        flat = np.concatenate([*(keep[group.name] for group in units.groups), [True]])
        unit = first[np.maximum(units.group_of, 0)] + units.unit_of
        self.alive: np.ndarray = flat[np.where(units.group_of >= 0, unit, len(flat) - 1)]

    def count(self, labels: Labels) -> int:
        """Number of surviving entries."""
        return int(self.alive[labels].sum())


@dataclass(frozen=True)
class Outcome:
    """Outcome of a forward without data."""

    shapes: tuple[torch.Size, ...] = ()  # of its outputs
    numbers: tuple[float, ...] = ()  # every number that it computed with: factors, divisors, exponents
    code: int = 0  # hash of the functions that it called, with the integers that it gave them
    error: str = ""  # the exception; then the other fields are empty


@dataclass(frozen=True, eq=False)
class Candidate:
    """What is known of a model before its forward is tried with fewer units."""

    forward: FakeForward  # the model's forward on copies
    shapes: tuple[torch.Size, ...]  # of the model's outputs
    walk: Walk  # the record of the walk over its graph
    dims: Sequence[OwnDim]  # of all parameters and buffers
    units: Units  # what can be dropped according to the graph
    _outcomes: dict[Any, Outcome] = field(default_factory=dict)  # of copies that ran already

    @property
    def model(self) -> nn.Module:
        """The user's model, not touched."""
        return self.forward.model

    def kind_of(self, module: str) -> type[nn.Module]:
        """Class of a module, whose code all its modules share."""
        return type(self.model.get_submodule(module))

    def kept(self, keep: Mapping[str, np.ndarray] | None = None) -> Kept:
        """What survives where only these groups lose units; by default none does."""
        return Kept(self.units, {**keep_all(self.units.groups), **(keep or {})})

    def outcome(self, places: Places, kept: Kept, *, other_mode: bool = False, watch: Watch | None = None) -> Outcome:
        """Outcome of the forward of a cut copy without data; of the other of train and eval mode with `other_mode`."""
        counts = frozenset((*place, kept.count(labels)) for place, labels in places.items())
        key = counts, hash(kept.alive.tobytes()), other_mode
        if watch is None and key in self._outcomes:
            return self._outcomes[key]
        notes = _Notes()

        def prepare(twin: nn.Module) -> None:
            _cut_shapes(twin, self.dims, kept)
            _set_places(twin, places, kept)
            if watch is not None:
                watch.over(twin)
            notes.clear()  # what was noted so far is not of the forward, or of one that failed without data

        try:
            with notes:
                shapes = self.forward.run(prepare, other_mode=other_mode)
        except Exception as error:  # noqa: BLE001 - any failure of a foreign forward counts
            first = str(error).splitlines()[0] if str(error) else "no message"
            outcome = Outcome(error=f"{type(error).__name__}: {first}")
        else:
            outcome = Outcome(shapes, tuple(notes.numbers), hash(tuple(notes.code)))
        if watch is None:
            self._outcomes[key] = outcome
        return outcome


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
    calls: Sizes = {}
    for (module, place), labels in places.items():
        if "#" in place:
            calls.setdefault(module, {})[place] = kept.count(labels)
        else:
            write_size(twin.get_submodule(module), place, kept.count(labels))
    for module, sizes in calls.items():
        set_call_sizes(twin.get_submodule(module), sizes)


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
            table |= {key: replaced[id(tensor)] for key, tensor in table.items() if id(tensor) in replaced}
        if isinstance(module, nn.RNNBase):  # its forward reads a list of its weights, not its attributes
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


class Watch:
    """Corrects sizes of calls in the forward of a copy, and notes where the live ones are wrong.

    Args:
        sizes: what is right, by module and place.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.wrong: Sizes = {}  # the live ones
        self.narrowing: dict[str, list[int]] = {}  # by module, numbers of the slices that took a part only

    def over(self, twin: nn.Module) -> None:
        """Watch the forwards of this copy, and forget what was noted of another."""
        self.wrong = {}
        for name, sizes in self.sizes.items():
            module = twin.get_submodule(name)
            inner = module.__dict__.get("forward") or partial(type(module).forward, module)
            module.__dict__["forward"] = partial(self._run, inner, name, parse(sizes)[0])

    def _run(self, inner: Callable[..., Any], name: str, calls: Any, /, *args: Any, **kwargs: Any) -> Any:
        changed = self.wrong.setdefault(name, {})
        with CallSizes(calls, changed=changed) as sizes:
            try:
                result = inner(*args, **kwargs)
            finally:
                self.narrowing[name] = sizes.narrowing
        for (function, number), wanted in calls.items():
            if function in COUNTED and number >= sizes.numbers.get(function, 0):  # it was never made
                changed |= {f"{function}#{number}[{argument}]": 0 for argument in wanted}
        return result


def _sizes(calls: Sequence[Call], kept: Kept) -> Sizes:
    sizes: Sizes = {}
    for call in calls:
        sizes.setdefault(call.module, {})[call.place] = kept.count(call.labels)
    return sizes


def _call_of(call: Call) -> str:
    """The call that a place belongs to: "view#2" of "view#2[1]"."""
    return call.place.partition("[")[0]


def bind(candidate: Candidate) -> tuple[Units, Places]:
    """Units whose cut the live forward survives, and the places that then have to be set."""
    following = _calls_that_follow_units(candidate, candidate.walk.calls)
    dense, calls, lost = _dense_outcome(candidate, following)
    if isinstance(vars(candidate.model).get("forward"), MethodForward):
        # The shim corrects calls of a class's own forward, which is not what runs here.
        lost, calls = [*lost, *(call for call in calls if not call.module)], [call for call in calls if call.module]
    failing = _without_place(candidate, lost, "")
    while True:
        for name, why in failing.items():
            # Atom 0 is frozen already: the entry only reports the group and the reason.
            candidate.walk.atoms.frozen.append((np.zeros(1, dtype=np.int64), name, f"with fewer units {why}"))
        candidate = replace(candidate, units=candidate.units.without(failing))
        places = _places(candidate, _calls_that_follow_units(candidate, calls))
        corrected = {(module, place.partition("=")[0]) for module, place in places if "#" in place}
        placed = [call for call in calls if (call.module, call.place) in corrected]
        mode = "eval" if candidate.model.training else "train"
        failing = _without_place(candidate, _lost_in_other_mode(candidate, placed), f" in {mode} mode")
        failing = failing or _failing(candidate, places, dense)
        if not failing:
            return candidate.units, {**places, **_stated(candidate, places)}


def _calls_that_follow_units(candidate: Candidate, calls: Sequence[Call]) -> list[Call]:
    """Calls with a size that follows units, and all sizes of such a call; torch's own modules count for themselves."""
    following = {(call.module, _call_of(call)) for call in calls if candidate.units.among(call.labels)}
    return [
        call
        for call in calls
        if (call.module, _call_of(call)) in following
        and not isinstance(candidate.model.get_submodule(call.module), (nn.MultiheadAttention, nn.modules.conv._ConvNd))
    ]


def _dense_outcome(candidate: Candidate, calls: Sequence[Call]) -> tuple[Outcome, list[Call], list[Call]]:
    """Outcome of the dense model's forward; calls that it numbers as the graph does; and calls that it does not."""
    kept, heads = candidate.kept(), _heads(candidate)
    calls = _as_python_counts(candidate.forward, calls)
    watch = Watch(_sizes(calls, kept))
    outcome = candidate.outcome(heads, kept, watch=watch)
    untrusted = {call.module for call in calls if outcome.error or watch.wrong.get(call.module)}
    if untrusted:  # something was corrected, so that was not the model's own forward
        outcome = candidate.outcome(heads, kept)
    lost = [call for call in calls if call.module in untrusted and not outcome.error]
    return outcome, [call for call in calls if call.module not in untrusted], lost


def _as_python_counts(forward: FakeForward, calls: Sequence[Call]) -> list[Call]:
    """Calls with slices numbered as in the live forward, not as in the graph, which holds only those of a part."""
    watch = Watch({call.module: {} for call in calls if call.place.startswith("slice#")})
    try:
        if watch.sizes:
            forward.run(watch.over)
    except Exception:  # noqa: BLE001 - a foreign forward may do anything
        watch.narrowing = {}
    renumbered = []
    for call in calls:
        if not call.place.startswith("slice#"):
            renumbered.append(call)
            continue
        number, argument = call.place.removeprefix("slice#").split("[")
        numbers = watch.narrowing.get(call.module, [])
        if int(number) < len(numbers):
            renumbered.append(replace(call, place=f"slice#{numbers[int(number)]}[{argument}"))
    return renumbered


def _lost_in_other_mode(candidate: Candidate, calls: Sequence[Call]) -> list[Call]:
    """Calls whose numbers differ between train and eval mode."""
    if not calls:
        return []
    kept = candidate.kept()
    watch = Watch(_sizes(calls, kept))
    outcome = candidate.outcome({}, kept, other_mode=True, watch=watch)
    if outcome.error and candidate.outcome({}, kept, other_mode=True).error:
        return []  # the dense model does not run in that mode either
    return [call for call in calls if outcome.error or watch.wrong.get(call.module)]


def _without_place(candidate: Candidate, calls: Sequence[Call], when: str) -> dict[str, str]:
    """By name, why groups stay whose units these calls count: no call number identifies the place in the code."""
    return {
        candidate.units.groups[position].name: (
            f"a size given to {call.place.partition('#')[0]} by {call.module or 'the model'} would be wrong, and that "
            f"call has no fixed place in the forward{when}"
        )
        for call in calls
        for position in candidate.units.among(call.labels)
    }


def _heads(candidate: Candidate) -> Places:
    """Heads of torch's attention modules in which units lie: its own forward insists on its sizes."""
    places: Places = {}
    for name, module in candidate.model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        prefix = f"{name}." if name else ""
        inside = {(dim.tensor, dim.dim): dim.labels for dim in candidate.dims if dim.tensor.startswith(prefix)}
        if not any(candidate.units.among(labels) for labels in inside.values()):
            continue
        labels = inside.get((f"{prefix}out_proj.weight", 1), np.zeros(module.embed_dim, dtype=np.int64))
        num_heads = get_call_sizes(module).get(HEADS, module.num_heads)
        heads = labels.reshape(num_heads, -1)
        roots = candidate.walk.atoms.find(heads)
        tied = (roots == roots[:, :1]).all()
        places[name, HEADS] = heads[:, 0] if tied else np.zeros(num_heads, dtype=np.int64)
    return places


def _places(candidate: Candidate, calls: Sequence[Call]) -> Places:
    places = {**standard_places(candidate.model, candidate.walk, candidate.dims), **_heads(candidate)}
    if not calls:
        return places
    probes: list[_Probe] = []
    groups = candidate.units.groups
    lossless = tuple(group for group in groups if group.lossless)
    some = [random_keep(lossless)] if 0 < len(lossless) < len(groups) else []
    # Random choices under which no wrong size looks right: of all groups, and without the lossy ones.
    for keep in (random_keep(groups, seed=1), *some):
        probes.append(_Probe(candidate, calls, candidate.kept(keep)))
        if not probes[-1].stops(places):
            break  # every size was seen; otherwise fewer groups may show more
    attributes: Places = {}
    for probe in probes:
        attributes |= probe.needed_attributes({**places, **attributes})
    # An attribute that does not correct every size of the forward would also change what else is computed from it
    # (an attention scale from `C // num_heads`): there only the calls are corrected.
    short = {candidate.kind_of(call.module) for probe in probes for call, _ in probe.wrong({**places, **attributes})}
    places |= {place: labels for place, labels in attributes.items() if candidate.kind_of(place[0]) not in short}
    # By class, since one module may be right by accident; a live size that is the example's is a constant of the code.
    live = [(candidate.kind_of(call.module), call, size) for probe in probes for call, size in probe.wrong(places)]
    needed = {(kind, _call_of(call)) for kind, call, _ in live}
    constant: set[tuple[type, str]] = set()
    if not any(probe.stops(places) for probe in probes):
        constant = {(kind, call.place) for kind, call, _ in live}
        constant -= {(kind, call.place) for kind, call, size in live if size != call.size}
    found: Places = {}
    for call in calls:
        # A dim that a call makes may have the data's length, which differs in another batch: only units are bound.
        own = candidate.units.among(call.labels) or call.place.partition("#")[0] not in _MAKING_CALLS
        kind = candidate.kind_of(call.module)
        if own and (kind, _call_of(call)) in needed:
            written = f"={call.size}" if (kind, call.place) in constant else ""
            found[call.module, call.place + written] = call.labels
    return places | found


class _Probe:
    """Forwards of copies in which this is kept, and which of the sizes written in `calls` are wrong in them."""

    def __init__(self, candidate: Candidate, calls: Sequence[Call], kept: Kept) -> None:
        self.candidate, self.calls, self.kept = candidate, calls, kept
        self._seen: dict[frozenset[tuple[str, str]], Sizes | None] = {}

    def _run(self, places: Places) -> Sizes | None:
        """Wrong sizes where these places are set; None where the forward fails even with every size corrected."""
        key = frozenset(places)  # a place has one meaning, so its labels need not be in the key
        if key not in self._seen:
            watch = Watch(_sizes(self.calls, self.kept))
            outcome = self.candidate.outcome(places, self.kept, watch=watch)
            self._seen[key] = None if outcome.error else watch.wrong
        return self._seen[key]

    def stops(self, places: Places) -> bool:
        return self._run(places) is None

    def wrong(self, places: Places) -> list[tuple[Call, int]]:
        """Calls whose live size is wrong where these places are set, and that size."""
        found = self._run(places)
        if found is None:  # a forward that stopped half-way shows nothing about later places: count them all
            return [(call, call.size) for call in self.calls]
        live = [(call, found.get(call.module, {}).get(call.place)) for call in self.calls]
        return [(call, size) for call, size in live if size is not None]

    def needed_attributes(self, known: Places) -> Places:
        """Integer attributes of the user's own modules from which the forward computes sizes."""
        places: Places = {}
        before = self.wrong(known)
        by_class: dict[type, list[Places]] = {}
        for (kind, _), candidates in self._equal_attributes(known, before).items():
            by_class.setdefault(kind, []).append(candidates)
        # Attributes of one class seldom matter to another, so classes are tried together, an attribute of each.
        for together in zip_longest(*by_class.values(), fillvalue={}):
            joint: Places = {place: labels for candidates in together for place, labels in candidates.items()}
            for candidates in together if self.stops({**known, **joint}) else [joint]:
                after = self.wrong({**known, **candidates})
                for (module, attribute), labels in candidates.items():
                    then, now = (
                        {call.place for call, _ in wrong if call.module == module and call.size == len(labels)}
                        for wrong in (before, after)
                    )
                    if len(now) < len(then):
                        places[module, attribute] = labels
        return places

    def _equal_attributes(self, known: Places, wrong: list[tuple[Call, int]]) -> dict[tuple[type, str], Places]:
        """By class and name, attributes that equal a wrong written size, where that size has one meaning only."""
        meanings: dict[tuple[str, int], list[Labels]] = {}
        for call, _ in wrong:
            if len(call.labels) == call.size:
                meanings.setdefault((call.module, call.size), []).append(call.labels)
        result: dict[tuple[type, str], Places] = {}
        for (name, size), labels in meanings.items():
            module = self.candidate.model.get_submodule(name)
            if len({self.kept.count(meaning) for meaning in labels}) == 1:
                for attribute in _stating(module, size):
                    if (name, attribute) not in known:
                        result.setdefault((type(module), attribute), {})[name, attribute] = labels[0]
        return result


def _failing(candidate: Candidate, places: Places, dense: Outcome) -> dict[str, str]:
    """Groups whose cut copy without data does not run, gives other shapes or computes with other numbers; and why."""
    if dense.error:
        return {}  # the dense copy does not run without data either: `verify` tries real tensors
    chosen = random_keep(candidate.units.groups, seed=2)
    names = [group.name for group in candidate.units.groups]
    lossless = [group.name for group in candidate.units.groups if group.lossless]
    same_code = False  # in train and eval mode

    def corrected() -> Outcome:
        return candidate.outcome(places, candidate.kept())

    def fault(names: Sequence[str]) -> str:
        kept = candidate.kept({name: chosen[name] for name in names})
        found = candidate.outcome(places, kept)
        if found.error:
            return f"the forward fails: {found.error}"
        if not candidate.forward.same_shapes(found.shapes, candidate.shapes):
            return "outputs change their shape"
        # The dense model with the corrected forwards of a cut one may compute with other numbers, too.
        if set(names) <= set(lossless) and dense.numbers != found.numbers != corrected().numbers:
            return "a number that is worked out from its size would change"
        return "" if same_code else fault_in_other_mode(kept, found.code)

    def fault_in_other_mode(kept: Kept, code: int) -> str:
        nonlocal same_code
        turned = candidate.outcome(places, kept, other_mode=True)
        same_code = not turned.error and turned.code == code

        def fits(shapes: Sequence[torch.Size]) -> bool:
            return not turned.error and candidate.forward.same_shapes(turned.shapes, shapes, other_mode=True)

        if fits(candidate.shapes):
            return ""
        dense = candidate.outcome({}, candidate.kept(), other_mode=True)
        if dense.error or fits(dense.shapes):
            return ""
        mode = "eval" if candidate.model.training else "train"
        shapes = "outputs change their shape (where that is a cache, use_cache=False in the example leaves it out)"
        return f"the forward fails in {mode} mode: {turned.error or shapes}"

    failing = _culprits(lossless, fault)
    return failing if len(lossless) == len(names) else {**failing, **_culprits(names, fault)}


def _culprits(suspects: list[str], fault: Callable[[Sequence[str]], str]) -> dict[str, str]:
    failing: dict[str, str] = {}
    while suspects and fault(suspects):
        context: list[str] = []
        found = list(suspects)
        while len(found) > 1:
            left, right = found[: len(found) // 2], found[len(found) // 2 :]
            if fault([*context, *left]):
                found = left
            else:
                context, found = [*context, *left], right
        failing[found[0]] = fault([*context, *found]) or "the forward fails"
        suspects = [name for name in suspects if name != found[0]]
    return failing


# Stated sizes: attributes that say a width, though the forward that was traced does not read them. A YOLO block keeps
# `self.c`, and chunks a layer's channels in two; another forward of it, for export, splits them by `(self.c, self.c)`.
# Units of such pieces are dropped in pairs, so that one number can stand for both, and it is set.


def tie_pieces(model: nn.Module, calls: Sequence[Call], atoms: Atoms) -> None:
    """Unite the pieces of a split, entry by entry, where an attribute of the module states the length of all of them.

    Only where each entry is a unit of its own: heads, and pieces that meet elsewhere, are coupled as the graph says.
    Pieces of which only some are lossy stay apart, or none of them would be dropped.
    """
    lossy = atoms.find(np.concatenate([np.zeros(0, dtype=np.int64), *(labels.ravel() for labels, _ in atoms.lossy)]))
    for name, pieces in _even_splits(calls):
        roots = [atoms.find(piece) for piece in pieces]
        together = np.concatenate(roots)
        single = together.all() and len(np.unique(together)) == len(together)
        same_loss = len({bool(np.isin(root, lossy).any()) for root in roots}) == 1
        if single and same_loss and _stating(model.get_submodule(name), len(pieces[0])):
            for piece in pieces[1:]:
                atoms.unite(pieces[0], piece)


def _even_splits(calls: Sequence[Call]) -> Iterator[tuple[str, list[Labels]]]:
    """Name of the module and labels of the pieces, of every call that cuts a dim into pieces of one length."""
    pieces: dict[tuple[str, str], list[Labels]] = {}
    for call in calls:
        if call.place.startswith(("split#", "chunk#")):
            pieces.setdefault((call.module, _call_of(call)), []).append(call.labels)
    for (module, _), labels in pieces.items():
        if len(labels) > 1 and len({len(piece) for piece in labels}) == 1:
            yield module, labels


def _stating(module: nn.Module, length: int) -> list[str]:
    return [name for name, value in vars(module).items() if type(value) is int and value == length > 1]


def _stated(candidate: Candidate, places: Places) -> Places:
    """Attributes that state a width of their module and can be set without any effect on the forward that was traced.

    A width is the length of a module's own tensors and of those of its children, or of even pieces that it splits.
    Where one length has several meanings, nothing says which of them an attribute has. A module whose calls are
    corrected by place is left alone: its code works with the dense numbers.
    """
    widths: dict[str, dict[int, list[Labels]]] = {}
    for own in candidate.dims:
        owner = own.tensor.rpartition(".")[0]
        for name in {owner, owner.rpartition(".")[0]}:
            widths.setdefault(name, {}).setdefault(len(own.labels), []).append(own.labels)
    for name, pieces in _even_splits(candidate.walk.calls):
        widths.setdefault(name, {}).setdefault(len(pieces[0]), []).extend(pieces)
    # No two groups get the same width, if possible; the seed is one whose outcome is known already.
    keep = candidate.kept(random_keep(candidate.units.groups, seed=2))
    corrected = {module for module, place in places if "#" in place}
    by_attribute: dict[tuple[type, str], Places] = {}
    for name, lengths in widths.items():
        module = candidate.model.get_submodule(name)
        if name in corrected or type(module).__module__.startswith("torch.nn."):
            continue
        for length, meanings in lengths.items():
            counts = {keep.count(labels) for labels in meanings}
            for attribute in _stating(module, length) if len(counts) == 1 and counts != {length} else ():
                if (name, attribute) not in places:
                    by_attribute.setdefault((type(module), attribute), {})[name, attribute] = meanings[0]

    def without_effect(more: Places) -> bool:
        """Whether a cut copy makes the same calls with the same numbers where these are set, too."""
        return candidate.outcome({**places, **more}, keep) == candidate.outcome(places, keep)

    found: Places = {place: labels for of_class in by_attribute.values() for place, labels in of_class.items()}
    if found and not without_effect(found):
        kept_apart = [of_class for of_class in by_attribute.values() if without_effect(of_class)]
        found = {place: labels for of_class in kept_apart for place, labels in of_class.items()}
    return found
