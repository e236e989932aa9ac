"""Score: the error that a unit's removal leaves in the layers that read it, after these are fitted again."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from setpoint.errors import ExampleError
from setpoint.groups.example import Example
from setpoint.groups.group import Group
from setpoint.one_shot.consumer import Consumer, Padding, find_consumers, layers_by_weight
from setpoint.one_shot.forward import batch_norms_of, run

RIDGE = 0.01
"""What is added to the diagonal of a second moment, as a share of its mean."""

MOST_COLUMNS = 1024
"""Columns whose second moment is held at once; the units of a wider map are split into blocks without cross terms."""

_PANEL = 64
"""Columns whose removal is put off, so that the large matrices change in few products."""

_APART = 1e-12
"""How much a unit is worth more, in shares of the output's energy, than the one that goes before it."""

_ROWS = 8192
"""Rows of what a layer is given that a score is made of, at most."""

_NUMBERS_AT_ONCE = 1 << 26
"""Numbers that layers are given and that are held at once, about: 256 MiB in float32. More take further passes."""

_NUMBERS_OF_ONE = 1 << 23
"""Numbers that are kept of what one layer was given: a wider layer is seen in fewer rows."""

Map = tuple[Float[Tensor, "_units _columns _rows"], Float[Tensor, "_all_columns _outputs"]]
"""A linear map that units feed: what they gave it in some rows, and its weights, unit by unit."""


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
        more = sum(consumer.num_units * consumer.num_columns * _ROWS for consumer in consumers)
        if part and numbers + more > _NUMBERS_AT_ONCE:
            found |= _scores_of(part, model, batches)
            part, numbers = [], 0
        part += consumers
        numbers += more
    found |= _scores_of(part, model, batches)
    # What the data does not come to is not known to be worthless: it stays.
    return {group.name: found.get(group.name, np.full(group.num_units, np.inf)) for group in groups}


def _scores_of(consumers: Sequence[Consumer], model: nn.Module, batches: Sequence[Example]) -> dict[str, np.ndarray]:
    """Scores by group of what these layers read, from one pass over the data."""
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
    """A sample of the rows that each consumer is given, and the BatchNorm that is given just what it makes, if any.

    A consumer that the data do not come to is left out.
    """
    rows_of_batch = -(-_ROWS // len(batches))
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
    try:
        run(model, batches, "running")
    finally:
        for handle in handles:
            handle.remove()
        padding.stop()
    return [
        (consumer, torch.cat(tuple(rows), 2), norms.get(consumer.layer))
        for consumer, rows in zip(consumers, noted, strict=True)
        if rows
    ]


def _norm_scale(norm: Any) -> Tensor | float:
    """What a BatchNorm multiplies each of its inputs with, without its sign; 1 without a norm or its statistics."""
    if norm is None or norm.running_var is None:
        return 1.0
    deviation = (norm.running_var + norm.eps).sqrt()
    scale: Tensor = 1.0 / deviation if norm.weight is None else norm.weight.detach().abs() / deviation
    return scale


def regular(moment: Float[Tensor, "columns columns"]) -> Float[Tensor, "columns columns"]:
    """A second moment with a ridge, `G + RIDGE mean(diag G) I`; of one that is zero, the identity."""
    mean = moment.diagonal().mean()
    return moment + torch.eye(len(moment)).to(moment) * torch.where(mean > 0, RIDGE * mean, 1.0)


def moment_of(rows: Float[Tensor, "units columns rows"]) -> Float64[Tensor, "all_columns all_columns"]:
    """Sum over rows of `x x^T`; on the CPU where the device has no float64."""
    flat = rows.flatten(0, 1).to(torch.promote_types(rows.dtype, torch.float32))
    with torch.autocast(flat.device.type, enabled=False):  # rounded to bfloat16, a moment has negative eigenvalues
        product = flat @ flat.mT
    return (product.cpu() if product.device.type == "mps" else product).double()


def energy_shares(maps: Sequence[Map]) -> Float64[np.ndarray, " _units"]:
    """By unit, the share of the maps' output energy `trace(W^T G W)` that is lost when the unit goes.

    That is when its turn comes: the cheapest goes first, the others take over what they can of it, and so on. Shares
    never fall along this order, so that units of the least shares are those that go first. Of several maps, shares add
    up. A map that gives nothing loses nothing. They are NaN where a weight is NaN or infinite.

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
    num_blocks = min(num_units, math.ceil(num_units * m / MOST_COLUMNS)) or 1
    edges = np.linspace(0, num_units, num_blocks + 1).round().astype(int)
    found = []
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        moment = moment_of(rows[start:stop])
        found.append((slice(start, stop), Elimination(moment, weight[start * m : stop * m].to(moment), m)))
    return found
