"""From atoms to groups: units whose entries lie in the same places form one group, which binds sizes in the code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from torch import nn

from setpoint.groups.atoms import Atoms
from setpoint.groups.group import Group, Role, Size, SizeBinding, Slice
from setpoint.groups.walk import DimLabels, Walk

_MIN_BLOCKS = 8  # a group has at least this many blocks, so they may be smaller than suits the hardware
_MIN_WIDE_BLOCKS = 16  # of those that tensor cores want, which are four times as large as a CPU's
_CHANNELS = 16  # a CPU's kernels want multiples of this many channels
_NEURONS = 8  # and of this many of anything else
# NVIDIA, Convolutional Layers User's Guide and Linear/Fully-Connected Layers User's Guide, quick start checklists:
# sizes of a matrix product should be multiples of at least this.
_TENSOR_CORES = 64
_ALIGNED = 8  # units in 16 bytes, at two bytes each
_FLOOR = 16  # a group keeps at least a sixteenth of its units
_WHAT = {"batch": "head", "embedding": "feature", "conv": "channel"}  # kinds of units by remark


@dataclass(frozen=True, eq=False)
class OwnDim:
    """One dim of one parameter or buffer, with the atoms made for it."""

    tensor: str
    dim: int
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Units:
    """Which group and unit every class of atoms belongs to."""

    groups: tuple[Group, ...]  # the groups, without size bindings
    group_of: np.ndarray  # per atom, position of its group in `groups`, or -1: it stays
    unit_of: np.ndarray  # per atom, its unit within the group

    def index(self, labels: np.ndarray, group: int) -> np.ndarray:
        """Index table of these entries for one group: unit, or -1."""
        return np.where(self.group_of[labels] == group, self.unit_of[labels], -1)

    def among(self, labels: np.ndarray) -> list[int]:
        """Positions of the groups that some of these entries belong to."""
        return [int(g) for g in np.unique(self.group_of[labels]) if g >= 0]

    def without(self, names: Iterable[str]) -> Units:
        """The same units without these groups, whose entries are then never dropped."""
        kept = [position for position, group in enumerate(self.groups) if group.name not in set(names)]
        new = np.full(len(self.groups) + 1, -1)  # the last entry answers for -1: no group
        new[kept] = np.arange(len(kept))
        return Units(tuple(self.groups[position] for position in kept), new[self.group_of], self.unit_of)

    def size(self, length: int, labels: DimLabels) -> Size:
        """Length of a dim as a function of widths."""
        if labels is None:
            return Size(length)
        entries = {g: int((self.group_of[labels] == g).sum()) for g in self.among(labels)}
        parts = tuple((self.groups[g].name, num // self.groups[g].num_units) for g, num in entries.items())
        return Size(length - sum(entries.values()), parts)


Labels = np.ndarray  # atoms along a dim
Places = dict[tuple[str, str], Labels]  # by (module, place), atoms along the dim that a place in Python code counts


def build(atoms: Atoms, dims: Sequence[OwnDim], products: Sequence[np.ndarray] = (), device_type: str = "cpu") -> Units:
    """Collect the classes that can be dropped into groups; `dims` are those of all parameters and buffers.

    Units that lie unequally often in dims of matrix products, `products`, are in different groups: sizes follow widths.
    """
    roots = atoms.roots
    signature = _signatures(roots, [*(own.labels for own in dims), *products])
    units_of: dict[int, list[int]] = {}  # by signature, roots of the classes that can be dropped
    dims_of: dict[int, list[OwnDim]] = {}  # and where some of them lie
    for root in np.unique(np.concatenate([[0], *(roots[own.labels] for own in dims)]))[1:]:
        units_of.setdefault(int(signature[root]), []).append(int(root))
    for own in dims:
        lying = roots[own.labels]
        for key in np.unique(signature[lying[lying != 0]]):
            dims_of.setdefault(int(key), []).append(own)
    marks = {name: atoms.marked(name) for name in ("produce", "consume", "unmasked")}
    classes = {name: atoms.marked_class(name) for name in ("conv", "batch", "embedding", "squeezed", "aligned")}
    summed = atoms.marked_class("summed") | atoms.marked_class("contract")
    group_of, unit_of = np.full(len(roots), -1), np.full(len(roots), -1)
    groups: list[Group] = []
    names: dict[str, int] = {}
    for key, units in units_of.items():
        if len(units) < 2:
            continue
        unit_of[units] = np.arange(len(units))
        slices: list[Slice] = []
        writes = reads = False
        for own in dims_of[key]:
            lying = roots[own.labels]
            member = (signature[lying] == key) & (lying != 0)
            produce, consume, unmasked = (bool(mark[own.labels[member]].any()) for mark in marks.values())
            role: Role = "consume" if consume else "produce" if produce else "carry"
            slices.append(Slice(own.tensor, own.dim, role, np.where(member, unit_of[lying], -1), not unmasked))
            writes, reads = writes or produce, reads or consume  # a tied weight may write units and read them again
        if writes and (reads or summed[units].any()):
            group_of[units] = len(groups)
            remarks = {name for name, marked in classes.items() if marked[units].any()}
            groups.append(_group(tuple(slices), len(units), remarks, names, device_type))
        elif writes or reads:  # a dim without units, of a kernel or a table, is not worth reporting
            missing = "no weight writes its units" if reads else "no weight reads its units"
            why = f"{missing}, so they cannot be judged or dropped by themselves"
            atoms.frozen.append((np.asarray(units), slices[0].tensor, why))
    notes: list[dict[str, None]] = [{} for _ in groups]  # in order, each once
    for labels, reason in atoms.lossy:
        for group in np.unique(group_of[roots[labels]]):
            if group >= 0:
                notes[group][reason] = None
    noted = (replace(g, lossless=not why, notes=tuple(why)) for g, why in zip(groups, notes, strict=True))
    return Units(tuple(noted), group_of[roots], unit_of[roots])


def _signatures(roots: np.ndarray, dims: Sequence[np.ndarray]) -> np.ndarray:
    """A number per class that is equal for classes with equally many entries in every dim."""
    # A random sum stands for all counts of a class; two classes with other counts hardly ever share one.
    draws = np.random.default_rng(0).integers(1, 2**63 - 1, size=len(dims), dtype=np.uint64)
    signature = np.zeros(len(roots), dtype=np.uint64)
    for labels, draw in zip(dims, draws, strict=True):
        np.add.at(signature, roots[labels], draw)  # not `+=`, which counts a class once a dim
    return signature


def _group(
    slices: tuple[Slice, ...], num_units: int, remarks: set[str], names: dict[str, int], device_type: str
) -> Group:
    """A group named after the module that writes its units, and after how many others of that name."""
    first = next((piece for piece in slices if piece.role == "produce"), slices[0]).tensor
    base = first.rpartition(".")[0] or first
    names[base] = names.get(base, 0) + 1
    what = next((what for remark, what in _WHAT.items() if remark in remarks), "neuron")
    aligned = "aligned" in remarks
    block = max(block_size(num_units, what, device_type), _ALIGNED if aligned else 1)
    # A squeeze would remove a dim of one unit.
    fewest = max(2 if "squeezed" in remarks else 1, -(-num_units // _FLOOR))
    return Group(
        name=base if names[base] == 1 else f"{base}:{names[base]}",
        kind="unit",
        num_units=num_units,
        slices=slices,
        min_units=min(num_units, -(-fewest // block) * block),
        multiple_of=block,
        usual_block=block,
        only_blocks=aligned,
        what=what,
    )


def block_size(num_units: int, what: str, device_type: str) -> int:
    """Number of units that go together: a power of two, and 1 for heads.

    On a CPU it is 16 for channels and 8 for other units; on "cuda" 64 where the group then has 16 blocks, else half of
    that and so on. No block is smaller on "cuda" than on a CPU. A group has at least eight blocks; in a narrow group
    they are smaller.
    """
    if what == "head":
        return 1
    block = min(_CHANNELS if what == "channel" else _NEURONS, _power_of_two(num_units // _MIN_BLOCKS))
    wide = min(_TENSOR_CORES, _power_of_two(num_units // _MIN_WIDE_BLOCKS))
    return max(block, wide) if device_type == "cuda" else block


def _power_of_two(number: int) -> int:
    """The largest up to this number, or 1."""
    return 1 << max(number.bit_length() - 1, 0)


def device_type_of(model: nn.Module) -> str:
    """Type of the device that most of the weights are on; of a model without any, "cpu"."""
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        sizes[parameter.device.type] = sizes.get(parameter.device.type, 0) + parameter.numel()
    return max(sizes, key=sizes.__getitem__, default="cpu")


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
_WITH_SIZES = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Unflatten)  # whose forward computes with sizes


def only_standard_sizes(model: nn.Module, walk: Walk, units: Units) -> bool:
    """Whether torch's own code alone runs in the forward, so that no size stands anywhere but in its attributes."""
    for module in model.modules():
        own = type(module).__module__.startswith("torch.nn.modules.") and "forward" not in vars(module)
        if not own or isinstance(module, _WITH_SIZES) or module._forward_hooks or module._forward_pre_hooks:
            return False
    return not walk.opaque_calls and not any(units.among(call.labels) for call in walk.calls)


