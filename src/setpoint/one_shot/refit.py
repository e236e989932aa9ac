"""Refit: the weights of a layer on the inputs that stay, chosen so that its outputs change least."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor, nn

from setpoint.errors import ExampleError
from setpoint.groups.example import Example
from setpoint.groups.group import Group
from setpoint.messages import counted, warn
from setpoint.one_shot.consumer import (
    Padding,
    by_column,
    channel_dim,
    find_consumers,
    from_columns,
    input_rows,
    layers_by_weight,
)
from setpoint.one_shot.forward import EnoughSeen, Norms, run
from setpoint.one_shot.score import moment_of, regular

Keep = Mapping[str, Bool[np.ndarray, " _units"]]

MOST_COLUMNS = 5120
"""Columns that are fitted at once: their second moment takes 200 MiB, and there are a few such matrices."""

_ROWS_PER_COLUMN = 4
_FEWEST_ROWS = 4096
"""Rows of which a layer's second moment is made: as many for each column, and these at least."""

_FEWEST_SHARE = 0.25
"""Rows for each column below which a fit is warned of."""


@dataclass(frozen=True, eq=False)
class Reader:
    """One weight that reads units, in all layers whose weight it is, and which of their input channels stay."""

    layers: tuple[str, ...]
    stays: Bool[np.ndarray, " channels"] = field(repr=False)


def find_readers(model: nn.Module, groups: tuple[Group, ...], keep: Keep) -> tuple[Reader, ...]:
    """The weights that lose inputs, apart from those that are also something else, as a tied embedding is."""
    layers: dict[int, set[str]] = {}
    stays: dict[int, np.ndarray] = {}
    known = layers_by_weight(model)
    for group in groups:
        for consumer in find_consumers(group, model, known) if not keep[group.name].all() else ():
            layer: Any = model.get_submodule(consumer.layer)
            weight = layer.weight
            layers.setdefault(id(weight), set()).add(consumer.layer)
            channels = stays.setdefault(id(weight), np.ones(by_column(layer, weight).shape[0], dtype=bool))
            channels[consumer.channels[~keep[group.name]].ravel()] = False
    # A weight that is held once more than it reads, as a tied embedding is, would be refitted for its other use, too.
    holders = [id(weight) for module in model.modules() for weight in module.parameters(recurse=False)]
    return tuple(
        Reader(tuple(sorted(layers[weight])), stays[weight])
        for weight in layers
        if holders.count(weight) == len(layers[weight])
    )


def refitted(
    moment: Float64[Tensor, "columns columns"], weight: Float64[Tensor, "columns outputs"], stays: Tensor
) -> Float64[Tensor, "kept outputs"]:
    """Weights on the columns that stay, `(G_kk + r I)^-1 ((G + r I) W)_k`.

    They minimise `E|W'^T x_k - W^T x|^2 + r |W' - W|^2` with W' = 0 on the other columns, r = .01 of the mean of the
    diagonal of G: where nothing goes, nothing changes.
    """
    ridge = regular(moment)
    kept = stays.nonzero().flatten()
    target = ridge[kept] @ weight
    return torch.cholesky_solve(target, torch.linalg.cholesky(ridge[kept][:, kept]))


