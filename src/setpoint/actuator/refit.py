"""Refit: the weights that read dropped units, fitted in closed form to what the units that stay can make up for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.distributed import local, region
from setpoint.groups.group import Group
from setpoint.messages import counted, warn
from setpoint.sensor.consumer import by_column, from_columns
from setpoint.sensor.moments import Moment, Reader, find_readers
from setpoint.sensor.reconstruction import RIDGE, regular

_ENOUGH_ROWS = 16  # for each column, below which the ridge grows

Keep = Mapping[str, Bool[np.ndarray, " _units"]]


def fit_map(
    moment: Float64[Tensor, "columns columns"],
    stays: Bool[Tensor, " columns"],
    ridge: float = RIDGE,
    inputs: int | None = None,
) -> Float64[Tensor, "kept columns"]:
    """`R = (G_kk + r I)^-1 (G + r I)_k:`, with which `W' = R W` are the weights on the columns that stay.

    They minimise `E|W'^T x_k - W^T x|^2 + r |W' - W|^2` with W' = 0 on the other columns, r = `ridge` times the mean of
    the diagonal of G: where nothing goes, nothing changes. R does not depend on W: the refit of an average of models is
    the average of their refits. The ridge is of the first `inputs` columns, not of a constant behind them.
    """
    regularised = regular(moment, ridge, inputs)
    kept = stays.nonzero().flatten()
    return torch.cholesky_solve(regularised[kept], torch.linalg.cholesky(regularised[kept][:, kept]))


@torch.no_grad()
def refit(
    models: Sequence[nn.Module],
    groups: tuple[Group, ...],
    keep: Keep,
    moments: Mapping[str, Moment],
    undo: Callable[..., Any] = lambda *call: None,
    *,
    optimizers: Sequence[Optimizer] = (),
    thin: float = 0.02,
) -> tuple[str, ...]:
    """Refit all weights that lose inputs, of a model and of its copies; what goes becomes 0. Names of the layers.

    A bias is fitted with the weights, unless it is one of several; a weight that is also used otherwise, as a tied
    embedding is, stays as it is. The running statistics of a BatchNorm behind follow. `undo` is called with each way
    back. Weights of which an optimizer keeps
    others, as Lookahead does, stay as they are. Fewer rows than `thin` for each column are warned of.
    """
    fitted, few = list[str](), dict[str, tuple[float, str]]()
    model = models[0]
    # A weight that is held once more than it reads, as a tied embedding is, would be refitted for its other use, too.
    holders = [id(weight) for module in model.modules() for weight in module.parameters(recurse=False)]
    for reader in find_readers(model, [group for group in groups if not keep[group.name].all()]):
        layer: Any = model.get_submodule(reader.name)
        moment = moments.get(reader.name)
        # Without rows all that it was given was NaN or infinite.
        if moment is None or not moment.num_rows or holders.count(id(layer.weight)) != len(reader.layers):
            continue
        if any(_holds_weights(optimizer, layer.weight) for optimizer in optimizers):
            continue
        stays, rows = _stays(reader, keep), moment.num_rows
        widest = max(map(len, moment.blocks)) - 1
        if rows < thin * widest:
            few[reader.name] = rows / widest, f"{reader.name} is given {rows:.0f} rows for {widest} inputs"
        ones = None if layer.bias is not None and len(reader.layers) == 1 else -1  # where the bias stays, without them
        # Of few rows a fit with a small ridge learns the noise, and is worse than none.
        ridge = RIDGE * max(1.0, _ENOUGH_ROWS * widest / rows)
        maps = [
            fit_map(part[:ones, :ones].double(), torch.from_numpy(own[:ones]).to(part.device), ridge, len(part) - 1)
            for part, own in _parts(reader, moment, stays)
        ]
        norm: Any = model.get_submodule(moment.norm) if moment.norm else None
        follows = norm is not None and norm.training and norm.running_var is not None
        for copy in models:
            _apply(_inside(copy, reader.name), reader, moment, stays, maps, undo, follows=follows)
        fitted += reader.layers
    if few:
        warn(
            f"the data are too few to fit {counted(len(few), 'layer')} well: {min(few.values())[1]}. The cut model "
            "may be far from the dense one: give more batches, or larger ones"
        )
    return tuple(fitted)


def _holds_weights(optimizer: Optimizer, weight: Tensor) -> bool:
    """Whether its state has a tensor near the weight, as Lookahead's slow weights, which would undo a fit."""
    like = (s for s in optimizer.state.get(weight, {}).values() if isinstance(s, Tensor) and s.shape == weight.shape)
    return any(bool((held - weight).norm() < 0.5 * weight.norm()) for held in like)


