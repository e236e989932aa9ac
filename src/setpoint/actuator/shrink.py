"""Shrink: make a live model and its optimizer state physically smaller, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.cut import Cut, Keep, SizePlace, cut_groups, plan_cut
from setpoint.actuator.cuttable import check_cuttable, check_lengths
from setpoint.actuator.lineage import adopt, note_cut
from setpoint.actuator.optimizer_state import Optimizers, as_sequence, cut_state
from setpoint.actuator.sizes import apply_sizes, check_sizes, record_buffers, record_dense
from setpoint.actuator.swap import swap
from setpoint.actuator.take import take, taken_gradient
from setpoint.errors import GroupError
from setpoint.groups.group import Group
from setpoint.groups.place import call_of, implied, is_call, read_size


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
    groups: tuple[Group, ...],
    keep: Keep,
    copies: Sequence[nn.Module] = (),
    *,
    agreed: Callable[[], None] = lambda: None,
) -> tuple[Group, ...]:
    """As `setpoint.shrink`, for whoever holds the model; `agreed` raises, in time, if another rank failed."""
    cut = plan_cut(groups, keep)
    remaining = cut_groups(groups, keep)
    copied = unwrapped([name for name, _ in cut.entries], model, copies)
    # Copies have no optimizer.
    jobs = [_job(model, cut, as_sequence(optimizer)), *(_job(each, cut, ()) for each in copied)]
    with ExitStack() as undo:
        for job in jobs:
            commit(job, undo)
        # Autocast caches low-precision copies of weights by identity, which stays: inside an autocast region the next
        # forward would get a copy of the old shape.
        torch.clear_autocast_cache()
        agreed()
        undo.pop_all()  # nothing failed: forget the way back
    return remaining


def unwrapped(names: Iterable[str], model: nn.Module, copies: Sequence[nn.Module]) -> list[nn.Module]:
    """Each copy once, out of its wrapper; `names` are tensors of the model that change.

    Raises:
        GroupError: when a copy shares tensors with the model.
    """
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


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by every name it has: a tied tensor is there once per name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return {**tensors, **dict(model.named_buffers(remove_duplicate=False))}


def _prepare(model: nn.Module, cut: Cut, optimizers: Sequence[Optimizer]) -> Iterator[Change]:
    tensors = named_tensors(model)
    if single := [name for name, kept in cut.elements.items() if not kept.all()]:
        raise GroupError(f"the units of {single[0]!r} are single weights, which can be masked but not cut: use mask")
    check_lengths(cut, tensors, type(model).__name__)
    changing = {name: tensors[name] for name in cut.dims()}
    check_cuttable(changing, tensors)
    for name, dims in cut.dims().items():
        tensor = changing[name]
        # A parameter that was never stepped has no state yet.
        held = [each for each in optimizers if isinstance(tensor, nn.Parameter) and tensor in each.state]
        states = tuple((each, cut_state(each, tensor, dims, repr(name))) for each in held)  # type: ignore[arg-type]
        yield Change(name, tensor, take(tensor, dims), states, taken_gradient(tensor, dims))


def _new_sizes(model: nn.Module, cut: Cut) -> dict[SizePlace, int]:
    """The new value of every size that changes, after a check that each place holds the old count."""
    counts = dict(cut.sizes)
    # All sizes of a call go together; what others imply until it is set is set by the first cut that reaches it.
    calls = {call_of(at) for at in cut.following if is_call(at[1]) or implied(at[1]) is not None}
    changing = {at: kept for at, kept in counts.items() if not kept.all() or call_of(at) in calls}
    check_sizes(model, changing)
    for (name, place), kept in changing.items():
        if not is_call(place) and (old := read_size(model.get_submodule(name), place)) != kept.size:
            raise GroupError(
                f"{name}.{place} is {old}, but the groups say {kept.size}: use the groups of this very model, "
                "as the last cut returned them"
            )
    return {at: int(kept.sum()) for at, kept in changing.items()}


def _job(module: nn.Module, cut: Cut, optimizers: Sequence[Optimizer]) -> Job:
    return Job(module, tuple(_prepare(module, cut, optimizers)), _new_sizes(module, cut))


def commit(job: Job, undo: ExitStack) -> None:
    """Put everything new in its place, and note in `undo` how to put everything back; a job is known to fit."""
    before = {change.name: tuple(change.tensor.shape) for change in job.changes}  # which the swaps change
    adopt(job.module, undo)
    record_dense(job.module, before, undo)
    note_cut(job.module, before, {change.name: tuple(change.new.shape) for change in job.changes}, job.sizes, undo)
    for change in job.changes:
        for optimizer, state in change.states:
            undo.callback(optimizer.state.__setitem__, change.tensor, optimizer.state[change.tensor])
            optimizer.state[change.tensor] = state
        swap(change.tensor, change.new, undo)
        change.tensor.grad = change.gradient
    apply_sizes(job.module, job.sizes, undo)
    buffers = [change.name for change in job.changes if not isinstance(change.tensor, nn.Parameter)]
    record_buffers(job.module, [name for name in buffers if not is_persistent(job.module, name)], undo)


def is_persistent(model: nn.Module, buffer: str) -> bool:
    """Whether a buffer is part of the state dict."""
    owner, _, name = buffer.rpartition(".")
    return name not in model.get_submodule(owner)._non_persistent_buffers_set
