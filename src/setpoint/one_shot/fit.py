"""Fit: what the units' readers lose with a unit that the others cannot make up for, and their weights without it.

Both go by ridge regression of a layer's outputs on its inputs.
"""

import math
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from setpoint.errors import ExampleError
from setpoint.groups.example import Example
from setpoint.groups.group import Group
from setpoint.messages import counted, progress, warn
from setpoint.one_shot.consumer import (
    Consumer,
    Padding,
    by_column,
    find_consumers,
    from_columns,
    input_rows,
    layers_by_weight,
)
from setpoint.one_shot.forward import EnoughSeen, Norms, batch_norms_of, run

_RIDGE = 0.01  # added to the diagonal of a second moment, as a share of its mean
_SCORED_AT_ONCE = 1024  # columns of one second moment; the units of a wider map are scored in blocks
_FITTED_AT_ONCE = 5120  # likewise, of a fit: the moment takes 200 MiB, and there are a few such matrices
_PANEL = 64  # columns whose removal is put off, so that the large matrices change in few products
_APART = 1e-12  # how much a unit is worth more, in shares of the output's energy, than the one that goes before it
_SCORED_ROWS = 8192  # of what a layer is given, at most
_NUMBERS_AT_ONCE = 1 << 26  # that layers are given and that are held, about: 256 MiB in float32; more take more passes
_NUMBERS_OF_ONE = 1 << 23  # likewise of one layer: a wider one is seen in fewer rows
_ROWS_PER_COLUMN, _FEWEST_ROWS = 4, 4096  # of which the second moment of a fit is made: the more of both
_THIN = 0.25  # rows for each column below which a fit is warned of

Keep = Mapping[str, Bool[np.ndarray, " _units"]]
Map = tuple[Float[Tensor, "_units _columns _rows"], Float[Tensor, "_all_columns _outputs"]]
"""A linear map that units feed: what they gave it in some rows, and its weights, unit by unit."""


@progress("scoring units")
def unit_scores(
    model: nn.Module, groups: tuple[Group, ...], batches: Sequence[Example]
) -> dict[str, Float64[np.ndarray, " _units"]]:
    """Score of each unit by group, from passes over the data in each of which some groups are read.

    Let a layer with weights W read units x, `y = W^T x`, with `G = E[x x^T]` and `P = (G + ridge)^-1`. The removal of
    unit j, all other weights being fitted again, costs an error of `trace(W_j^T (P_jj)^-1 W_j)` in y. The cheapest unit
    goes first, W and P are updated (optimal brain surgeon), and so on. A unit's score is that error as a share of
    `trace(W^T G W)`, summed over the layers that read the group; it is infinite where the data do not come to them.
    Where y goes into a BatchNorm, each output counts in units of the deviation that the norm divides by, times its
    scale.

    References:
        Luo, Wu, Lin: "ThiNet", ICCV 2017, and He, Zhang, Sun: "Channel pruning for accelerating very deep neural
        networks", ICCV 2017 (channels by what the next layer can reconstruct).
    """
    found = dict[str, np.ndarray]()
    layers = layers_by_weight(model)
    part, numbers = list[Consumer](), 0
    for group in groups:
        consumers = find_consumers(group, model, layers)
        more = sum(consumer.num_units * consumer.num_columns * _SCORED_ROWS for consumer in consumers)
        if part and numbers + more > _NUMBERS_AT_ONCE:
            found |= _scores_of(part, model, batches)
            part, numbers = [], 0
        part += consumers
        numbers += more
    found |= _scores_of(part, model, batches)
    # What the data does not come to is not known to be worthless: it stays.
    return {group.name: found.get(group.name, np.full(group.num_units, np.inf)) for group in groups}


def _scores_of(consumers: Sequence[Consumer], model: nn.Module, batches: Sequence[Example]) -> dict[str, np.ndarray]:
    maps: dict[str, list[Map]] = {}
    for consumer, rows, norm in _rows_given(consumers, model, batches):
        maps.setdefault(consumer.group, []).append((rows, consumer.weight(model) * _norm_scale(norm)))
    found = {name: energy_shares(of_group) for name, of_group in maps.items()}
    for name, scores in found.items():
        if np.isnan(scores).any():
            raise ExampleError(
                f"what reads {name} is given NaN or infinity on the data: look for it in the data and the weights"
            )
    return found


