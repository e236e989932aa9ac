"""Bytes: the live tensors of a piece of code, each storage of a training step, and its peak as a function of widths."""

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from setpoint.controller.selection import lowest_width
from setpoint.cost.cost import Term
from setpoint.errors import CostError, SetpointError
from setpoint.groups.group import Group, Size, on_grid
from setpoint.groups.untouched import gc_paused
from setpoint.groups.walk import op_name
from setpoint.messages import progress

Make = Callable[..., AbstractContextManager[Any]]  # a copy at widths; by data=False its tensors have no memory

_MAX_VECTORS = 16  # at which a step is recorded


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes in the tensors that are alive while it is active, and their peak.

    Every storage that an operation makes counts until nothing holds it any more, those that autograd saves included.
    What kernels allocate inside themselves does not show. Of a storage that was there before, as behind a batch that is
    a slice of all data, only what the first view of it covers counts, or what the tensors `held` from the beginning do.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = self._num_made = 0
        # By address: what tells that it is gone, its number, and its bytes that count and that do not.
        self._storages: dict[int, tuple[weakref.ref[Any], int, int, int]] = {}
        for tensor in held:
            self._cover(tensor)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):  # also of an operation in place, which may have grown its storage
            key = _storage_of(leaf)
            if key is None:
                continue
            if key in self._storages:
                hidden = self._storages[key][3]
                self._count(key, max(0, leaf.untyped_storage().nbytes() - hidden), hidden)
            elif any(_storage_of(argument) == key for argument in tree_leaves((args, kwargs))):
                self._cover(leaf)
            else:
                self._add(leaf, key)
                self._count(key, leaf.untyped_storage().nbytes(), 0)
        return result

    def made(self, number: int, tensor: Tensor) -> None:
        """Called when a storage is made for a tensor; storages are numbered in order."""

    def gone(self, number: int) -> None: ...

    def _cover(self, tensor: Tensor) -> None:
        """Count only what a tensor covers of its storage."""
        key = _storage_of(tensor)
        if key is None:
            return
        if key not in self._storages:
            self._add(tensor, key)
        size = tensor.untyped_storage().nbytes()
        covered = min(size, self._storages[key][2] + tensor.numel() * tensor.element_size())
        self._count(key, covered, size - covered)

    def _add(self, tensor: Tensor, key: int) -> None:
        self._num_made += 1
        reference = weakref.ref(tensor.untyped_storage(), partial(self._remove, key))
        self._storages[key] = (reference, self._num_made, 0, 0)
        self.made(self._num_made, tensor)

    def _count(self, key: int, counted: int, hidden: int) -> None:
        reference, number, before, _ = self._storages[key]
        self._storages[key] = (reference, number, counted, hidden)
        self.live_bytes += counted - before
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _remove(self, key: int, _: Any) -> None:
        _, number, counted, _ = self._storages.pop(key)
        self.live_bytes -= counted
        self.gone(number)


def _storage_of(value: Any) -> int | None:
    strided = isinstance(value, Tensor) and value.layout == torch.strided
    return value.untyped_storage()._cdata if strided else None


