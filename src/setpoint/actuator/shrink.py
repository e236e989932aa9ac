"""Shrink: make a live model and its optimizer state physically smaller, all or nothing."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.cut import Cut, Keep, SizePlace, check_cuttable, check_lengths, cut_groups, plan_cut
from setpoint.actuator.in_state_dict import carry_sizes, check_not_attached
from setpoint.actuator.model_shapes import apply_sizes, check_sizes, note_cut
from setpoint.actuator.tensors import Optimizers, as_sequence, cut_state, named_tensors, swap, take, taken_gradient
from setpoint.distributed import check_module
from setpoint.errors import GroupError
from setpoint.groups.group import Group
from setpoint.groups.sizes_in_code.place import call_of, implied, is_call, read_size
from setpoint.messages import a_type

AnyKeep = Bool[np.ndarray, " _units"] | Bool[Tensor, " _units"] | Sequence[bool]


@dataclass(frozen=True, eq=False)
class Change:
    """One tensor, its contents after a cut or regrowth, its state in each optimizer that holds it, and its gradient."""

    name: str
    tensor: Tensor
    new: Tensor
    states: tuple[tuple[Optimizer, dict[str, Any]], ...] = ()
    gradient: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that is to change in one module."""

    module: nn.Module
    changes: tuple[Change, ...]
    sizes: Mapping[SizePlace, int | None]


def shrink(
    model: nn.Module,
    optimizer: Optimizers,
    groups: Sequence[Group],
    keep: Mapping[str, AnyKeep],
    copies: Sequence[nn.Module] = (),
) -> tuple[Group, ...]:
    """Remove the units that `keep` drops from a model in training, and return the groups that remain.

    Parameters and buffers keep their identity, so optimizers, schedulers, clip lists and hooks that hold
    them keep working. Tied parameters stay tied, frozen ones stay frozen, and memory formats stay.
    Optimizer state is cut along with its parameter. Gradients of the changed parameters become None: they
    belong to a step that is done. Cut between `optimizer.step()` and the next `backward()`.

    Everything new is built before anything is changed, so old and new are in memory together. On any
    exception model, optimizers and copies are as they were.

    Args:
        groups: as `find_groups`, or the last cut, returned them.
        keep: by group name, one boolean per active unit, True = stays: an array, a tensor or a list. Groups that lose
            nothing may be absent.
        copies: further modules with the same tensors to cut with it, such as an EMA copy; names may have
            the prefix `"module."` that `torch.optim.swa_utils.AveragedModel` gives them.

    Raises:
        GroupError: when `keep` does not fit the groups, the groups do not fit the model or a copy, or a
            tensor is of a kind that cannot be cut.
        LoopError: when a loop is at work on the model.
        OptimizerError: when an optimizer's state cannot follow.

    >>> import numpy as np
    >>> from setpoint.groups.group import SizeBinding, Slice
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> unit = np.arange(3)
    >>> places = [("0.weight", 0, "produce"), ("0.bias", 0, "carry"), ("2.weight", 1, "consume")]
    >>> slices = tuple(Slice(tensor, dim, role, unit) for tensor, dim, role in places)
    >>> sizes = (SizeBinding("0", "out_features", unit), SizeBinding("2", "in_features", unit))
    >>> hidden = Group("hidden", "unit", 3, slices, sizes)
    >>> (hidden,) = shrink(model, None, (hidden,), {"hidden": np.array([True, False, True])})
    >>> model
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=1, bias=True)
    )
    """
    for module in (model, *copies):
        check_module(module)
    check_not_attached(model)
    if not isinstance(keep, Mapping):
        raise GroupError(f"keep holds booleans by name of the group, got {a_type(keep)}")
    arrays = {
        name: kept.detach().cpu().numpy() if isinstance(kept, Tensor) else np.asarray(kept)
        for name, kept in keep.items()
    }
    remaining = shrink_live(model, optimizer, tuple(groups), arrays, copies)
    for module in (model, *copies):  # only now: a cut that was refused leaves no hooks behind
        carry_sizes(module)
    return remaining