def _rows_given(
    consumers: Sequence[Consumer], model: nn.Module, batches: Sequence[Example]
) -> list[tuple[Consumer, Tensor, nn.Module | None]]:
    """A sample of the rows that each consumer is given, and the BatchNorm that is given just what it makes, if any."""
    rows_of_batch = -(-_SCORED_ROWS // len(batches))
    # A layer that is called several times in a batch keeps its last rows only.
    noted: list[deque[Tensor]] = [deque(maxlen=len(batches)) for _ in consumers]
    # Weak references, so that no output stays in memory for being looked at.
    made: dict[str, weakref.ref[Tensor]] = {}
    norms: dict[str, nn.Module] = {}
    padding = Padding(model)

    def listen(number: int, consumer: Consumer) -> Any:
        count = min(rows_of_batch, max(1, _NUMBERS_OF_ONE // (consumer.num_units * consumer.num_columns)))

        def look(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor) and x.numel():
                noted[number].append(consumer.rows(layer, x, count, padding.real))
            if isinstance(output, Tensor):
                made[consumer.layer] = weakref.ref(output)

        return model.get_submodule(consumer.layer).register_forward_hook(look, with_kwargs=True)

    def look_behind(norm: nn.Module, args: tuple[Any, ...]) -> None:
        for layer, output in made.items():
            if args and args[0] is not None and output() is args[0]:
                norms[layer] = norm

    handles = [listen(number, consumer) for number, consumer in enumerate(consumers)]
    handles += [norm.register_forward_pre_hook(look_behind) for norm in batch_norms_of(model)]
    run(model, batches, "running", [*handles, padding])
    return [
        (consumer, torch.cat(tuple(rows), 2), norms.get(consumer.layer))
        for consumer, rows in zip(consumers, noted, strict=True)
        if rows  # a consumer that the data do not come to is left out
    ]


def _norm_scale(norm: Any) -> Tensor | float:
    """What a BatchNorm multiplies each of its inputs with, without its sign; 1 without a norm or its statistics."""
    if norm is None or norm.running_var is None:
        return 1.0
    deviation = (norm.running_var + norm.eps).sqrt()
    scale: Tensor = 1.0 / deviation if norm.weight is None else norm.weight.detach().abs() / deviation
    return scale


def regular(moment: Float[Tensor, "columns columns"]) -> Float[Tensor, "columns columns"]:
    """A second moment with a ridge, `G + r mean(diag G) I`; of one that is zero, the identity."""
    mean = moment.diagonal().mean()
    return moment + torch.eye(len(moment)).to(moment) * torch.where(mean > 0, _RIDGE * mean, 1.0)


def moment_of(rows: Float[Tensor, "units columns rows"]) -> Float64[Tensor, "all_columns all_columns"]:
    """Sum over rows of `x x^T`; on the CPU where the device has no float64."""
    flat = rows.flatten(0, 1).to(torch.promote_types(rows.dtype, torch.float32))
    with torch.autocast(flat.device.type, enabled=False):  # rounded to bfloat16, a moment has negative eigenvalues
        product = flat @ flat.mT
    return (product.cpu() if product.device.type == "mps" else product).double()


def energy_shares(maps: Sequence[Map]) -> Float64[np.ndarray, " _units"]:
    """By unit, the share of the maps' output energy `trace(W^T G W)` that is lost when the unit goes in its turn.

    The cheapest goes first, the others take over what they can of it, and so on. Shares never fall along this order. Of
    several maps, they add up; a map that gives nothing loses nothing. They are NaN where a weight is NaN or infinite.

    Of two units that give the same, the first is free, and the second is then worth both:

    >>> x = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
    >>> energy_shares([(x, torch.ones(3, 1))]).round(2)
    array([0.2, 0. , 0.8])
    """
    num_units = len(maps[0][0])
    by_map = [_blocks(one) for one in maps]
    # Of a map in blocks, the energy is that of all of them: shares of blocks must be comparable.
    energies = [sum(part.energy for _, part in blocks) for blocks in by_map for _ in blocks]
    parts = [part for blocks in by_map for part in blocks]
    saliency, last = np.full(num_units, np.nan), 0.0
    if not np.isfinite(energies).all():
        return saliency
    for number in range(num_units):
        losses = np.zeros(num_units)
        for (units, one), energy in zip(parts, energies, strict=True):
            losses[units] += one.losses / energy if energy > 0 else np.where(np.isinf(one.losses), np.inf, 0.0)
        unit = int(losses.argmin())
        last = max(float(losses[unit]), last + _APART * (number > 0))
        saliency[unit] = last
        for units, one in parts:
            if units.start <= unit < units.stop:
                one.remove(unit - units.start)
    return saliency


class Elimination:
    """Optimal brain surgeon on `y = W^T x` in which each unit owns m rows of W; changes with each removal.

    With `G` the second moment of x and `P = (G + ridge)^-1`, the best that the other units can do for unit j leaves the
    error

        loss_j = trace(W_j^T (P_jj)^-1 W_j)     at     W <- W - P_:j (P_jj)^-1 W_j,

    after which `P <- P - P_:j (P_jj)^-1 P_j:`. Losses of removals one after the other add up to the error of the best
    fit without all of these units. Of W only `M = W W^T` is needed.

    References:
        Hassibi, Stork: "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992. Frantar,
        Alistarh: "Optimal Brain Compression", NeurIPS 2022 (layer by layer, on the layers' inputs).
    """

    def __init__(
        self, moment: Float64[Tensor, "columns columns"], weight: Float64[Tensor, "columns outputs"], num_columns: int
    ) -> None:
        self._m = num_columns
        self._units = np.arange(len(moment) // num_columns)  # that the matrices still hold
        products = weight @ weight.mT
        self.energy = float((moment * products).sum())
        self.losses = np.full(len(self._units), np.nan)
        if math.isfinite(self.energy):
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(regular(moment)))
            # NumPy from here on: many small steps, for which a call of it takes a fraction of the time.
            self._hold(inverse.cpu().numpy(), products.cpu().numpy())

    def _hold(self, inverse: np.ndarray, products: np.ndarray) -> None:
        """Begin anew with P and M, nothing put off."""
        self._inverse, self._products = inverse, products
        self._own = [self._diagonal(matrix) for matrix in (inverse, products)]
        self._left = np.ones(len(self._units), dtype=bool)
        self._panel = [np.zeros((len(inverse), max(_PANEL, self._m))) for _ in range(3)]
        self._used = 0
        self._rate()

    def remove(self, unit: int) -> None:
        """Remove a unit; the losses of the others follow."""
        slot, m = int(np.searchsorted(self._units, unit)), self._m
        own, new = slice(slot * m, (slot + 1) * m), slice(self._used, self._used + m)
        # The matrices are as they were when the panel was begun; what was removed since is in the panel:
        # P - gains columns^T and M - gains changes^T - changes gains^T.
        gains, columns, changes = (panel[:, : self._used] for panel in self._panel)
        column = self._inverse[:, own] - gains @ columns[own].T
        products = self._products[:, own] - gains @ changes[own].T - changes @ gains[own].T
        gain = np.linalg.solve(column[own].T, column.T).T
        change = products - 0.5 * gain @ products[own]
        for kept, values in zip(self._panel, (gain, column, change), strict=True):
            kept[:, new] = values
        self._used += m
        own_gain, own_column, own_change = (values.reshape(-1, m, m) for values in (gain, column, change))
        self._own[0] -= own_gain @ own_column.swapaxes(1, 2)
        self._own[1] -= own_gain @ own_change.swapaxes(1, 2) + own_change @ own_gain.swapaxes(1, 2)
        self._own[0][slot] = np.eye(m)  # what is left there is rounding, and may be singular
        self.losses[unit], self._left[slot] = np.inf, False
        if self._used + m > self._panel[0].shape[1] and self._left.any():
            self._catch_up()
        else:
            self._rate()

    def _rate(self) -> None:
        inverse, products = self._own
        each = products / inverse if self._m == 1 else np.linalg.solve(inverse, products)
        rated = np.maximum(np.trace(each, axis1=1, axis2=2), 0.0)
        self.losses[self._units[self._left]] = rated[self._left]

    def _catch_up(self) -> None:
        """Make up for what was put off, and leave out what is gone."""
        gains, columns, changes = (panel[:, : self._used] for panel in self._panel)
        kept = np.flatnonzero(np.repeat(self._left, self._m))
        both = gains[kept] @ changes[kept].T
        inverse = self._inverse[np.ix_(kept, kept)] - gains[kept] @ columns[kept].T
        products = self._products[np.ix_(kept, kept)] - both - both.T
        self._units = self._units[self._left]
        self._hold(inverse, products)

    def _diagonal(self, matrix: np.ndarray) -> Float64[np.ndarray, "units m m"]:
        num, m = len(matrix) // self._m, self._m
        return matrix.reshape(num, m, num, m)[np.arange(num), :, np.arange(num)].copy()


def _blocks(one: Map) -> list[tuple[slice, Elimination]]:
    """A map in blocks of units, each as an elimination of its own."""
    rows, weight = one
    num_units, m = rows.shape[:2]
    num_blocks = min(num_units, math.ceil(num_units * m / _SCORED_AT_ONCE)) or 1
    edges = np.linspace(0, num_units, num_blocks + 1).round().astype(int)
    found = []
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        moment = moment_of(rows[start:stop])
        found.append((slice(start, stop), Elimination(moment, weight[start * m : stop * m].to(moment), m)))
    return found


@dataclass(frozen=True, eq=False)
class Reader:
    """One weight that reads units, in all layers whose weight it is, and which of their input channels stay."""

    layers: tuple[str, ...]
    stays: Bool[np.ndarray, " channels"]


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


def refit(model: nn.Module, readers: Sequence[Reader], batches: Sequence[Example], norms: Norms) -> tuple[Reader, ...]:
    """Fit the weights of all readers anew, one after the other as the forward comes to them; what goes becomes 0.

    Each sees what the layers before it give by then, among them the units that go, which nothing reads any more in the
    end. A bias is fitted with the weights. Wide inputs are fitted in blocks without cross terms. Those that were fitted
    are returned: all that the data come to.
    """
    thin: dict[str, tuple[float, str]] = {}
    readers = _in_order(model, readers, batches)
    for number, reader in enumerate(readers, 1):
        with progress(f"fitting layer {number} of {len(readers)}"):
            layer: Any = model.get_submodule(reader.layers[0])
            weight = layer.weight
            channels = by_column(layer, weight.detach())
            found = torch.zeros_like(channels)
            # Layers that share a weight may have biases of their own, which then stay as they are.
            bias = layer.bias if len(reader.layers) == 1 else None
            shift = torch.zeros(channels.shape[-1], dtype=torch.float64)
            for block in _even_blocks(len(channels), channels.shape[1]):
                moment = _moment(model, reader, batches, block, norms)
                if not torch.isfinite(moment).all():
                    what = f"{reader.layers[0]} is given NaN or infinity on the data"
                    raise ExampleError(f"{what}: look for it in the data and the weights")
                rows, inputs = float(moment[-1, -1]), len(moment) - 1  # the last column is of ones
                if rows < _THIN * inputs:
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


def _even_blocks(channels: int, offsets: int) -> list[slice]:
    """The channels in as few even blocks as hold at most `_FITTED_AT_ONCE` columns each."""
    number = min(channels, math.ceil(channels * offsets / _FITTED_AT_ONCE)) or 1
    bounds = [channels * block // number for block in range(number + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _in_order(model: nn.Module, readers: Sequence[Reader], batches: Sequence[Example]) -> list[Reader]:
    """The readers as the forward comes to them; those that it does not come to are left out."""
    called: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
        for reader in readers
        for name in reader.layers
    ]
    run(model, batches[:1], "running", handles)
    seen = [reader for reader in readers if not set(called).isdisjoint(reader.layers)]
    return sorted(seen, key=lambda reader: min(called.index(name) for name in reader.layers if name in called))


def _moment(
    model: nn.Module, reader: Reader, batches: Sequence[Example], block: slice, norms: Norms
) -> Float64[Tensor, "columns columns"]:
    """Second moment of what the layers are given, by column of these channels, with a last column of ones."""
    layer: Any = model.get_submodule(reader.layers[0])
    columns = (block.stop - block.start) * by_column(layer, layer.weight).shape[1]
    count = math.ceil(max(_FEWEST_ROWS, _ROWS_PER_COLUMN * columns) / len(batches))
    total: list[Tensor] = []
    calls: list[int] = []  # of the layers, by batch
    padding = Padding(model)

    def look(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        # Channels lie along the last dim of tokens, and along the one before the pixels of images.
        of_block = given.narrow(1 - layer.weight.dim(), block.start, block.stop - block.start)
        rows = input_rows(layer, of_block, count, padding.real).flatten(1).mT
        moment = moment_of(torch.cat([rows, torch.ones_like(rows[:1])])[:, None])
        total[:] = [moment + total[0]] if total else [moment]
        calls[-1] += 1
        if calls[-1] == calls[0] > 0 and len(calls) > 1:  # as often as in the first batch: the rest is of no use
            raise EnoughSeen

    handles = [model.get_submodule(name).register_forward_hook(look, with_kwargs=True) for name in reader.layers]
    handles.append(model.register_forward_pre_hook(lambda *_: calls.append(0)))
    run(model, batches, norms, [*handles, padding])
    return total[0]