class Take(LiveBytes):  # type: ignore[no-untyped-call]
    """A step at one width vector. One mode counts and records, since a mode costs more than what it notes."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        self.calls = list[tuple[Any, tuple[int, ...]]]()  # operations; of a concatenation the lengths of its pieces
        self.storages = list[tuple[int, tuple[int, ...], int]]()  # bytes; shape and item size of its first tensor
        self.events = list[tuple[int, bool]]()  # in order, the number of a storage, and whether it is made
        self._ended = False
        super().__init__(held)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        # These look at tensors without computing, and how often they are called may differ from step to step.
        if func.namespace not in ("prim", "profiler"):
            self.calls.append((func, _pieces(args, kwargs or {}) if op_name(func) == "cat" else ()))
        return result

    def __exit__(self, *ending: Any) -> None:
        self._ended = True  # what is collected from here on is up to the collector
        super().__exit__(*ending)  # type: ignore[no-untyped-call]

    def made(self, number: int, tensor: Tensor) -> None:
        self.events.append((number - 1, True))
        shape = tuple(map(int, tensor.shape))
        self.storages.append((tensor.untyped_storage().nbytes(), shape, tensor.dtype.itemsize))

    def gone(self, number: int) -> None:
        if not self._ended:
            self.events.append((number - 1, False))


def _pieces(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    num_dims = max(tensor.dim() for tensor in args[0])
    # PyTorch also takes an empty tensor of one dim, whatever the others have: an empty cache of keys is one.
    return tuple(int(tensor.shape[dim]) for tensor in args[0] if tensor.dim() == num_dims)


def taken(step: Callable[[], None], held: Iterable[Tensor]) -> Take:
    torch.clear_autocast_cache()  # a step casts each weight once
    # What the collector frees in the middle of a step would be an event of this width vector only.
    take = Take(held)
    with gc_paused(), take:
        step()
    return take


# Which function of widths a number is, found from its values at several width vectors.


def trial_widths(groups: Sequence[Group], seed: int = 0) -> list[dict[str, int]]:
    """As many random width vectors as it takes for no two groups to change in proportion.

    Each group is cut that can be, in the first vector by one block: `nn.MultiheadAttention` takes another way through
    PyTorch once it is cut.
    """
    generator = np.random.default_rng(seed)
    reach = {group.name: _reach(group) for group in groups}
    reach = {name: widths[1:] if len(widths) > 2 else widths for name, widths in reach.items()}
    vectors = [{name: widths[0] for name, widths in reach.items()}]
    while len(vectors) < 4 or (len(vectors) < _MAX_VECTORS and not _told_apart(reach, vectors)):
        vectors.append({name: int(generator.choice(widths)) for name, widths in reach.items()})
    return vectors


def falling_widths(groups: Sequence[Group]) -> list[dict[str, int]]:
    """Width vectors at which steps take very different times: dense, then ever narrower, down to the fewest units."""
    vectors = [
        {group.name: _nearest(group, share * group.num_units) for group in groups} for share in (1.0, 0.75, 0.5, 0.25)
    ]
    return [*vectors, {group.name: lowest_width(group) for group in groups}]


def spread_widths(groups: Sequence[Group], count: int, seed: int = 0) -> list[dict[str, int]]:
    """As many random width vectors from a tenth of the dense widths up; the first ones lie far from each other."""
    generator = np.random.default_rng(seed)
    vectors = []
    for number in range(count):
        share = 0.15 + 0.85 * ((number + 1) * 0.618034 % 1)  # multiples of the golden ratio fill the interval evenly
        own = np.clip(share * generator.uniform(0.6, 1.4, len(groups)), 0.1, 1.0)
        wanted = zip(groups, own, strict=True)
        vectors.append({group.name: _nearest(group, part * group.num_units) for group, part in wanted})
    return vectors


def beside_grid(groups: Sequence[Group], grid: int) -> tuple[dict[str, int], dict[str, int]]:
    """About half of each dense width, on a grid, and one unit more; that of heads, and of what can't be both, stays."""
    half = {group.name: group.num_units // 2 // grid * grid for group in groups}
    stays = {group.name: group.num_units for group in groups if group.only_blocks or on_grid([group], grid) == (group,)}
    return half | stays, {name: width + 1 for name, width in half.items()} | stays


def _nearest(group: Group, wanted: float) -> int:
    return min(_reach(group), key=lambda width: abs(width - wanted))


def _reach(group: Group) -> list[int]:
    """Widths that whole blocks reach, at least 2 where that is possible, or as it is.

    At a width of 1 a dim passes by broadcasting, and modules take other ways, as one key/value head of two does. So a
    group of two units saves nothing by prediction, and meters see what it does save.
    """
    block, floor = group.multiple_of, max(group.min_units, 1)
    widths = [group.num_units, *range((group.num_units - 1) // block * block, floor - 1, -block)]
    return [width for width in widths if width > 1] or widths


def _told_apart(reach: Mapping[str, Sequence[int]], vectors: Sequence[Mapping[str, int]]) -> bool:
    """Whether each group that can change does so, and no two in proportion."""
    movable = [_direction([vector[name] for vector in vectors])[0] for name, found in reach.items() if len(found) > 1]
    return all(map(any, movable)) and len(set(movable)) == len(movable)


def _direction(values: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """How the values change from the first one on: a primitive vector, and its factor."""
    changes = [value - values[0] for value in values[1:]]
    factor = math.gcd(*changes) or 1
    leading = next((change for change in changes if change), 1)
    factor = factor if leading > 0 else -factor
    return tuple(change // factor for change in changes), factor


class Lengths:
    """Finds the `Size` behind a number that was seen at several width vectors.

    A number that changes in proportion to the width of one group follows that group, `constant + per_unit * width`.
    Sums over several groups are learnt where they are made, by `learn`.
    """

    def __init__(self, vectors: Sequence[Mapping[str, int]]) -> None:
        self._vectors = vectors
        self._known: dict[tuple[int, ...], Size | None] = {}
        self._by_direction: dict[tuple[int, ...], tuple[str, int, int]] = {}
        for name, width in vectors[0].items():
            direction, factor = _direction([vector[name] for vector in vectors])
            self._by_direction.setdefault(direction, (name, factor, width))

    def size(self, values: tuple[int, ...]) -> Size | None:
        """The size with these values at the vectors, or None if it is of no known form."""
        if values not in self._known:
            self._known[values] = self._find(values)
        return self._known[values]

    def learn(self, pieces: Sequence[Size]) -> None:
        """A length that is the sum of these may occur from here on."""
        parts: dict[str, int] = {}
        for piece in pieces:
            for name, per_unit in piece.parts:
                parts[name] = parts.get(name, 0) + per_unit
        total = Size(sum(piece.constant for piece in pieces), tuple(sorted(parts.items())))
        values = tuple(total.at(vector) for vector in self._vectors)
        known = self.size(values)
        if known is None:
            self._known[values] = total
        elif known != total:
            raise CostError(f"the trial widths do not tell {total} from {known}")

    def _find(self, values: tuple[int, ...]) -> Size | None:
        if len(set(values)) == 1:
            return Size(values[0])
        direction, factor = _direction(values)
        name, of_group, width = self._by_direction.get(direction, ("", 1, 0))
        per_unit, left = divmod(factor, of_group)
        if not name or left or per_unit <= 0:
            return None
        return Size(values[0] - per_unit * width, ((name, per_unit),))


@dataclass(frozen=True, eq=False)
class Tape:
    """The bytes of each storage of one step, those that live between steps first, and the events of a `Take`."""

    storages: tuple[Term, ...]
    events: tuple[tuple[int, bool], ...]


def solved(takes: Sequence[Take], vectors: Sequence[Mapping[str, int]]) -> Tape:
    """The step at any widths, from steps at several vectors of them (`trial_widths`)."""
    first = takes[0]
    functions = [func for func, _ in first.calls]
    for vector, take in zip(vectors[1:], takes[1:], strict=True):
        if [func for func, _ in take.calls] != functions or take.events != first.events:
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


def _storage(lengths: Lengths, seen: Sequence[tuple[int, tuple[int, ...], int]]) -> Term:
    """A storage made for a whole tensor follows that tensor's shape; any other follows widths by its length."""
    if all(math.prod(shape) * itemsize == num_bytes for num_bytes, shape, itemsize in seen):
        sizes = zip(*(shape for _, shape, _ in seen), strict=True)
        return Term(seen[0][2], tuple(_size(lengths, values) for values in sizes))
    return Term(1, (_size(lengths, [num_bytes for num_bytes, _, _ in seen]),))


def _size(lengths: Lengths, values: Sequence[int]) -> Size:
    found = lengths.size(tuple(values))
    if found is None:
        raise CostError(
            f"a size follows the widths of several groups in a way that is not known ({list(values)}): "
            "hold the model to a budget of 'flops' or 'params'"
        )
    return found


def record(make: Make, groups: tuple[Group, ...]) -> Tape:
    """The step as a function of widths, of copies with data, or without where memory has no room for those."""
    vectors = trial_widths(groups)
    try:
        with progress("recording a step"):
            with suppress(Exception):  # an error that is kept would keep the copy's memory
                return _recorded(make, vectors, data=True)
            return _recorded(make, vectors, data=False)
    except SetpointError:
        raise
    except Exception as error:
        raise CostError(
            f"a step cannot be recorded on copies of the model ({type(error).__name__}: {error}): "
            "hold the model to a budget of 'flops' or 'params'"
        ) from error


def _recorded(make: Make, vectors: Sequence[Mapping[str, int]], *, data: bool) -> Tape:
    takes = []
    for widths in vectors:
        with make(widths, data=data) as copy:
            takes.append(taken(copy.step, copy.held()))
    return solved(takes, vectors)


class MemoryCost:
    """Peak bytes of one training step, as a pure function of widths.

    Weights, buffers, gradients, optimizer state, inputs, what autograd saves and what the step makes on its way count,
    each storage from where it is made to where nothing holds it any more:

        total(widths) = max over moments of the step of the sum of the bytes alive then.

    The bytes of a storage are a product of widths, so this is a maximum of sums of products. What kernels allocate
    inside themselves is in no storage: on a GPU feedback from the allocator corrects the prediction by that.
    """

    resource: Final = "memory"

    def __init__(self, tape: Tape) -> None:
        monomials = dict[tuple[Size, ...], int]()
        weighed = list[tuple[int, float]]()  # of each storage, the number of its monomial and what that is times
        for term in tape.storages:
            variable = tuple(sorted((size for size in term.sizes if size.parts), key=repr))
            constant = math.prod(size.constant for size in term.sizes if not size.parts)
            weighed.append((monomials.setdefault(variable, len(monomials)), term.coefficient * constant))
        self._alive = _undominated(_moments(tape.events, weighed, len(monomials)))
        one = Size(1)  # it fills up short products
        sizes = list(dict.fromkeys([*(size for monomial in monomials for size in monomial), one]))
        self._groups = tuple(sorted({name for size in sizes for name, _ in size.parts}))
        self._constant = np.array([size.constant for size in sizes], dtype=np.float64)
        per_unit = [[sum(n for part, n in size.parts if part == name) for name in self._groups] for size in sizes]
        self._per_unit = np.array(per_unit, dtype=np.float64)
        longest = max(map(len, monomials), default=0)
        rows = [[*monomial, *[one] * (longest - len(monomial))] for monomial in monomials]
        self._index = np.array([[sizes.index(size) for size in row] for row in rows], dtype=np.int64)

    def total(self, widths: Mapping[str, int]) -> float:
        sizes = self._constant + self._per_unit @ np.array([widths[name] for name in self._groups], dtype=np.float64)
        return float((self._alive @ sizes[self._index].prod(axis=1)).max())

    def saving(self, widths: Mapping[str, int], group: str, num_units: int) -> float:
        if group not in self._groups:
            return 0.0
        return self.total(widths) - self.total({**widths, group: widths[group] - num_units})


def _moments(
    events: Sequence[tuple[int, bool]], weighed: Sequence[tuple[int, float]], num_monomials: int
) -> Float64[np.ndarray, "moments monomials"]:
    """Coefficient of each monomial in the bytes alive, at every moment after which something goes."""
    alive, rows, rising = np.zeros(num_monomials), [], False
    for storage, made in events:
        if not made and rising:
            rows.append(alive.copy())
        monomial, weight = weighed[storage]
        alive[monomial] += weight if made else -weight
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
