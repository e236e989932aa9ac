"""Peak memory of one training step, in bytes, as a pure function of widths.

Weights, buffers, gradients, optimizer state, inputs, what autograd saves and what the step makes on
its way, each storage from where it is made to where nothing holds it any more:

    total(widths) = max over moments of the step of the sum of the bytes alive then.

The bytes of a storage are a product of widths, so this is a maximum of sums of products. What kernels allocate inside
themselves is in no storage: on a GPU the allocator's reading has it, and feedback corrects the prediction by that; on
the CPU nothing tells it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from jaxtyping import Float64

from setpoint.groups.group import Size
from setpoint.resources.tape import Tape


class MemoryCost:
    """Peak bytes of one training step."""

    resource: Final = "memory"

    def __init__(self, tape: Tape) -> None:
        monomials: dict[tuple[Size, ...], int] = {}
        factors = np.zeros(len(tape.storages))
        columns = np.zeros(len(tape.storages), dtype=np.int64)
        for number, storage in enumerate(tape.storages):
            variable = tuple(sorted((size for size in storage.sizes if size.parts), key=repr))
            constant = np.prod([size.constant for size in storage.sizes if not size.parts])
            factors[number] = storage.itemsize * float(constant)
            columns[number] = monomials.setdefault(variable, len(monomials))
        self._alive = _undominated(_moments(tape, factors, columns, len(monomials)))
        self._groups = tuple(sorted({name for sizes in monomials for size in sizes for name, _ in size.parts}))
        sizes = list(dict.fromkeys(size for monomial in monomials for size in monomial))
        place = {size: i for i, size in enumerate(sizes)}
        self._constant = np.array([*(size.constant for size in sizes), 1], dtype=np.float64)
        self._per_unit = np.zeros((len(sizes) + 1, len(self._groups)))
        for i, size in enumerate(sizes):
            for name, per_unit in size.parts:
                self._per_unit[i, self._groups.index(name)] += per_unit
        one, longest = len(sizes), max(map(len, monomials), default=0)  # the last size is 1: it fills up short products
        self._index = np.array([[*map(place.get, m), *[one] * (longest - len(m))] for m in monomials], dtype=np.int64)

    def total(self, widths: Mapping[str, int]) -> float:
        """Peak bytes at these widths."""
        sizes = self._constant + self._per_unit @ np.array([widths[name] for name in self._groups], dtype=np.float64)
        return float((self._alive @ sizes[self._index].prod(axis=1)).max())

    def saving(self, widths: Mapping[str, int], group: str, num_units: int) -> float:
        """`total(widths) - total(widths with num_units fewer units in group)`."""
        if group not in self._groups:
            return 0.0
        return self.total(widths) - self.total({**widths, group: widths[group] - num_units})


def _moments(
    tape: Tape, factors: Float64[np.ndarray, " storages"], columns: np.ndarray, num_monomials: int
) -> Float64[np.ndarray, "moments monomials"]:
    """Coefficient of each monomial in the bytes alive, at every moment after which something goes."""
    alive, rows, rising = np.zeros(num_monomials), [], False
    for storage, made in tape.events:
        if not made and rising:
            rows.append(alive.copy())
        alive[columns[storage]] += factors[storage] if made else -factors[storage]
        rising = made
    rows.append(alive)
    return np.unique(np.array(rows), axis=0)


def _undominated(rows: Float64[np.ndarray, "moments monomials"]) -> Float64[np.ndarray, "kept monomials"]:
    """The rows that no other row exceeds in every entry: only they can be the maximum."""
    order = np.argsort(-rows.sum(axis=1), kind="stable")
    kept: list[np.ndarray] = []
    for row in rows[order]:
        if not kept or not (np.array(kept) >= row).all(axis=1).any():
            kept.append(row)
    return np.array(kept)
