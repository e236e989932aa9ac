"""Bindings: every place in the live Python code that holds a size which a cut changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
from torch import nn

from setpoint.groups.build import Units
from setpoint.groups.by_method import MethodForward
from setpoint.groups.group import Group, SizeBinding
from setpoint.groups.kept import Kept, random_keep
from setpoint.groups.shim import HEADS, get_call_sizes
from setpoint.groups.stated import stated
from setpoint.groups.trial import Draft, Outcome, Places, Trial, call_of, dense_outcome, lost_in_other_mode, outcome_of
from setpoint.groups.walk import Call

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

_MAKING_CALLS = {"zeros", "ones", "full", "new_zeros", "expand", "repeat", "tile"}
"""Calls that make new dims, which in the graph may be the model's or the data's."""


def bind(draft: Draft) -> tuple[Units, tuple[Group, ...]]:
    """Units whose cut the live forward survives, and their groups with the size bindings that it needs."""
    dense, calls, lost = dense_outcome(draft, _heads(draft), _calls_that_follow_units(draft, draft.walk.calls))
    if isinstance(vars(draft.model).get("forward"), MethodForward):  # only a forward can be corrected by call
        lost, calls = [*lost, *(c for c in calls if not c.module)], [c for c in calls if c.module]
    failing = _counted(draft, lost, "")
    while True:
        for name, why in failing.items():
            # Atom 0 is frozen already: the entry only reports the group and the reason.
            draft.walk.atoms.frozen.append((np.zeros(1, dtype=np.int64), name, f"with fewer units {why}"))
        draft = draft.without(failing)
        places = _places(draft, _calls_that_follow_units(draft, calls))
        corrected = {(module, place.partition("=")[0]) for module, place in places if "#" in place}
        placed = [call for call in calls if (call.module, call.place) in corrected]
        mode = "eval" if draft.model.training else "train"
        failing = _counted(draft, lost_in_other_mode(draft, placed), f" in {mode} mode") if placed else {}
        failing = failing or _failing(draft, places, dense)
        if not failing:
            return draft.units, _with_sizes(draft, {**places, **stated(draft, places)})


def _counted(draft: Draft, calls: Sequence[Call], when: str) -> dict[str, str]:
    """By name, why groups stay whose units these calls count: no call number identifies the place in the code."""
    return {
        draft.units.groups[position].name: (
            f"a size given to {call_of(call).split('#')[0]} by {call.module or 'the model'} would be wrong, and that "
            f"call has no fixed place in the forward{when}"
        )
        for call in calls
        for position in draft.units.among(call.labels)
    }


def _places(draft: Draft, calls: Sequence[Call]) -> Places:
    places = {**_standard(draft), **_heads(draft)}
    if not calls:
        return places
    trials: list[Trial] = []
    groups = draft.units.groups
    lossless = tuple(group for group in groups if group.lossless)
    some = [{**draft.everything, **random_keep(lossless)}] if 0 < len(lossless) < len(groups) else []
    # Random choices under which no wrong size looks right: of all groups, and without the lossy ones.
    for keep in (random_keep(groups, seed=1), *some):
        trials.append(Trial(draft, calls, keep))
        if not trials[-1].stops(places):
            break  # every size was seen; otherwise fewer groups may show more
    attributes: Places = {}
    for trial in trials:
        attributes |= trial.needed_attributes({**places, **attributes})
    # An attribute that does not correct every size of the forward would also change what else is computed from it
    # (an attention scale from `C // num_heads`): there only the calls are corrected.
    short = {kind for trial in trials for kind, _ in trial.needed_calls({**places, **attributes})}
    places |= {
        (module, attribute): labels
        for (module, attribute), labels in attributes.items()
        if type(draft.model.get_submodule(module)) not in short
    }
    needed = {call for trial in trials for call in trial.needed_calls(places)}
    written: dict[tuple[type, str], bool] = {}
    for trial in trials if not any(trial.stops(places) for trial in trials) else ():
        for key, same in trial.written_calls(places).items():
            written[key] = written.get(key, True) and same
    found: Places = {}
    for call in calls:
        # A dim that a call makes may have the data's length, which differs in another batch: only units are bound.
        own = draft.units.among(call.labels) or call_of(call).split("#")[0] not in _MAKING_CALLS
        if own and (type(draft.model.get_submodule(call.module)), call_of(call)) in needed:
            constant = written.get((type(draft.model.get_submodule(call.module)), call.place), False)
            found[call.module, f"{call.place}={call.size}" if constant else call.place] = call.labels
    return places | found


def _standard(draft: Draft) -> Places:
    own = {(dim.tensor, dim.dim): dim.labels for dim in draft.dims}
    places: Places = {}
    for name, module in draft.model.named_modules():
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
    for (name, attribute), labels in draft.walk.attributes.items():
        module = draft.model.get_submodule(name)
        follows = isinstance(module, (nn.modules.conv._ConvNd, nn.GroupNorm, nn.RNNBase, nn.RNNCellBase))
        if follows and getattr(module, attribute) == len(labels):
            places[name, attribute] = labels
    return places


def _heads(draft: Draft) -> Places:
    """Heads of torch's attention modules in which units lie: its own forward insists on its sizes."""
    places: Places = {}
    for name, module in draft.model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        prefix = f"{name}." if name else ""
        inside = {(dim.tensor, dim.dim): dim.labels for dim in draft.dims if dim.tensor.startswith(prefix)}
        if not any(draft.units.among(labels) for labels in inside.values()):
            continue
        labels = inside.get((f"{prefix}out_proj.weight", 1), np.zeros(module.embed_dim, dtype=np.int64))
        num_heads = get_call_sizes(module).get(HEADS, module.num_heads)
        heads = labels.reshape(num_heads, -1)
        roots = draft.walk.atoms.find(heads)
        tied = (roots == roots[:, :1]).all()
        places[name, HEADS] = heads[:, 0] if tied else np.zeros(num_heads, dtype=np.int64)
    return places


