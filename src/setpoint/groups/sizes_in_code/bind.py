"""Bindings: every place in the live Python code that holds a size which a cut changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import nn

from setpoint.groups.atoms import Atoms
from setpoint.groups.build import Kept, Labels, Places, Units, standard_places
from setpoint.groups.example import MethodForward
from setpoint.groups.group import random_keep
from setpoint.groups.sizes_in_code.shim import HEADS, get_call_sizes
from setpoint.groups.sizes_in_code.size_probe import (
    Candidate,
    Outcome,
    SizeProbe,
    call_of,
    dense_outcome,
    lost_in_other_mode,
    outcome_of,
)
from setpoint.groups.walk import Call

_MAKING_CALLS = {"zeros", "ones", "full", "new_zeros", "expand", "repeat", "tile"}
"""Calls that make new dims, which in the graph may be the model's or the data's."""


def bind(candidate: Candidate) -> tuple[Units, Places]:
    """Units whose cut the live forward survives, and the places that then have to be set."""
    following = _calls_that_follow_units(candidate, candidate.walk.calls)
    dense, calls, lost = dense_outcome(candidate, _heads(candidate), following)
    if isinstance(vars(candidate.model).get("forward"), MethodForward):
        # The shim corrects calls of a class's own forward, which is not what runs here.
        lost, calls = [*lost, *(call for call in calls if not call.module)], [call for call in calls if call.module]
    failing = _counted(candidate, lost, "")
    while True:
        for name, why in failing.items():
            # Atom 0 is frozen already: the entry only reports the group and the reason.
            candidate.walk.atoms.frozen.append((np.zeros(1, dtype=np.int64), name, f"with fewer units {why}"))
        candidate = replace(candidate, units=candidate.units.without(failing))
        places = _places(candidate, _calls_that_follow_units(candidate, calls))
        corrected = {(module, place.partition("=")[0]) for module, place in places if "#" in place}
        placed = [call for call in calls if (call.module, call.place) in corrected]
        mode = "eval" if candidate.model.training else "train"
        failing = _counted(candidate, lost_in_other_mode(candidate, placed), f" in {mode} mode") if placed else {}
        failing = failing or _failing(candidate, places, dense)
        if not failing:
            return candidate.units, {**places, **_stated(candidate, places)}


def _counted(candidate: Candidate, calls: Sequence[Call], when: str) -> dict[str, str]:
    """By name, why groups stay whose units these calls count: no call number identifies the place in the code."""
    return {
        candidate.units.groups[position].name: (
            f"a size given to {call_of(call).split('#')[0]} by {call.module or 'the model'} would be wrong, and that "
            f"call has no fixed place in the forward{when}"
        )
        for call in calls
        for position in candidate.units.among(call.labels)
    }


def _places(candidate: Candidate, calls: Sequence[Call]) -> Places:
    """Places that a cut has to set: standard attributes, and what probes of the forward show to be needed."""
    places = {**standard_places(candidate.model, candidate.walk, candidate.dims), **_heads(candidate)}
    if not calls:
        return places
    probes: list[SizeProbe] = []
    groups = candidate.units.groups
    lossless = tuple(group for group in groups if group.lossless)
    some = [random_keep(lossless)] if 0 < len(lossless) < len(groups) else []
    # Random choices under which no wrong size looks right: of all groups, and without the lossy ones.
    for keep in (random_keep(groups, seed=1), *some):
        probes.append(SizeProbe(candidate, calls, keep))
        if not probes[-1].stops(places):
            break  # every size was seen; otherwise fewer groups may show more
    attributes: Places = {}
    for probe in probes:
        attributes |= probe.needed_attributes({**places, **attributes})
    # An attribute that does not correct every size of the forward would also change what else is computed from it
    # (an attention scale from `C // num_heads`): there only the calls are corrected.
    short = {kind for probe in probes for kind, _ in probe.needed_calls({**places, **attributes})}
    places |= {
        (module, attribute): labels
        for (module, attribute), labels in attributes.items()
        if candidate.kind_of(module) not in short
    }
    needed = {call for probe in probes for call in probe.needed_calls(places)}
    written: dict[tuple[type, str], bool] = {}
    if not any(probe.stops(places) for probe in probes):
        for probe in probes:
            for key, same in probe.written_calls(places).items():
                written[key] = written.get(key, True) and same
    found: Places = {}
    for call in calls:
        # A dim that a call makes may have the data's length, which differs in another batch: only units are bound.
        own = candidate.units.among(call.labels) or call_of(call).split("#")[0] not in _MAKING_CALLS
        kind = candidate.kind_of(call.module)
        if own and (kind, call_of(call)) in needed:
            constant = written.get((kind, call.place), False)
            found[call.module, f"{call.place}={call.size}" if constant else call.place] = call.labels
    return places | found


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


def _calls_that_follow_units(candidate: Candidate, calls: Sequence[Call]) -> list[Call]:
    """Calls with a size that follows units, and all sizes of such a call; torch's own modules count for themselves."""
    following = {(call.module, call_of(call)) for call in calls if candidate.units.among(call.labels)}
    return [
        call
        for call in calls
        if (call.module, call_of(call)) in following
        and not isinstance(candidate.model.get_submodule(call.module), (nn.MultiheadAttention, nn.modules.conv._ConvNd))
    ]