def refit(
    model: nn.Module, readers: Sequence[Reader], batches: Sequence[Example], norms: Norms = "batch"
) -> tuple[Reader, ...]:
    """Fit the weights of all readers anew, one after the other as the forward comes to them; what goes becomes 0.

    Each sees what the layers before it give by then, among them the units that go, which nothing reads any more in the
    end. A bias is fitted with the weights. Inputs that are wider than `MOST_COLUMNS` are fitted in blocks without cross
    terms.

    A layer with far fewer rows of data than inputs to fit is warned of, one that is given NaN or infinity is an error.
    Those that were fitted are returned: all that the data come to.
    """
    thin: dict[str, tuple[float, str]] = {}
    # In the order of the forward, so that each fit sees what the fits before it have left.
    readers = _in_order(model, readers, batches)
    for reader in readers:
        layer: Any = model.get_submodule(reader.layers[0])
        weight = layer.weight
        channels = by_column(layer, weight.detach())
        found = torch.zeros_like(channels)
        # Layers that share a weight may have biases of their own, which then stay as they are.
        bias = layer.bias if len(reader.layers) == 1 else None
        shift = torch.zeros(channels.shape[-1], dtype=torch.float64)
        for block in _blocks(len(channels), channels.shape[1]):
            moment = _moment(model, reader, batches, block, norms)
            if not torch.isfinite(moment).all():
                raise ExampleError(
                    f"{reader.layers[0]} is given NaN or infinity on the data: look for it in the data and the weights"
                )
            rows, inputs = float(moment[-1, -1]), len(moment) - 1  # the last column is of ones
            if rows < _FEWEST_SHARE * inputs:
                name = reader.layers[0]
                thin[name] = rows / inputs, f"{name} is given {rows:.0f} rows for {inputs} inputs"
            stays = torch.from_numpy(np.repeat(reader.stays[block], channels.shape[1])).to(moment.device)
            columns = channels[block].flatten(0, 1).to(moment)
            if bias is None:
                moment = moment[:-1, :-1]
            else:  # a last column of ones, whose weight is what the bias changes by
                columns = torch.cat([columns, torch.zeros_like(columns[:1])])
                stays = torch.cat([stays, stays.new_ones(1)])
            if stays.any():
                fitted = torch.zeros_like(columns)
                fitted[stays] = refitted(moment, columns, stays)
                if bias is not None:
                    shift += fitted[-1].cpu()
                found[block] = fitted[: stays.numel() - (bias is not None)].view(found[block].shape).to(found)
        with torch.no_grad():
            weight.copy_(from_columns(layer, found))
            if bias is not None:
                bias.copy_(bias.cpu().double() + shift)
    if thin:
        warn(
            f"the data are too few to fit {counted(len(thin), 'layer')} well: {min(thin.values())[1]}. The cut model "
            "may be far from the dense one: give more batches"
        )
    return tuple(readers)


def _blocks(channels: int, offsets: int) -> list[slice]:
    """The channels in as few even blocks as hold at most `MOST_COLUMNS` columns each."""
    number = min(channels, math.ceil(channels * offsets / MOST_COLUMNS)) or 1
    bounds = [channels * block // number for block in range(number + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _in_order(model: nn.Module, readers: Sequence[Reader], batches: Sequence[Example]) -> list[Reader]:
    """The readers as the forward comes to them; those that it does not come to are left out."""
    first: dict[str, int] = {}

    def note(name: str) -> Any:
        def look(*_: Any) -> None:  # whatever a hook returns takes the place of the output
            first.setdefault(name, len(first))

        return look

    with _hooked(model, {name: note(name) for reader in readers for name in reader.layers}):
        run(model, batches[:1], "running")
    seen = [reader for reader in readers if any(name in first for name in reader.layers)]
    return sorted(seen, key=lambda reader: min(first[name] for name in reader.layers if name in first))


def _moment(
    model: nn.Module, reader: Reader, batches: Sequence[Example], block: slice, norms: Norms
) -> Float64[Tensor, "columns columns"]:
    """Second moment of what the layers are given, by column of these channels, with a last column of ones."""
    layer: Any = model.get_submodule(reader.layers[0])
    columns = (block.stop - block.start) * by_column(layer, layer.weight).shape[1]
    count = math.ceil(max(_FEWEST_ROWS, _ROWS_PER_COLUMN * columns) / len(batches))
    total: list[Tensor] = []
    calls: list[int] = []

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        of_block = given.narrow(channel_dim(layer), block.start, block.stop - block.start)
        rows = input_rows(layer, of_block, count, padding.real).flatten(1).mT
        moment = moment_of(torch.cat([rows, torch.ones_like(rows[:1])])[:, None])
        total[:] = [moment + total[0]] if total else [moment]
        calls[-1] += 1
        if calls[-1] == calls[0] > 0 and len(calls) > 1:  # as often as in the first batch: the rest is of no use
            raise EnoughSeen

    padding = Padding(model)
    try:
        with _hooked(model, dict.fromkeys(reader.layers, look)):
            calls.append(0)
            run(model, batches, norms, lambda: calls.append(0))
    finally:
        padding.stop()
    return total[0]


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