def _calls_that_follow_units(draft: Draft, calls: Sequence[Call]) -> list[Call]:
    """Calls with a size that follows units, and all sizes of such a call; torch's own modules count for themselves."""
    following = {(call.module, call_of(call)) for call in calls if draft.units.among(call.labels)}
    return [
        call
        for call in calls
        if (call.module, call_of(call)) in following
        and not isinstance(draft.model.get_submodule(call.module), (nn.MultiheadAttention, nn.modules.conv._ConvNd))
    ]


def _failing(draft: Draft, places: Places, dense: Outcome) -> dict[str, str]:
    """Groups whose cut copy without data does not run, gives other shapes or computes with other numbers; and why."""
    if dense.error:
        return {}  # the dense copy does not run without data either: `verify` tries real tensors
    chosen = random_keep(draft.units.groups, seed=2)
    everything = Kept(draft.units, draft.everything)
    by_mode = _OtherMode(draft, places)

    @cache
    def corrected() -> Outcome:
        """The dense model with the corrected forwards of a cut one, which may compute with other numbers."""
        return outcome_of(draft, places, everything)

    @cache
    def fault(names: frozenset[str]) -> str | None:
        kept = Kept(draft.units, {**draft.everything, **{name: chosen[name] for name in names}})
        found = outcome_of(draft, places, kept)
        if found.error:
            return f"the forward fails: {found.error}"
        if not draft.rehearsal.alike(found.shapes, draft.shapes):
            return "outputs change their shape"
        if names <= draft.lossless and dense.numbers != found.numbers != corrected().numbers:
            return "a number that is worked out from its size would change"
        return by_mode.fault(kept, found)

    names = [group.name for group in draft.units.groups]
    lossless = [name for name in names if name in draft.lossless]
    failing = _culprits(lossless, fault)
    return failing if len(lossless) == len(names) else {**failing, **_culprits(names, fault)}


class _OtherMode:
    """What fails in the other of train and eval mode, where that runs other code; `places` are set on each copy."""

    def __init__(self, draft: Draft, places: Places) -> None:
        self.draft, self.places = draft, places
        self._alike = False
        self._dense: Outcome | None = None

    def fault(self, kept: Kept, found: Outcome) -> str | None:
        """What fails with these units kept, given their outcome in the model's own mode."""
        if self._alike:
            return None
        turned = outcome_of(self.draft, self.places, kept, other_mode=True)
        self._alike = not turned.error and turned.code == found.code
        alike = partial(self.draft.rehearsal.alike, turned.shapes, other_mode=True)
        if not turned.error and alike(self.draft.shapes):
            return None
        if self._dense is None:
            everything = Kept(self.draft.units, self.draft.everything)
            self._dense = outcome_of(self.draft, {}, everything, other_mode=True)
        if self._dense.error or (not turned.error and alike(self._dense.shapes)):
            return None
        mode = "eval" if self.draft.model.training else "train"
        shapes = "outputs change their shape (where that is a cache, use_cache=False in the example leaves it out)"
        return f"the forward fails in {mode} mode: {turned.error or shapes}"


def _culprits(suspects: list[str], fault: Callable[[frozenset[str]], str | None]) -> dict[str, str]:
    """The failing groups, each with its reason, by bisection."""
    failing: dict[str, str] = {}
    while suspects and fault(frozenset(suspects)) is not None:
        context: list[str] = []
        found = list(suspects)
        while len(found) > 1:
            left, right = found[: len(found) // 2], found[len(found) // 2 :]
            if fault(frozenset([*context, *left])) is not None:
                found = left
            else:
                context, found = [*context, *left], right
        failing[found[0]] = fault(frozenset([*context, *found])) or "the forward fails"
        suspects = [name for name in suspects if name != found[0]]
    return failing


def _with_sizes(draft: Draft, places: Places) -> tuple[Group, ...]:
    """Bind every attribute to the groups it counts, and a corrected call to all that it may come from."""
    units = draft.units
    sizes: dict[int, list[SizeBinding]] = {}
    by_module: dict[str, set[int]] = {}
    for (module, place), labels in places.items():
        members = set(units.among(labels))
        if "#" in place:
            if module not in by_module:
                by_module[module] = _touching(draft, module)
            members |= by_module[module]
        for position in sorted(members):
            sizes.setdefault(position, []).append(SizeBinding(module, place, units.index(labels, position)))
    return tuple(replace(group, sizes=tuple(sizes.get(position, ()))) for position, group in enumerate(units.groups))


def _touching(draft: Draft, module: str) -> set[int]:
    """Groups with units along a dim of any tensor that the module or a submodule reads or makes."""
    inside = f"{module}." if module else ""
    within = ((*read, *made) for name, read, made in draft.walk.flow if name == module or name.startswith(inside))
    arrays = {id(labels): labels for values in within for v in values for labels in v.labels if labels is not None}
    return {group for labels in arrays.values() for group in draft.units.among(labels)}
