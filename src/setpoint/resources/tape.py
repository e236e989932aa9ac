"""A tape: every storage of one training step, from where it is made to where it goes; and the peak of its bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from setpoint.cost.cost import ProductCost, Term
from setpoint.errors import CostError
from setpoint.groups.group import Size
from setpoint.groups.rng import gc_paused
from setpoint.groups.walk import op_name
from setpoint.resources.lengths import Lengths
from setpoint.resources.live_bytes import LiveBytes, Noted


class Trainee(Protocol):
    """A model that can make one more step, or pass; `held` are the tensors that live between steps."""

    def step(self) -> None: ...

    def held(self) -> Sequence[Tensor]: ...


@dataclass(frozen=True)
class Storage:
    """A piece of memory of `itemsize * prod(sizes)` bytes."""

    itemsize: int
    sizes: tuple[Size, ...]


@dataclass(frozen=True, eq=False)
class Tape:
    """The storages of one step, those that live between steps first, and its events in order: (storage, made)."""

    storages: tuple[Storage, ...]
    events: tuple[tuple[int, bool], ...]

    def moved_bytes(self) -> ProductCost:
        """Bytes that the step has to write: those of all its storages."""
        return ProductCost("bytes", tuple(Term(storage.itemsize, storage.sizes) for storage in self.storages))


@dataclass(frozen=True)
class Made:
    """A storage at one width vector, and the shape of the tensor that it was made for."""

    num_bytes: int
    shape: tuple[int, ...]
    itemsize: int


@dataclass(frozen=True)
class Take:
    """A step at one width vector.

    Args:
        calls: each operation, and of a concatenation the lengths of its pieces.
    """

    calls: list[tuple[Any, tuple[int, ...]]]
    storages: list[Made]
    events: list[tuple[int, bool]]


class _Calls(LiveBytes):  # type: ignore[no-untyped-call]
    """Notes calls, too: one mode for both, since a mode costs more than what it notes."""

    def __init__(self, held: Iterable[Tensor], noted: Noted, calls: list[tuple[Any, tuple[int, ...]]]) -> None:
        super().__init__(held, noted)
        self._calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        # These look at tensors without computing, and how often they are called may differ from step to step.
        if func.namespace not in ("prim", "profiler"):
            pieces = _pieces(args, kwargs or {}) if op_name(func) == "cat" else ()
            self._calls.append((func, pieces))
        return result


def _pieces(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Lengths that a concatenation adds up."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    num_dims = max(tensor.dim() for tensor in args[0])
    # PyTorch also takes an empty tensor of one dim, whatever the others have: an empty cache of keys is one.
    return tuple(int(tensor.shape[dim]) for tensor in args[0] if tensor.dim() == num_dims)


def taken(trainee: Trainee) -> Take:
    take = Take([], [], [])

    def noted(what: str, number: int, tensor: Tensor | None) -> None:
        take.events.append((number - 1, what == "made"))
        if tensor is not None:
            shape = tuple(map(int, tensor.shape))
            take.storages.append(Made(tensor.untyped_storage().nbytes(), shape, tensor.dtype.itemsize))

    held = trainee.held()  # asked outside of the mode, which would take it for a part of the step
    torch.clear_autocast_cache()  # a step casts each weight once
    # What the collector frees in the middle of a step would be an event of this width vector only.
    with gc_paused(), _Calls(held, noted, take.calls):
        trainee.step()
    return take


def solved(takes: Sequence[Take], vectors: Sequence[Mapping[str, int]]) -> Tape:
    """The step at any widths, from steps at several vectors of them (`trial_widths`)."""
    first = takes[0]
    for vector, take in zip(vectors[1:], takes[1:], strict=True):
        same = [func for func, _ in take.calls] == [func for func, _ in first.calls]
        if not same or take.events != first.events:
            single = [name for name, width in vector.items() if width == 1 < vectors[0][name]]
            out = f", or leave out by `groups=` what becomes a single unit ({', '.join(single)})" if single else ""
            raise CostError(
                f"the training step makes other operations at widths {dict(vector)} than at wider ones, so its cost is "
                f"no function of widths: hold it to a budget of 'flops' or 'params'{out}"
            )
    lengths = Lengths(vectors)
    for calls in zip(*(take.calls for take in takes), strict=True):
        pieces = zip(*(lengths_added for _, lengths_added in calls), strict=True)
        lengths.learn([_size(lengths, piece) for piece in pieces])
    storages = zip(*(take.storages for take in takes), strict=True)
    return Tape(tuple(_storage(lengths, seen) for seen in storages), tuple(first.events))


def _storage(lengths: Lengths, seen: Sequence[Made]) -> Storage:
    """A storage made for a whole tensor follows that tensor's shape; any other follows widths by its length."""
    if all(math.prod(made.shape) * made.itemsize == made.num_bytes for made in seen):
        sizes = zip(*(made.shape for made in seen), strict=True)
        return Storage(seen[0].itemsize, tuple(_size(lengths, values) for values in sizes))
    return Storage(1, (_size(lengths, [made.num_bytes for made in seen]),))


def _size(lengths: Lengths, values: Sequence[int]) -> Size:
    found = lengths.size(tuple(values))
    if found is None:
        raise CostError(
            f"a size follows the widths of several groups in a way that is not known ({list(values)}): "
            "hold the model to a budget of 'flops' or 'params'"
        )
    return found


class MemoryCost:
    """Peak bytes of one training step, as a pure function of widths.

    Weights, buffers, gradients, optimizer state, inputs, what autograd saves and what the step makes on its way count,
    each storage from where it is made to where nothing holds it any more:

        total(widths) = max over moments of the step of the sum of the bytes alive then.

    The bytes of a storage are a product of widths, so this is a maximum of sums of products. What kernels allocate
    inside themselves is in no storage: on a GPU feedback from the allocator corrects the prediction by that; on the CPU
    nothing shows it.
    """

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
