"""Elimination: units are removed from linear maps one by one, the cheapest first, and the others make up for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

RIDGE = 0.01
"""What is added to the diagonal of a second moment, as a share of its mean."""

MOST_COLUMNS = 1024
"""Columns whose second moment is held at once; the units of a wider map are split into blocks without cross terms."""

_PANEL = 64
"""Columns whose removal is put off, so that the large matrices change in few products."""

_APART = 1e-12
"""How much a unit is worth more, in shares of the output's energy, than the one that goes before it."""

Map = tuple[Float[Tensor, "_units _columns _rows"], Float[Tensor, "_all_columns _outputs"]]
"""A linear map that units feed: what they gave it in some rows, and its weights, unit by unit."""


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
    up. A map that gives nothing loses nothing.

    Args:
        maps: at least one, of the same units.

    Returns:
        In [0, number of maps] but for the ridge; NaN where a weight is NaN or infinite.

    Of two units that give the same, the first is free, and the second is then worth both:

    >>> x = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
    >>> energy_shares([(x, torch.ones(3, 1))]).round(2)
    array([0.2, 0. , 0.8])
    """
    num_units = len(maps[0][0])
    by_map = [_blocks(each) for each in maps]
    # Of a map in blocks, the energy is that of all of them.
    energies = [sum(part.energy for _, part in blocks) for blocks in by_map for _ in blocks]
    parts = [each for blocks in by_map for each in blocks]
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


def flops_of(num_units: int, num_columns: int, num_outputs: int, num_rows: int) -> float:
    """FLOPs of the removal of all units from one map: moment, product of the weights, inverse, and all that changes."""
    columns = num_units * num_columns
    block = columns / _num_blocks(num_units, num_columns)
    return columns * block * (2.0 * num_rows + 2.0 * num_outputs + 4.0 * block)


def _num_blocks(num_units: int, num_columns: int) -> int:
    return min(num_units, math.ceil(num_units * num_columns / MOST_COLUMNS)) or 1


class Elimination:
    """Optimal brain surgeon on `y = W^T x` in which each unit owns m rows of W; changes with each removal.

    With `G` the second moment of x and `P = (G + ridge)^-1`, the best that the other units can do for unit j leaves the
    error

        loss_j = trace(W_j^T (P_jj)^-1 W_j)     at     W <- W - P_:j (P_jj)^-1 W_j,

    after which `P <- P - P_:j (P_jj)^-1 P_j:`. Losses of removals one after the other add up to the error of the best
    fit without all of these units. Of W only `M = W W^T` is needed.

    Args:
        moment: G.
        weight: W.
        num_columns: m.

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
        self._own = [self._diagonal(each) for each in (inverse, products)]
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
        gains, columns, changes = (each[:, : self._used] for each in self._panel)
        column = self._inverse[:, own] - gains @ columns[own].T
        products = self._products[:, own] - gains @ changes[own].T - changes @ gains[own].T
        gain = np.linalg.solve(column[own].T, column.T).T
        change = products - 0.5 * gain @ products[own]
        for kept, values in zip(self._panel, (gain, column, change), strict=True):
            kept[:, new] = values
        self._used += m
        own_gain, own_column, own_change = (each.reshape(-1, m, m) for each in (gain, column, change))
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
        gains, columns, changes = (each[:, : self._used] for each in self._panel)
        kept = np.flatnonzero(np.repeat(self._left, self._m))
        both = gains[kept] @ changes[kept].T
        inverse = self._inverse[np.ix_(kept, kept)] - gains[kept] @ columns[kept].T
        products = self._products[np.ix_(kept, kept)] - both - both.T
        self._units = self._units[self._left]
        self._hold(inverse, products)

    def _diagonal(self, matrix: np.ndarray) -> Float64[np.ndarray, "units m m"]:
        """The units' own blocks."""
        num, m = len(matrix) // self._m, self._m
        return matrix.reshape(num, m, num, m)[np.arange(num), :, np.arange(num)].copy()


def _blocks(one: Map) -> list[tuple[slice, Elimination]]:
    """A map in blocks of units, each as an elimination of its own."""
    rows, weight = one
    num_units, m = rows.shape[:2]
    edges = np.linspace(0, num_units, _num_blocks(num_units, m) + 1).round().astype(int)
    found = []
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        moment = moment_of(rows[start:stop])
        found.append((slice(start, stop), Elimination(moment, weight[start * m : stop * m].to(moment), m)))
    return found
