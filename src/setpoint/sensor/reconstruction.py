"""Reconstruction: what the readers of units lose with a unit that the others cannot make up for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from setpoint.distributed import unsharded_tensor
from setpoint.groups.group import Group
from setpoint.sensor.consumer import Consumer
from setpoint.sensor.moments import Moment, Reader

RIDGE = 0.01  # added to the diagonal of a second moment, as a share of its mean
_SCORED_AT_ONCE = 1024  # columns of one second moment; the units of a wider map are scored in blocks
_PANEL = 64  # columns whose removal is put off, so that the large matrices change in few products
_APART = 1e-12  # how much a unit is worth more, in shares of the output's energy, than the one that goes before it

Map = tuple[Moment, Int[np.ndarray, " _all_columns"], Float[Tensor, "_all_columns _outputs"], int]
"""A linear map that units feed: the second moment of its inputs, the columns of it that the units give and the weights
on these, both unit by unit, and the number of units."""


def unit_scores(
    model: nn.Module, groups: Sequence[Group], readers: Sequence[Reader], moments: Mapping[str, Moment]
) -> dict[str, Float64[np.ndarray, " _units"]]:
    """Score of each unit by group, from the second moments of what its readers are given.

    Let a layer with weights W read units x, `y = W^T x`, with `G = E[x x^T]` and `P = (G + ridge)^-1`. The removal of
    unit j, all other weights being fitted again, costs an error of `trace(W_j^T (P_jj)^-1 W_j)` in y. The cheapest unit
    goes first, W and P are updated (optimal brain surgeon), and so on. A unit's score is that error as a share of
    `trace(W^T G W)`, summed over the layers that read the group; it is infinite where no moment is known.
    Where y goes into a BatchNorm, each output counts in units of the deviation that the norm divides by, times its
    scale.

    References:
        Luo, Wu, Lin: "ThiNet", ICCV 2017, and He, Zhang, Sun: "Channel pruning for accelerating very deep neural
        networks", ICCV 2017 (channels by what the next layer can reconstruct).
    """
    reads, found = dict[str, list[tuple[Moment, Consumer]]](), dict[str, np.ndarray]()
    for reader in readers:
        if (moment := moments.get(reader.name)) is not None:
            for consumer in reader.consumers:
                reads.setdefault(consumer.group, []).append((moment, consumer))

    def as_map(moment: Moment, consumer: Consumer) -> Map:
        scale = _norm_scale(model.get_submodule(moment.norm) if moment.norm else None)
        return moment, consumer.columns, consumer.weight(model) * scale, consumer.num_units

    with torch.autocast("cpu", enabled=False):  # an inverse in bfloat16 is none
        for name, of_group in reads.items():
            # Also those without a row: another rank, which waits for this one's shards, may have some.
            maps = [as_map(*one) for one in of_group]
            if known := [one for one in maps if one[0].num_rows]:
                found[name] = energy_shares(known)
    # What the data does not come to is not known to be worthless: it stays.
    return {group.name: found.get(group.name, np.full(group.num_units, np.inf)) for group in groups}


def _norm_scale(norm: Any) -> Tensor | float:
    """What a BatchNorm multiplies each of its inputs with, without its sign; 1 without a norm or its statistics."""
    if norm is None or norm.running_var is None:
        return 1.0
    deviation = (norm.running_var + norm.eps).sqrt()
    scale: Tensor = 1.0 / deviation if norm.weight is None else unsharded_tensor(norm.weight.detach()).abs() / deviation
    return scale


def regular(
    moment: Float[Tensor, "columns columns"], ridge: float = RIDGE, inputs: int | None = None
) -> Float[Tensor, "columns columns"]:
    """A second moment with a ridge, `G + r mean(diag G) I`, on the first `inputs` columns; of a zero, the identity.

    A constant behind the inputs takes no part, so that a fit does not depend on the unit that these are measured in.
    """
    found = moment.clone()
    diagonal = found.diagonal()[:inputs]
    mean = diagonal.mean()
    diagonal += torch.where(mean > 0, ridge * mean, 1.0)
    return found


def energy_shares(maps: Sequence[Map]) -> Float64[np.ndarray, " _units"]:
    """By unit, the share of the maps' output energy `trace(W^T G W)` that is lost when the unit goes in its turn.

    The cheapest goes first, the others take over what they can of it, and so on. Shares never fall along this order. Of
    several maps, they add up; a map that gives nothing loses nothing. They are NaN where a weight is NaN or infinite.

    Of two units that give the same, the first is free, and the second is then worth both:

    >>> from setpoint.sensor.moments import moment_of
    >>> rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]).double()
    >>> energy_shares([(Moment((moment_of(rows),)), np.arange(3), torch.ones(3, 1), 3)]).round(2)
    array([0.2, 0. , 0.8])
    """
    num_units = maps[0][-1]
    by_map = [_blocks(one) for one in maps]
    # Of a map in blocks, the energy is that of all of them: shares of blocks must be comparable.
    energies = [sum(part.energy for _, part in blocks) for blocks in by_map]
    parts = [(row, units, part) for row, blocks in enumerate(by_map) for units, part in blocks]
    saliency, last, shares = np.full(num_units, np.nan), 0.0, np.zeros((len(maps), num_units))
    if not np.isfinite(energies).all():
        return saliency
    changed = parts
    for number in range(num_units):
        for row, units, part in changed:
            energy, losses = energies[row], part.losses
            shares[row, units] = losses / energy if energy > 0 else np.where(np.isinf(losses), np.inf, 0.0)
        losses = shares.sum(0)
        unit = int(losses.argmin())
        last = max(float(losses[unit]), last + _APART * (number > 0))
        saliency[unit] = last
        changed = [(row, units, part) for row, units, part in parts if units.start <= unit < units.stop]
        for _, units, part in changed:
            part.remove(unit - units.start)
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
        self, moment: Float[Tensor, "columns columns"], weight: Float[Tensor, "columns outputs"], num_columns: int
    ) -> None:
        self._m, self._one = num_columns, np.eye(num_columns)
        self._units = np.arange(len(moment) // num_columns)  # that the matrices still hold
        products = weight @ weight.mT
        self.energy = float((moment * products).sum())
        self.losses = np.full(len(self._units), np.nan)
        if math.isfinite(self.energy):
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(regular(moment)))
            # NumPy from here on: many small steps, for which a call of it takes a fraction of the time.
            self._hold(inverse.numpy(), products.numpy())

    def _hold(self, inverse: np.ndarray, products: np.ndarray) -> None:
        """Begin anew with P and M, nothing put off."""
        self._inverse, self._products = inverse, products
        self._own = [self._diagonal(matrix) for matrix in (inverse, products)]
        self._left = np.ones(len(self._units), dtype=bool)
        self._panel = np.zeros((3, max(_PANEL, self._m), len(inverse)), dtype=inverse.dtype)
        self._used = 0
        self._rate()

    def remove(self, unit: int) -> None:
        """Remove a unit; the losses of the others follow."""
        slot, m = int(np.searchsorted(self._units, unit)), self._m
        own, new = slice(slot * m, (slot + 1) * m), slice(self._used, self._used + m)
        # The matrices are as they were when the panel was begun; what was removed since is in the panel:
        # P - columns^T gains and M - changes^T gains - gains^T changes.
        gains, columns, changes = self._panel[:, : self._used]
        column = self._inverse[own] - columns[:, own].T @ gains
        products = self._products[own] - changes[:, own].T @ gains - gains[:, own].T @ changes
        gain = column / column[:, own] if m == 1 else np.linalg.solve(column[:, own], column)
        change = products - 0.5 * products[:, own] @ gain
        self._panel[:, new] = gain, column, change
        self._used += m
        both = _by_unit(gain, change)
        self._own[0] -= _by_unit(gain, column)
        self._own[1] -= both + both.swapaxes(1, 2)
        self._own[0][slot] = self._one  # what is left there is rounding, and may be singular
        self._left[slot] = False
        self._rate()
        if self._used + m > self._panel.shape[1] and self._left.any():
            self._catch_up()

    def _rate(self) -> None:
        inverse, products = self._own
        each = products / inverse if self._m == 1 else np.linalg.solve(inverse, products)
        rated = np.maximum(np.einsum("uaa->u", each), 0.0)
        self.losses[self._units] = np.where(self._left, rated, np.inf)

    def _catch_up(self) -> None:
        """Make up for what was put off, and leave out what is gone."""
        kept = torch.from_numpy(np.flatnonzero(np.repeat(self._left, self._m)))
        gains, columns, changes = torch.from_numpy(self._panel[:, : self._used]).index_select(2, kept)
        inverse, products = (
            torch.from_numpy(matrix).index_select(0, kept).index_select(1, kept)
            for matrix in (self._inverse, self._products)
        )
        inverse.addmm_(columns.mT, gains, alpha=-1)
        products.addmm_(torch.cat([gains, changes]).mT, torch.cat([changes, gains]), alpha=-1)
        self._units = self._units[self._left]
        self._hold(inverse.numpy(), products.numpy())

    def _diagonal(self, matrix: np.ndarray) -> Float[np.ndarray, "units m m"]:
        num, m = len(matrix) // self._m, self._m
        return matrix.reshape(num, m, num, m)[np.arange(num), :, np.arange(num)].copy()


def _by_unit(first: np.ndarray, second: np.ndarray) -> Float[np.ndarray, "units m m"]:
    """`A^T B` of the columns A and B that each unit owns in two matrices of m rows."""
    m = len(first)
    first, second = (values.reshape(m, -1, m).swapaxes(0, 1) for values in (first, second))
    # With one column each, a matrix product for each unit would take several times as long.
    found: np.ndarray = first * second if m == 1 else first.swapaxes(1, 2) @ second
    return found


def _blocks(one: Map) -> list[tuple[slice, Elimination]]:
    """A map in blocks of units, each as an elimination of its own."""
    moment, columns, weight, num_units = one
    m = len(columns) // max(num_units, 1)
    num_blocks = min(num_units, math.ceil(len(columns) / _SCORED_AT_ONCE)) or 1
    edges = np.linspace(0, num_units, num_blocks + 1).round().astype(int)
    found = []
    for start, stop in pairwise(edges.tolist()):
        own = slice(start * m, stop * m)
        of_units = moment.of_columns(columns[own]).cpu()
        found.append((slice(start, stop), Elimination(of_units, weight[own].to(of_units), m)))
    return found