def standard_places(model: nn.Module, walk: Walk, dims: Sequence[OwnDim]) -> Places:
    """Attributes of torch's own modules that count entries of their tensors."""
    labels_of = {(dim.tensor, dim.dim): dim.labels for dim in dims}
    places: Places = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for kind, attribute, tensor, dim in _STANDARD:
            labels = labels_of.get((f"{prefix}{tensor}", dim))
            if isinstance(module, kind) and labels is not None and getattr(module, attribute, None) == len(labels):
                places[name, attribute] = labels
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            for position in range(len(module.normalized_shape)):
                labels = labels_of.get((f"{prefix}weight", position))
                if labels is not None:
                    places[name, f"normalized_shape[{position}]"] = labels
    for (name, attribute), labels in walk.attributes.items():
        module = model.get_submodule(name)
        follows = isinstance(module, (nn.modules.conv._ConvNd, nn.GroupNorm, nn.RNNBase, nn.RNNCellBase))
        if follows and getattr(module, attribute) == len(labels):
            places[name, attribute] = labels
    return places


def with_sizes(walk: Walk, units: Units, places: Places) -> tuple[Group, ...]:
    """Bind every attribute to the groups it counts, and a corrected call to all that it may come from."""

    @cache
    def touching(module: str) -> set[int]:
        """Groups with units along a dim of any tensor that the module or a submodule reads or makes."""
        inside = f"{module}." if module else ""
        within = ((*read, *made) for name, read, made in walk.flow if name == module or name.startswith(inside))
        arrays = {id(labels): labels for values in within for v in values for labels in v.labels if labels is not None}
        return {group for labels in arrays.values() for group in units.among(labels)}

    sizes: list[list[SizeBinding]] = [[] for _ in units.groups]
    for (module, place), labels in places.items():
        for position in sorted({*units.among(labels), *(touching(module) if "#" in place else ())}):
            sizes[position].append(SizeBinding(module, place, units.index(labels, position)))
    return tuple(replace(group, sizes=tuple(bound)) for group, bound in zip(units.groups, sizes, strict=True))
