"""Refit: the weights of a layer on the inputs that stay, chosen so that its outputs change least."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor, nn

from setpoint.groups.example import Example
from setpoint.groups.group import Group
from setpoint.one_shot.forward import EnoughSeen, run
from setpoint.sensor.consumer import by_column, find_consumers, from_columns, input_rows
from setpoint.sensor.elimination import moment_of, regular

Keep = Mapping[str, Bool[np.ndarray, " _units"]]

_ROWS_PER_COLUMN = 4
_FEWEST_ROWS = 4096
"""Rows of which a layer's second moment is made: as many for each column, and these at least."""


@dataclass(frozen=True, eq=False)
class Reader:
    """One weight that reads units, in all layers whose weight it is, and which of their input channels stay."""

    layers: tuple[str, ...]
    stays: Bool[np.ndarray, " channels"] = field(repr=False)


def find_readers(model: nn.Module, groups: tuple[Group, ...], keep: Keep) -> tuple[Reader, ...]:
    """The weights that lose inputs, apart from those that are also something else, as a tied embedding is."""
    layers: dict[int, set[str]] = {}
    stays: dict[int, np.ndarray] = {}
    for group in groups:
        for each in find_consumers(group, model) if not keep[group.name].all() else ():
            layer: Any = model.get_submodule(each.layer)
            weight = layer.weight
            layers.setdefault(id(weight), set()).add(each.layer)
            channels = stays.setdefault(id(weight), np.ones(by_column(layer, weight).shape[0], dtype=bool))
            channels[each.channels[~keep[group.name]].ravel()] = False
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


def refit(model: nn.Module, readers: Sequence[Reader], batches: Sequence[Example]) -> None:
    """Fit the weights of all readers anew, one after the other as the forward comes to them; what goes becomes 0.

    Each sees what the layers before it give by then, among them the units that go, which nothing reads any more in the
    end. A bias is fitted with the weights.
    """
    for reader in _in_order(model, readers, batches):
        moment = _moment(model, reader, batches)
        layer, weight = _weight_of(model, reader)
        channels = by_column(layer, weight.detach())
        stays = torch.from_numpy(np.repeat(reader.stays, channels.shape[1]))
        if moment is None or not stays.any():
            continue
        # Layers that share a weight may have biases of their own, which then stay as they are.
        bias: Any = layer.bias if len(reader.layers) == 1 else None
        columns = channels.flatten(0, 1).to(moment)
        if bias is not None:
            columns, stays = torch.cat([columns, bias.detach().to(moment)[None]]), torch.cat([stays, stays.new_ones(1)])
        found = torch.zeros_like(columns)
        used = len(columns)
        found[stays.to(moment.device)] = refitted(moment[:used, :used], columns, stays.to(moment.device))
        with torch.no_grad():
            weight.copy_(from_columns(layer, found[: len(reader.stays) * channels.shape[1]].view(channels.shape)))
            if bias is not None:
                bias.copy_(found[-1])


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


def _moment(model: nn.Module, reader: Reader, batches: Sequence[Example]) -> Float64[Tensor, "columns columns"] | None:
    """Second moment of what the layers are given, by column, with a last column of ones."""
    columns = len(reader.stays) * by_column(*_weight_of(model, reader)).shape[1]
    count = math.ceil(max(_FEWEST_ROWS, _ROWS_PER_COLUMN * columns) / len(batches))
    total: list[Tensor] = []
    calls: list[int] = []

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        rows = input_rows(layer, args[0] if args else next(iter(kwargs.values())), count).flatten(1).mT
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        moment = moment_of(torch.cat([wide, torch.ones_like(wide[:1])])[:, None])
        total[:] = [moment + total[0]] if total else [moment]
        calls[-1] += 1
        if calls[-1] == calls[0] > 0 and len(calls) > 1:  # as often as in the first batch: the rest is of no use
            raise EnoughSeen

    with _hooked(model, dict.fromkeys(reader.layers, look)):
        calls.append(0)
        run(model, batches, "batch", lambda: calls.append(0))
    return total[0] if total else None


def _weight_of(model: nn.Module, reader: Reader) -> tuple[nn.Module, Tensor]:
    layer: Any = model.get_submodule(reader.layers[0])
    return layer, layer.weight


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    """Inside, these hooks look at what layers are given."""
    handles = [model.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
