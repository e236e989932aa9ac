"""A replica: a copy of model and optimizers at widths of its own, on which training steps can be tried."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from setpoint.actuator.shrink import shrink
from setpoint.actuator.tensors import named_tensors
from setpoint.groups.example import Example, inputs_of, mapped, tensors_of
from setpoint.groups.group import Group
from setpoint.groups.model_copy import computed, strip, untouched_attributes


@dataclass(frozen=True, eq=False)
class Replica:
    """A copy in training."""

    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def step(self) -> None:
        """Forward, backward and optimizer step on a loss of its own: the mean square of the outputs.

        The forward runs under the autocast that is active; the rest does not, as in training.
        """
        kind = next((p.device.type for p in self.model.parameters()), "cpu")
        outputs = [out for out in tensors_of(self.model(*self.args, **self.kwargs)) if out.requires_grad]
        with torch.autocast(kind, enabled=False):
            loss = sum(_real(out).square().mean() for out in outputs)
            if isinstance(loss, Tensor):
                loss.backward()  # type: ignore[no-untyped-call]
            del outputs, loss
            for optimizer in self.optimizers:
                optimizer.step()
            for optimizer in self.optimizers:
                optimizer.zero_grad()

    def narrow(self, groups: tuple[Group, ...], widths: Mapping[str, int]) -> tuple[Group, ...]:
        """Cut the groups of this copy to these widths; gives the groups at them."""
        return shrink(self.model, self.optimizers, groups, first(groups, widths))

    def held(self) -> list[Tensor]:
        """Tensors that live between steps: weights, buffers, optimizer state, inputs."""
        state = [dict(optimizer.state) for optimizer in self.optimizers]
        leaves = [*named_tensors(self.model).values(), *pytree.tree_leaves((state, self.args, dict(self.kwargs)))]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _real(out: Tensor) -> Tensor:
    return torch.view_as_real(out) if out.is_complex() else out.float()


def first(groups: tuple[Group, ...], widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The choice that keeps the first units of each group, so many."""
    return {group.name: np.arange(group.num_units) < widths[group.name] for group in groups}


@contextmanager
def replica(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    example: Example,
    groups: tuple[Group, ...],
    widths: Mapping[str, int],
    *,
    data: bool,
) -> Iterator[Replica]:
    """A copy of a model in training, cut to these widths; it has made one step, so its optimizer state exists."""
    with fresh_replica(model, optimizers, example, groups, widths, data=data) as made:
        made.step()
        yield made


@contextmanager
def fresh_replica(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    example: Example,
    groups: tuple[Group, ...],
    widths: Mapping[str, int],
    *,
    data: bool,
) -> Iterator[Replica]:
    """A copy of a model in training, cut to these widths, before its first step; without `data` it has no memory."""
    with ExitStack() as inside:
        mode = None if data else FakeTensorMode(allow_non_fake_inputs=True)
        memo: dict[int, Any] = {key: _copied(tensor, mode) for key, tensor in computed(model).items()}
        states = pytree.tree_leaves([dict(optimizer.state) for optimizer in optimizers])
        for tensor in (*model.parameters(), *model.buffers(), *states):
            if mode is not None and isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _copied(tensor, mode)
        args, kwargs = mapped(lambda tensor: _copied(tensor, mode), inputs_of(example))
        inside.enter_context(untouched_attributes(model))
        inside.enter_context(mode or nullcontext())
        twin, trainers = copy.deepcopy((model, tuple(optimizers)), memo)
        strip(twin)
        if not model.training:
            twin.train()
        made = Replica(twin, trainers, args, kwargs)
        inside.enter_context(torch.enable_grad())
        for trainer in trainers:
            trainer.zero_grad()
        made.narrow(groups, widths)
        yield made


def _copied(tensor: Tensor, mode: FakeTensorMode | None) -> Tensor:
    """A copy of the tensor, without memory of its own in a fake mode."""
    if mode is None:
        return tensor.detach().clone()
    if tensor.numel() == 1 and not tensor.requires_grad:
        number = tensor.item()
        with mode:  # a number that the step may ask for, such as an optimizer's count of steps
            return torch.tensor(number, dtype=tensor.dtype, device=tensor.device).reshape(tensor.shape)
    new = mode.from_tensor(tensor.detach())
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