def _inside(copy: nn.Module, name: str) -> nn.Module:
    """The module that has this one by name: an `AveragedModel` keeps the model's under "module"."""
    try:
        copy.get_submodule(name)
    except AttributeError:
        return copy.get_submodule("module")
    return copy


def _stays(reader: Reader, keep: Keep) -> Bool[np.ndarray, " columns"]:
    stays = np.ones(reader.num_columns, dtype=bool)
    for consumer in reader.consumers:
        gone = np.repeat(~keep[consumer.group], consumer.num_columns)
        stays[consumer.columns[gone]] = False
    return stays


def _parts(reader: Reader, moment: Moment, stays: Bool[np.ndarray, " columns"]) -> list[tuple[Tensor, np.ndarray]]:
    """Each block of the moment, and which of its columns stay; the last one, of ones, does."""
    bounds = np.cumsum([len(block) - 1 for block in moment.blocks])
    parts = np.split(stays, bounds[:-1])
    return [(block, np.append(part, True)) for block, part in zip(moment.blocks, parts, strict=True)]


def _apply(
    model: nn.Module,
    reader: Reader,
    moment: Moment,
    stays: Bool[np.ndarray, " columns"],
    maps: Sequence[Tensor],
    undo: Callable[..., Any],
    *,
    follows: bool,
) -> None:
    layer: Any = model.get_submodule(reader.name)
    weight, bias = layer.weight, layer.bias if len(reader.layers) == 1 else None
    channels = by_column(layer, weight.detach())
    whole, first = channels.flatten(0, 1), 0
    new, shift = torch.zeros_like(whole), maps[0].new_zeros(whole.shape[1])
    spread = [torch.zeros_like(shift) for _ in range(4)]  # mean and variance of the outputs, before and after
    for (part, own), through in zip(_parts(reader, moment, stays), maps, strict=True):
        columns = slice(first, first + len(part) - 1)
        kept, old = torch.from_numpy(own[:-1]).to(whole.device), whole[columns].to(through)
        fitted = through[:, : len(part) - 1] @ old
        if bias is not None:
            shift += fitted[-1]
            fitted = fitted[:-1]
        placed = torch.zeros_like(old)
        placed[kept] = fitted
        new[columns] = placed.to(new)
        first += len(part) - 1
        if not follows:
            continue
        mean_square = part.double() / part[-1, -1].double()
        mean, second = mean_square[-1, :-1], mean_square[:-1, :-1]
        for number, weights in enumerate((old, placed)):
            spread[2 * number] += mean @ weights
            spread[2 * number + 1] += ((second - torch.outer(mean, mean)) @ weights * weights).sum(0)
    new = new.view(channels.shape)
    _write(weight, from_columns(layer, new), undo)
    if bias is not None:
        held = local(bias)  # of a bias that is sharded over ranks, which a cut of the inputs leaves alone
        _write(held, held + shift[region(bias)[0]].to(held), undo)
    if follows:
        norm: Any = model.get_submodule(moment.norm)
        before, var_before, after, var_after = (value.to(norm.running_var) for value in spread)
        _write(norm.running_mean, norm.running_mean + (after - before + shift.to(before)), undo)
        share = torch.where(var_before > 0, var_after / var_before, 1.0)
        _write(norm.running_var, norm.running_var * share, undo)


def _write(tensor: Tensor, new: Tensor, undo: Callable[..., Any]) -> None:
    undo(tensor.detach().copy_, tensor.detach().clone())
    tensor.copy_(new)
