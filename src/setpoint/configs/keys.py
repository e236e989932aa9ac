"""Keys: which numbers of a transformers config say how wide which groups are, found by building the model anew."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice, product
from typing import Any

import numpy as np
import torch
from torch import nn

from setpoint.actuator.shrink import named_tensors
from setpoint.groups.group import Group, Place, SizeBinding
from setpoint.groups.place import is_call, write_size
from setpoint.groups.rng import preserved_rng_state

_MOST_CHECKED = 256
"""Widths up to which each is tried on the config's own validation."""
_MOST_CHOICES = 64
"""Choices of numbers that are tried together."""
_WIDTH_WORDS = re.compile(r"(dim|size|inner|hidden|heads|ffn?)($|_)")
"""In the name of a key that is None, or absent, until somebody sets it, and would then be a width."""
_HEAD_SIZE = "head_dim"
"""The key by which attention in transformers takes an explicit size of a head."""


@dataclass(frozen=True)
class Key:
    """One number of a config.

    Args:
        place: in the module that has the config, as in `SizeBinding`; with the number that is meant where none is.
        per_unit: it is this times the width; 0 for one that stays, but has to be written down.
        constant: what is added.
    """

    place: str
    per_unit: int
    constant: int = 0

    def at(self, width: int) -> int:
        """The number at this width."""
        return self.constant + self.per_unit * width