def _failing(candidate: Candidate, places: Places, dense: Outcome) -> dict[str, str]:
    """Groups whose cut copy without data does not run, gives other shapes or computes with other numbers; and why."""
    if dense.error:
        return {}  # the dense copy does not run without data either: `verify` tries real tensors
    chosen = random_keep(candidate.units.groups, seed=2)
    names = [group.name for group in candidate.units.groups]
    lossless = [group.name for group in candidate.units.groups if group.lossless]
    by_mode = _OtherMode(candidate, places)

    @cache
    def corrected() -> Outcome:
        """The dense model with the corrected forwards of a cut one, which may compute with other numbers."""
        return outcome_of(candidate, places, candidate.kept())

    @cache
    def fault(names: frozenset[str]) -> str | None:
        kept = candidate.kept({name: chosen[name] for name in names})
        found = outcome_of(candidate, places, kept)
        if found.error:
            return f"the forward fails: {found.error}"
        if not candidate.forward.same_shapes(found.shapes, candidate.shapes):
            return "outputs change their shape"
        if names <= set(lossless) and dense.numbers != found.numbers != corrected().numbers:
            return "a number that is worked out from its size would change"
        return by_mode.fault(kept, found)

    failing = _culprits(lossless, fault)
    return failing if len(lossless) == len(names) else {**failing, **_culprits(names, fault)}


class _OtherMode:
    """What fails in the other of train and eval mode, where that runs other code; `places` are set on each copy."""

    def __init__(self, candidate: Candidate, places: Places) -> None:
        self.candidate, self.places = candidate, places
        self._same_code = False
        self._dense: Outcome | None = None

    def fault(self, kept: Kept, found: Outcome) -> str | None:
        """What fails with these units kept, given their outcome in the model's own mode."""
        if self._same_code:
            return None
        candidate = self.candidate
        turned = outcome_of(candidate, self.places, kept, other_mode=True)
        self._same_code = not turned.error and turned.code == found.code
        if self._same_shapes(turned, candidate.shapes):
            return None
        if self._dense is None:
            self._dense = outcome_of(candidate, {}, candidate.kept(), other_mode=True)
        if self._dense.error or self._same_shapes(turned, self._dense.shapes):
            return None
        mode = "eval" if candidate.model.training else "train"
        shapes = "outputs change their shape (where that is a cache, use_cache=False in the example leaves it out)"
        return f"the forward fails in {mode} mode: {turned.error or shapes}"

    def _same_shapes(self, turned: Outcome, shapes: Sequence[torch.Size]) -> bool:
        return not turned.error and self.candidate.forward.same_shapes(turned.shapes, shapes, other_mode=True)


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


def _stated(candidate: Candidate, places: Places) -> Places:
    """Attributes that state a width of their module and can be set without any effect on the forward that was traced.

    A width is the length of a module's own tensors and of those of its children, or of even pieces that it splits.
    Where one length has several meanings, nothing says which of them an attribute has. A module whose calls are
    corrected by place is left alone: its code works with the dense numbers.
    """
    # No two groups get the same width, if possible; the seed is one whose outcome is known already.
    keep = candidate.kept(random_keep(candidate.units.groups, seed=2))
    corrected = {module for module, place in places if "#" in place}
    found: dict[tuple[type, str], Places] = {}
    for name, widths in _widths(candidate).items():
        module = candidate.model.get_submodule(name)
        if name in corrected or type(module).__module__.startswith("torch.nn."):
            continue
        for length, meanings in widths.items():
            counts = {keep.count(labels) for labels in meanings}
            for attribute in _stating(module, length) if len(counts) == 1 and counts != {length} else ():
                if (name, attribute) not in places:
                    found.setdefault((type(module), attribute), {})[name, attribute] = meanings[0]
    everything: Places = {place: labels for of_class in found.values() for place, labels in of_class.items()}
    if _without_effect(candidate, places, everything, keep):
        return everything
    without_effect = [of_class for of_class in found.values() if _without_effect(candidate, places, of_class, keep)]
    return {place: labels for of_class in without_effect for place, labels in of_class.items()}


def _even_splits(calls: Sequence[Call]) -> Iterator[tuple[str, list[Labels]]]:
    """Name of the module and labels of the pieces, of every call that cuts a dim into pieces of one length."""
    pieces: dict[tuple[str, str], list[Labels]] = {}
    for call in calls:
        if call.place.startswith(("split#", "chunk#")):
            pieces.setdefault((call.module, call_of(call)), []).append(call.labels)
    for (module, _), labels in pieces.items():
        if len(labels) > 1 and len({len(piece) for piece in labels}) == 1:
            yield module, labels


def _stating(module: nn.Module, length: int) -> list[str]:
    """Names of the module's attributes that are this integer."""
    return [name for name, value in vars(module).items() if type(value) is int and value == length > 1]


def _widths(candidate: Candidate) -> Mapping[str, Mapping[int, list[Labels]]]:
    """By module and length, the labels of its dims."""
    widths: dict[str, dict[int, list[Labels]]] = {}
    for own in candidate.dims:
        owner = own.tensor.rpartition(".")[0]
        for name in {owner, owner.rpartition(".")[0]}:
            widths.setdefault(name, {}).setdefault(len(own.labels), []).append(own.labels)
    for name, pieces in _even_splits(candidate.walk.calls):
        widths.setdefault(name, {}).setdefault(len(pieces[0]), []).extend(pieces)
    return widths


def _without_effect(candidate: Candidate, places: Places, more: Places, keep: Kept) -> bool:
    """Whether a cut copy runs as before with these attributes set: the same calls with the same numbers."""
    return not more or outcome_of(candidate, {**places, **more}, keep) == outcome_of(candidate, places, keep)
