"""Moments: second moments of what layers are given that read units, gathered in forwards."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._guards import detect_fake_mode

from setpoint.distributed import is_sharded_tensor, unsharded_tensor
from setpoint.groups.example import is_dense, tensors_of
from setpoint.groups.group import Group
from setpoint.sensor.consumer import Consumer, Hook, Padding, by_column, find_consumers, input_rows, layers_by_weight

_AT_ONCE = 2048  # columns of one block of a moment: 16 MiB
_MOST_BYTES = 2**30  # of all moments, or what the model's weights take, if that is more: above it blocks get narrower
_STRIP = 256  # columns of a moment that are made at once
_FORWARDS = 3  # of a layer, the most that a look at what it is given takes, in FLOPs: what a step takes of it
_ROWS_OF_TARGETS = 256  # at which a step's targets are looked at
_ROWS_PER_COLUMN, _FEWEST_ROWS = 4, 4096  # of which a moment is made: the more of both


@dataclass(frozen=True, eq=False)
class Reader:
    """One weight that reads units, in all layers whose weight it is."""

    layers: tuple[str, ...]
    consumers: tuple[Consumer, ...]  # of the first of these layers, one for each group
    blocks: tuple[slice, ...]  # of the channels of its input
    num_offsets: int  # of a convolution's kernel, else 1

    @property
    def name(self) -> str:
        return self.layers[0]

    @property
    def num_columns(self) -> int:
        return int(self.blocks[-1].stop) * self.num_offsets

    @property
    def sizes(self) -> list[int]:
        """Of the blocks of its moment: `b + 1` for b columns."""
        return [(block.stop - block.start) * self.num_offsets + 1 for block in self.blocks]

    @property
    def num_bytes(self) -> int:
        """Of its moment in float32."""
        return sum(4 * size**2 for size in self.sizes)

    @property
    def widest(self) -> int:
        """Columns of its largest block."""
        return max(self.sizes) - 1

    def num_rows(self, positions: int, outputs: int, num_forwards: int, forwards: float = _FORWARDS) -> int:
        """Rows of one forward that are looked at: a part of a full sample, at the cost of `forwards` of the layer.

        At least a row for each column comes together, as far as there are so many.
        """
        part = -(-max(_FEWEST_ROWS, _ROWS_PER_COLUMN * self.widest) // num_forwards)
        affordable = math.floor(min(1.0, forwards * outputs / self.widest) * positions)
        return min(positions, part, max(affordable, -(-self.widest // num_forwards)))

    def flops(self, positions: float, outputs: int, num_forwards: int) -> float:
        """Of a look at one forward, with its part of what scores and fits take once."""
        rows = self.num_rows(round(positions), outputs, num_forwards)
        return math.fsum(2 * rows * size**2 + 3 * size**3 / num_forwards for size in self.sizes)

    def no_rows(self, model: nn.Module) -> tuple[Tensor, ...]:
        """Its moment before the first row."""
        weight: Any = model.get_submodule(self.name).weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return tuple(torch.zeros(size, size, dtype=dtype, device=weight.device) for size in self.sizes)


def find_readers(model: nn.Module, groups: Sequence[Group]) -> tuple[Reader, ...]:
    """The weights that read units of these groups, as far as they are linear layers or convolutions.

    Blocks have at most 2,048 columns, and half, a quarter, and so on as many where their moments would take more bytes
    than the model's weights, and than 1 GiB.
    """
    layers, found = layers_by_weight(model), dict[int, list[Consumer]]()
    for group in groups:
        for consumer in find_consumers(group, model, layers):
            weight: Any = model.get_submodule(consumer.layer).weight
            found.setdefault(id(weight), []).append(consumer)
    readers = []
    for number, consumers in found.items():
        names = tuple(dict.fromkeys(name for name, _ in layers[number]))
        first = next(name for name in names if any(consumer.layer == name for consumer in consumers))
        own = tuple(consumer for consumer in consumers if consumer.layer == first)
        offsets, layer = own[0].num_offsets, cast(Any, model.get_submodule(first))
        channels = len(by_column(layer, layer.weight))
        names = (first, *(name for name in dict.fromkeys(consumer.layer for consumer in consumers) if name != first))
        readers.append(Reader(names, own, _even_blocks(channels, offsets, _AT_ONCE), offsets))
    most, at_once = max(_MOST_BYTES, sum(weight.numel() * weight.itemsize for weight in model.parameters())), _AT_ONCE
    while at_once > 1 and sum(reader.num_bytes for reader in readers) > most:
        at_once //= 2
        readers = [replace(one, blocks=_even_blocks(one.blocks[-1].stop, one.num_offsets, at_once)) for one in readers]
    return tuple(readers)


def _even_blocks(channels: int, offsets: int, at_once: int) -> tuple[slice, ...]:
    """The channels in as few even blocks as hold at most so many columns each."""
    number = min(channels, math.ceil(channels * offsets / at_once)) or 1
    bounds = [channels * block // number for block in range(number + 1)]
    return tuple(slice(start, stop) for start, stop in pairwise(bounds))


@dataclass(frozen=True, eq=False)
class Moment:
    """`G = sum over rows of x x^T`, by column of a layer's input x with a 1 at its end.

    Wide inputs are in blocks of channels, whose cross terms count as 0.
    """

    blocks: tuple[Float[Tensor, "columns columns"], ...]
    norm: str = ""  # name of the BatchNorm that is given just what the layer makes, if any

    @property
    def num_rows(self) -> float:
        return float(self.blocks[0][-1, -1])

    def of_columns(self, columns: Int[np.ndarray, " columns"]) -> Float[Tensor, "columns columns"]:
        """The part on some columns."""
        if len(self.blocks) == 1:
            index = torch.from_numpy(columns).to(self.blocks[0].device)
            return self.blocks[0][index][:, index]
        found = self.blocks[0].new_zeros(len(columns), len(columns))
        start = 0
        for block in self.blocks:
            inside = np.flatnonzero((columns >= start) & (columns < start + len(block) - 1))
            index, at = torch.from_numpy(columns[inside] - start), torch.from_numpy(inside)
            found[at[:, None], at] = block[index][:, index]
            start += len(block) - 1
        return found


def moment_of(rows: Float[Tensor, "rows columns"]) -> Float[Tensor, "all_columns all_columns"]:
    """Sum over rows of `x x^T`, each row with a 1 at its end."""
    flat = rows.to(torch.promote_types(rows.dtype, torch.float32))
    flat = torch.cat([flat, flat.new_ones(len(flat), 1)], 1)
    size = flat.shape[1]
    found = flat.new_empty(size, size)
    with torch.autocast(flat.device.type, enabled=False):  # rounded to bfloat16, a moment has negative eigenvalues
        for start in range(0, size, _STRIP):  # of one half: the other one is the same
            strip = slice(start, start + _STRIP)
            products = flat[:, strip].mT @ flat[:, start:]
            found[start:, strip], found[strip, start:] = products.mT, products
    return found


class Gathering:
    """Hooks that add up second moments of what readers are given, until `remove`; `taken` empties them.

    Unless `always`, forwards count that have gradients, in the mode in which `taken` finds the model. Inputs that hold
    NaN or infinity are left out. Right behind a dropout with probability p, the sums would be those of
    `G + p / (1 - p) diag(G)`: its own input counts.
    """

    def __init__(self, model: nn.Module, readers: Sequence[Reader], num_forwards: int, *, always: bool = False) -> None:
        self.model, self.readers, self.norms = model, readers, dict[str, str]()
        self._num_forwards = num_forwards
        self._sums = defaultdict[bool, dict[str, list[Tensor]]](dict)  # of each mode: an evaluation is no training
        self._made: dict[str, weakref.ref[Tensor]] = {}
        self._dropout: list[Any] = []  # input of the last one, and its output
        self._always, self._padding = always, Padding(model)
        self.alike: bool | None = None  # whether all samples so far are the same one; None before it is known
        self._sample: list[Tensor] = []
        self.classes: list[int] | None = []  # of the targets so far; None once there are several, or none at all
        compare = Hook(self._compare)
        self._handles: list[Any] = [model.register_forward_pre_hook(compare, with_kwargs=True)]
        self._handles.append(model.register_forward_hook(Hook(self._follow_outputs)))
        for reader in readers:
            for name in reader.layers:
                hook = Hook(self._look, reader, name)
                self._handles.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                self._handles.append(module.register_forward_pre_hook(Hook(self._look_behind, name)))
            elif type(module).__module__ == nn.modules.dropout.__name__:
                self._handles.append(module.register_forward_pre_hook(Hook(self._before_dropout)))
                self._handles.append(module.register_forward_hook(Hook(self._behind_dropout)))
        weakref.finalize(self, _remove, [*self._handles, self._padding])

    def _look(self, reader: Reader, name: str, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or not x.numel():
            return
        # A user's export or per-sample gradients call the model with tensors that hold no values of their own.
        if detect_fake_mode((x,)) is not None or is_functorch_wrapped_tensor(x):
            return
        if not (self._always or torch.is_grad_enabled()):
            return
        self._made[name] = weakref.ref(output)
        if self._dropout[1:] and x is self._dropout[1]():
            x = self._dropout[0]
        outputs, forwards = by_column(layer, layer.weight).shape[-1], math.inf if self._always else _FORWARDS
        positions = output.numel() // outputs
        if is_sharded_tensor(x):  # by tensor parallelism, whose output may be a part of all
            x = unsharded_tensor(x.detach())
            positions = x.numel() // x.shape[-1]
        count = reader.num_rows(positions, outputs, self._num_forwards, forwards)
        rows = input_rows(layer, x, count, self._padding.real).detach()
        parts = [moment_of(rows[:, block].flatten(1)) for block in reader.blocks]
        parts = [torch.where(torch.isfinite(part.sum()), part, 0.0) for part in parts]
        sums = self._sums[self._always or self.model.training]
        known = sums.get(reader.name, parts)  # another optimizer's forward may lie between a reading and its cut
        new = known is parts or any(a.shape != b.shape for a, b in zip(known, parts, strict=True))
        sums[reader.name] = parts if new else [a + b for a, b in zip(known, parts, strict=True)]

    def _compare(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Compare inputs with the first sample; where not all of them hold samples in rows, none are alike."""
        if self.alike is False or not torch.is_grad_enabled():
            return
        given = [tensor for tensor in tensors_of((args, kwargs)) if tensor.dim()]
        plain = all(type(x) is Tensor and is_dense(x) and not is_functorch_wrapped_tensor(x) for x in given)
        self._sample = self._sample or [x[:1].detach().clone() for x in given if plain]
        forms = [[(x.device, *x.shape[1:]) for x in xs] for xs in (given, self._sample)]
        rows = {len(x) for x in given}
        known = forms[0] == forms[1] and max(map(len, forms[0]), default=1) > 1 and len(rows) == 1 and 0 not in rows
        if not known or not all(bool((x == one).all()) for x, one in zip(given, self._sample, strict=True)):
            self.alike = False
        elif rows != {1}:
            self.alike = True

    def _follow_outputs(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        logits = getattr(output, "logits", output)
        if self.classes is None or type(logits) is not Tensor or is_functorch_wrapped_tensor(logits):
            return
        if (
            is_dense(logits)
            and logits.requires_grad
            and logits.dim() > 1
            and logits.numel()
            and not logits.is_complex()
        ):
            logits.register_hook(Hook(self._look_at_targets))  # type: ignore[no-untyped-call]

    def _look_at_targets(self, gradient: Tensor) -> None:
        """A cross-entropy's gradient is p - y at logits, which adds up to 0, and -y at log p: negative at the class."""
        rows = gradient.detach().flatten(0, -2)
        rows = rows[:: -(-len(rows) // _ROWS_OF_TARGETS)].float()
        negative = rows < 0
        total, size = rows.sum(1), rows.abs().sum(1)
        of_one = (negative.sum(1) == 1) & ((total.abs() <= 0.05 * size) | (total == -size))
        found = [*(self.classes or ()), *negative[of_one].int().argmax(1).tolist()]
        one = len(set(found)) < 2 and bool((of_one | (rows == 0).all(1)).all())
        self.classes = found if one and self.classes is not None else None

    def _look_behind(self, name: str, norm: nn.Module, args: tuple[Any, ...]) -> None:
        if args and args[0] is not None:
            self.norms |= {layer: name for layer, output in self._made.items() if output() is args[0]}

    def _before_dropout(self, dropout: Any, args: tuple[Any, ...]) -> None:
        self._dropout = [x.detach().clone() if dropout.inplace else x.detach() for x in args[:1]]

    def _behind_dropout(self, dropout: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._dropout.append(weakref.ref(output))

    def taken(self, sums: Mapping[str, tuple[Tensor, ...]]) -> dict[str, tuple[Tensor, ...]]:
        """These sums with what was seen since the last time."""
        found = dict(sums)
        for name, new in self._sums[self._always or self.model.training].items():
            # In place of what is new: three of all moments at a time would be a third of a large model.
            for part, known in zip(new, found.get(name, ()), strict=False):
                part += known
            found[name] = tuple(new)
        self.forget()
        return found

    def forget(self) -> None:
        self._sums.clear()
        self._dropout.clear()

    def remove(self) -> None:
        _remove([*self._handles, self._padding])


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