@dataclass(frozen=True, eq=False)
class Said:
    """Groups whose common width a config says.

    Args:
        module: qualified name of the module that has the config.
        names: of the groups.
        keys: numbers that say it.
        block: widths that are multiples of it are those that the config allows.
    """

    module: str
    names: tuple[str, ...]
    keys: tuple[Key, ...]
    block: int

    def bound(self, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        """The groups, of which a cut writes the numbers, and which keep to widths that the config allows."""
        first = self.names[0]
        # Code that reads the config while it runs (Phi-3's slices of its fused heads) gives no constant any more.
        free = {
            (size.module, size.place)
            for group in groups
            for size in group.sizes
            if group.name in self.names and is_call(size.place)
        }
        groups = tuple(
            replace(group, sizes=tuple(_unwritten(e) if (e.module, e.place) in free else e for e in group.sizes))
            for group in groups
        )
        return tuple(
            replace(
                group,
                sizes=(*group.sizes, *(self._size(key, group.num_units) for key in self.keys if group.name == first)),
                multiple_of=(block := int(np.lcm(group.multiple_of, self.block))),
                min_units=min(group.num_units, -(-max(group.min_units, 1) // block) * block),
            )
            if group.name in self.names
            else group
            for group in groups
        )

    def _size(self, key: Key, width: int) -> SizeBinding:
        table = np.concatenate([np.repeat(np.arange(width), key.per_unit), np.full(key.constant, -1)])
        return SizeBinding(self.module, key.place, table)


def _unwritten(size: SizeBinding) -> SizeBinding:
    """The same place in a call, whatever number the code gives there."""
    return replace(size, place=size.place.partition("=")[0])


def configured(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that a transformers config describes, by name."""
    if is_configured(model):
        yield "", model
        return
    for name, child in model.named_children():
        for inner, module in configured(child):
            yield f"{name}.{inner}".rstrip("."), module


def is_configured(module: nn.Module) -> bool:
    """Whether a module is built of a config, and saved with it."""
    own = getattr(type(module), "config_class", None)
    config = module.__dict__.get("config")
    return isinstance(own, type) and hasattr(config, "to_dict") and hasattr(type(module), "save_pretrained")


def keys(model: nn.Module, groups: Sequence[Group]) -> tuple[Said, ...]:
    """What the configs in a model say of its groups; groups that are in none of them are said nowhere.

    For each number of a config that a width divides, the model is built anew on the meta device with fewer of it, and
    what becomes narrower shows what it says. It counts only if all numbers together lead to the very shapes of a cut,
    and change nothing else that the code computes from them, such as the scale of attention.

    Args:
        model: dense, or in its dense shapes; it is not touched.
        groups: of that model.
    """
    with preserved_rng_state(model):
        return tuple(said for name, module in configured(model) for said in _Search.of(name, module, groups).found())


Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class _Built:
    """What a config leads to: shapes of tensors, and the fractions that modules hold."""

    shapes: Shapes
    fractions: Mapping[tuple[str, str], float]


@dataclass(frozen=True, eq=False)
class _Search:
    """The search in one config."""

    name: str  # of the module
    module: nn.Module
    dense: _Built
    groups: tuple[Group, ...]  # that lie in the module as the config describes it
    names: Mapping[Place, tuple[str, ...]] = field(default_factory=dict)  # by dim, its groups

    @classmethod
    def of(cls, name: str, module: nn.Module, groups: Sequence[Group]) -> _Search:
        dense = _build(module, {})
        search = cls(name, module, dense or _Built({}, {}), ())
        fitting = tuple(group for group in groups if search._places(group))
        at: dict[Place, tuple[str, ...]] = {}
        for group in fitting:
            for place in search._places(group):
                at[place] = (*at.get(place, ()), group.name)
        return replace(search, groups=fitting, names=at)

    def _places(self, group: Group) -> dict[Place, int]:
        """Dims of the built model in which the group lies, and how many entries each unit has there; empty if other."""
        prefix, found = f"{self.name}." if self.name else "", dict[Place, int]()
        for part in group.slices:
            inner = part.tensor.removeprefix(prefix).replace(".base_layer.", ".")  # peft keeps a layer under this name
            if not part.tensor.startswith(prefix) or part.dim is None:
                return {}
            if inner not in self.dense.shapes:
                if "lora_" in inner:
                    continue
                return {}
            if self.dense.shapes[inner][part.dim] != part.index.size:
                return {}
            found[inner, part.dim] = int((part.index >= 0).sum()) // group.num_units
        return found

    def found(self) -> Iterator[Said]:
        """The kinds, each group in one at most."""
        done = set[str]()
        widths = sorted({group.num_units for group in self.groups}, reverse=True)
        # Without anything written down besides first, so that no more is written than has to be.
        for heads, width in product(({}, _head_sizes(self.module.config)), widths):
            if heads is None:
                continue
            left = [group for group in self.groups if group.num_units == width and group.name not in done]
            for said in self._of_width(width, left, heads):
                done.update(said.names)
                yield said

    def _of_width(self, width: int, groups: Sequence[Group], fixed: Mapping[str, int]) -> Iterator[Said]:
        if not groups or width < 2:
            return
        fewer = (width - 1, width // 2) if width <= _MOST_CHECKED else (width // 2,)
        touched: dict[Key, set[str]] = {}
        for key in _candidates(self.module.config, width):
            reached = next((set(hit) for w in fewer if (hit := self._reached(key, w, fixed)) is not None), set())
            if reached and reached <= {group.name for group in groups}:
                touched[key] = reached
        for names, together in _components(touched):
            ordered = tuple(group.name for group in groups if group.name in names)
            constants = tuple(Key(place, 0, size) for place, size in fixed.items())
            # A number that equals the width by chance, such as the size of a head, is found out by what it leads to.
            some = (part for count in range(len(together), 0, -1) for part in combinations(together, count))
            tried = (Said(self.name, ordered, (*part, *constants), 1) for part in islice(some, _MOST_CHOICES))
            said = next((each for each in tried if any(self._right(each, w, width) for w in fewer)), None)
            if said is not None and (block := self._block(said, width)) < width:
                yield replace(said, block=block)

    def _reached(self, key: Key, width: int, fixed: Mapping[str, int]) -> Iterable[str] | None:
        """Names of the groups of all dims that get narrower with this number; None where no model can be built."""
        built = _build(self.module, {**fixed, key.place: key.at(width)})
        if built is None or built.shapes.keys() != self.dense.shapes.keys():
            return None
        if built.fractions != self.dense.fractions:
            return ("",)
        names: list[str] = []
        for tensor, shape in built.shapes.items():
            for dim, (new, old) in enumerate(zip(shape, self.dense.shapes[tensor], strict=True)):
                if new != old:
                    names += self.names.get((tensor, dim), ("",))  # a dim of no group: the number says something else
        return names

    def _right(self, said: Said, width: int, dense: int) -> bool:
        """Whether the numbers lead to the shapes of a cut to this width, and to nothing else."""
        built = _build(self.module, {key.place: key.at(width) for key in said.keys})
        want = {name: list(shape) for name, shape in self.dense.shapes.items()}
        for group in self.groups:
            for (tensor, dim), entries in self._places(group).items() if group.name in said.names else ():
                want[tensor][dim] -= entries * (dense - width)
        shapes = {name: tuple(shape) for name, shape in want.items()}
        return built is not None and built.shapes == shapes and built.fractions == self.dense.fractions

    def _block(self, said: Said, width: int) -> int:
        """The smallest block of which the config allows all multiples."""
        allowed = [
            width > _MOST_CHECKED or _valid(self.module.config, {key.place: key.at(each) for key in said.keys})
            for each in range(1, width)
        ]
        blocks = (
            b for b in range(1, width) if width % b == 0 and all(allowed[b - 1 :: b]) and self._right(said, b, width)
        )
        return next(blocks, width)


def _components(touched: Mapping[Key, set[str]]) -> list[tuple[set[str], list[Key]]]:
    """Keys that reach a common group say one width together."""
    parts: list[tuple[set[str], list[Key]]] = []
    for key, names in touched.items():
        meeting = [part for part in parts if part[0] & names]
        joined = set[str](names).union(*(part[0] for part in meeting))
        together = [*(each for part in meeting for each in part[1]), key]
        parts = [*(part for part in parts if part not in meeting), (joined, together)]
    return parts


def _build(module: nn.Module, numbers: Mapping[str, int]) -> _Built | None:
    """What the class of a module makes of its config with these numbers; None where it makes nothing."""
    try:
        with torch.device("meta"):
            made: nn.Module = type(module)(numbered(copy.deepcopy(module.config), numbers))
    except Exception:  # noqa: BLE001 - foreign code may refuse a number in any way
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(made).items()}
    fractions = {
        (name, key): value
        for name, part in made.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, float)
    }
    return _Built(shapes, fractions)


class _Holder(nn.Module):
    """Stands for the module that has a config, so that places can be written."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def numbered(config: Any, numbers: Mapping[str, int]) -> Any:
    """The config itself, with these numbers by place."""
    holder = _Holder(config)
    for place, number in numbers.items():
        write_size(holder, place, number)
    return config


def _valid(config: Any, numbers: Mapping[str, int]) -> bool:
    """Whether a config with these numbers can be written and read again."""
    try:
        tried = numbered(copy.deepcopy(config), numbers)
        getattr(tried, "validate", lambda: None)()
        type(config).from_dict(tried.to_dict())
    except Exception:  # noqa: BLE001 - foreign code may refuse a number in any way
        return False
    return True


def _parts(config: Any, path: str = "config") -> Iterator[tuple[str, Any]]:
    """A config and those in it, by place."""
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and not name.startswith("_"):
            yield from _parts(value, f"{path}.{name}")


def _candidates(config: Any, width: int) -> Iterator[Key]:
    """Numbers that are a multiple of a width, and those that nobody has set."""
    for path, part in _parts(config):
        for name, value in vars(part).items():
            if name.startswith("_"):
                continue
            if isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % width == 0:
                yield Key(f"{path}.{name}", value // width)
            elif value is None and _WIDTH_WORDS.search(name):
                yield Key(f"{path}.{name}={width}", 1)


def _head_sizes(config: Any) -> dict[str, int] | None:
    """The size of a head, written down wherever a config leaves it to be computed; None where none does."""
    found: dict[str, int] = {}
    for path, part in _parts(config):
        try:
            size, heads = part.hidden_size, part.num_attention_heads
        except AttributeError:
            continue
        if getattr(part, _HEAD_SIZE, None) is None and isinstance(size, int) and isinstance(heads, int) and heads:
            found[f"{path}.{_HEAD_SIZE}={size // heads}"] = size // heads
    return found or None
