"""Stated sizes: attributes that say a width, though the forward that was traced does not read them.

A YOLO block keeps `self.c`, and chunks a layer's channels in two; another forward of it, for export, splits them by
`(self.c, self.c)`. Units of such pieces are dropped in pairs, so that one number can stand for both, and it is set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import nn

from setpoint.groups.atoms import Atoms
from setpoint.groups.kept import Kept, Labels, random_keep
from setpoint.groups.trial import Draft, Places, call_of, outcome_of
from setpoint.groups.walk import Call


def tie_pieces(model: nn.Module, calls: Sequence[Call], atoms: Atoms) -> None:
    """Unite the pieces of a split, entry by entry, where an attribute of the module states the length of all of them.

    Only where each entry is a unit of its own: heads, and pieces that meet elsewhere, are coupled as the graph says.
    Pieces of which only some are lossy stay apart, or none of them would be dropped.
    """
    lossy = atoms.find(np.concatenate([np.zeros(0, dtype=np.int64), *(labels.ravel() for labels, _ in atoms.lossy)]))
    for name, pieces in _even_splits(calls):
        roots = [atoms.find(piece) for piece in pieces]
        together = np.concatenate(roots)
        alone = together.all() and len(np.unique(together)) == len(together)
        alike = len({bool(np.isin(root, lossy).any()) for root in roots}) == 1
        if alone and alike and _stating(model.get_submodule(name), len(pieces[0])):
            for piece in pieces[1:]:
                atoms.unite(pieces[0], piece)


def stated(draft: Draft, places: Places) -> Places:
    """Attributes that state a width of their module and can be set without any effect on the forward that was traced.

    A width is the length of a module's own tensors and of those of its children, or of even pieces that it splits.
    Where one length has several meanings, nothing says which of them an attribute has. A module whose calls are
    corrected by place is left alone: its code works with the dense numbers.
    """
    # No two groups get the same width, if possible; the seed is one whose outcome is known already.
    keep = Kept(draft.units, random_keep(draft.units.groups, seed=2))
    corrected = {module for module, place in places if "#" in place}
    found: dict[tuple[type, str], Places] = {}
    for name, widths in _widths(draft).items():
        module = draft.model.get_submodule(name)
        if name in corrected or type(module).__module__.startswith("torch.nn."):
            continue
        for length, meanings in widths.items():
            counts = {keep.count(labels) for labels in meanings}
            for attribute in _stating(module, length) if len(counts) == 1 and counts != {length} else ():
                if (name, attribute) not in places:
                    found.setdefault((type(module), attribute), {})[name, attribute] = meanings[0]
    everything: Places = {place: labels for each in found.values() for place, labels in each.items()}
    if _without_effect(draft, places, everything, keep):
        return everything
    alone = [each for each in found.values() if _without_effect(draft, places, each, keep)]
    return {place: labels for each in alone for place, labels in each.items()}


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
    return [name for name, value in vars(module).items() if type(value) is int and value == length > 1]


def _widths(draft: Draft) -> Mapping[str, Mapping[int, list[Labels]]]:
    """By module and length, the labels of its dims."""
    widths: dict[str, dict[int, list[Labels]]] = {}
    for own in draft.dims:
        owner = own.tensor.rpartition(".")[0]
        for name in {owner, owner.rpartition(".")[0]}:
            widths.setdefault(name, {}).setdefault(len(own.labels), []).append(own.labels)
    for name, pieces in _even_splits(draft.walk.calls):
        widths.setdefault(name, {}).setdefault(len(pieces[0]), []).extend(pieces)
    return widths


def _without_effect(draft: Draft, places: Places, more: Places, keep: Kept) -> bool:
    """Whether a cut copy runs as before with these attributes set: the same calls with the same numbers."""
    return not more or outcome_of(draft, {**places, **more}, keep) == outcome_of(draft, places, keep)