def shrink_live(
    model: nn.Module,
    optimizer: Optimizers,
    groups: tuple[Group, ...],
    keep: Keep,
    copies: Sequence[nn.Module] = (),
    *,
    agreed: Callable[[], None] = lambda: None,
) -> tuple[Group, ...]:
    """`shrink` of a model that a loop is attached to; `agreed` raises, before it lasts, if another rank failed."""
    cut = plan_cut(groups, keep)
    remaining = cut_groups(groups, keep)
    copied = unwrapped([name for name, _ in cut.entries], model, copies)
    # Everything new is built here, while nothing has changed: running out of memory is an error like any other.
    jobs = []
    for module, optimizers in ((model, as_sequence(optimizer)), *((copy, ()) for copy in copied)):
        jobs.append(Job(module, tuple(_changes(module, cut, optimizers)), _new_sizes(module, cut)))
    commit(jobs, agreed)
    return remaining


def unwrapped(names: Iterable[str], model: nn.Module, copies: Sequence[nn.Module]) -> list[nn.Module]:
    """The copies, each once, out of their wrappers, by names of tensors that change; they share none with the model."""
    own = {id(tensor) for tensor in named_tensors(model).values()}
    first = next(iter(names), None)
    found: dict[int, nn.Module] = {}
    for copy in copies:
        tensors = named_tensors(copy)
        if copy is model or any(id(tensor) in own for tensor in tensors.values()):
            raise GroupError("a copy shares tensors with the model itself: pass independent copies only")
        wrapped = first is not None and first not in tensors and f"module.{first}" in tensors
        found[id(copy)] = copy.get_submodule("module") if wrapped else copy
    return list(found.values())


def _changes(model: nn.Module, cut: Cut, optimizers: Sequence[Optimizer]) -> Iterator[Change]:
    tensors = named_tensors(model)
    if single := [name for name, kept in cut.elements.items() if not kept.all()]:
        raise GroupError(f"the units of {single[0]!r} are single weights, which can be masked but not cut: use mask")
    check_lengths(cut, tensors, type(model).__name__)
    changing = {name: tensors[name] for name in cut.dims()}
    check_cuttable(changing, tensors)
    for name, dims in cut.dims().items():
        tensor = changing[name]
        # A parameter that was never stepped has no state yet.
        holders = [optimizer for optimizer in optimizers if tensor in optimizer.state]
        states = tuple((holder, cut_state(holder, tensor, dims, repr(name))) for holder in holders)
        yield Change(name, tensor, take(tensor, dims), states, taken_gradient(tensor, dims))


def _new_sizes(model: nn.Module, cut: Cut) -> dict[SizePlace, int]:
    """The new value of every size that changes, after a check that each place holds the old count."""
    # All sizes of a call go together; what others imply until it is set is set by the first cut that reaches it.
    calls = {call_of(at) for at in cut.following if is_call(at[1]) or implied(at[1]) is not None}
    changing = {at: kept for at, kept in cut.sizes.items() if not kept.all() or call_of(at) in calls}
    check_sizes(model, changing)
    for (name, place), kept in changing.items():
        if not is_call(place) and (old := read_size(model.get_submodule(name), place)) != kept.size:
            raise GroupError(
                f"{name}.{place} is {old}, but the groups say {kept.size}: use the groups of this very model, "
                "as the last cut returned them"
            )
    return {at: int(kept.sum()) for at, kept in changing.items()}


def commit(jobs: Iterable[Job], agreed: Callable[[], None]) -> None:
    """Put everything new in its place, all or nothing; jobs are known to fit, and `agreed` is as in `shrink_live`."""
    with ExitStack() as undo:
        for job in jobs:
            # Before the swaps, since the record takes the present shapes for the dense ones of what was never cut.
            note_cut(job.module, {change.name: tuple(change.new.shape) for change in job.changes}, job.sizes, undo)
            for change in job.changes:
                # `undo` runs last in, first out: the old state comes back to a tensor of its shape.
                for optimizer, state in change.states:
                    undo.callback(optimizer.state.__setitem__, change.tensor, optimizer.state[change.tensor])
                    optimizer.state[change.tensor] = state
                swap(change.tensor, change.new, undo)
                change.tensor.grad = change.gradient
            apply_sizes(job.module, job.sizes, undo)
        # Autocast caches low-precision copies of weights by identity, which stays: inside an autocast region the next
        # forward would get a copy of the old shape.
        torch.clear_autocast_cache()
        agreed()
        undo.pop_all()  # nothing failed: forget the way back
