"""Trials of the model: steps and passes of a copy at widths of its own."""

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
from setpoint.groups.group import Group, widths_of
from setpoint.groups.untouched import computed, strip, untouched_attributes

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(eq=False)
class Replica:
    """A copy in training, or one that only answers, at the widths of its groups. It changes by `narrow`."""

    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    inputs: Inputs
    groups: tuple[Group, ...]
    steps: list[dict[str, int]]  # the widths of each step that it makes are added here
    trains: bool  # whether a step is one of training, else a forward pass without autograd

    def step(self) -> None:
        """Forward, backward and optimizer step on a loss of its own, the mean square of the outputs; or a pass.

        The forward runs under the autocast that is active; the rest does not, as in training.
        """
        self.steps.append(widths_of(self.groups))
        args, kwargs = self.inputs
        if not self.trains:
            with torch.no_grad():
                self.model(*args, **kwargs)
            return
        outputs = [out for out in tensors_of(self.model(*args, **kwargs)) if out.requires_grad]
        with torch.autocast(device_type_of(self.model), enabled=False):
            real = [torch.view_as_real(out) if out.is_complex() else out.float() for out in outputs]
            loss = sum(out.square().mean() for out in real)
            if isinstance(loss, Tensor):
                loss.backward()  # type: ignore[no-untyped-call]
            del outputs, real, loss  # or they would hold memory while the optimizers step
            for optimizer in self.optimizers:
                optimizer.step()
            for optimizer in self.optimizers:
                optimizer.zero_grad()

    def narrow(self, widths: Mapping[str, int]) -> None:
        """Cut the copy to these widths, which are nowhere wider; the first units of each group stay."""
        keep = {group.name: np.arange(group.num_units) < widths[group.name] for group in self.groups}
        self.groups = shrink(self.model, self.optimizers, self.groups, keep)

    def held(self) -> list[Tensor]:
        return held_tensors(self.model, self.optimizers, self.inputs)


def held_tensors(model: nn.Module, optimizers: Sequence[Optimizer], inputs: Any) -> list[Tensor]:
    """What lives between steps: weights, buffers, optimizer state and inputs."""
    state = [dict(optimizer.state) for optimizer in optimizers]
    leaves = [*named_tensors(model).values(), *pytree.tree_leaves((state, inputs))]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def device_type_of(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def set_eval(model: nn.Module) -> None:
    """Put modules in eval mode; not by `eval`, which a model may override to fold weights together."""
    for module in model.modules():
        module.training = False


@contextmanager
def replica(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    example: Example,
    groups: tuple[Group, ...],
    steps: list[dict[str, int]],
    widths: Mapping[str, int],
    *,
    data: bool,
    trains: bool = True,
) -> Iterator[Replica]:
    """A copy of a model, cut to these widths; one in training has made a step, so its optimizer state exists.

    Without `data` its tensors have no memory, a step computes nothing, and is not added to `steps`.
    """
    with ExitStack() as inside:
        mode = None if data else FakeTensorMode(allow_non_fake_inputs=True)
        memo: dict[int, Any] = {key: _copied(tensor, mode) for key, tensor in computed(model).items()}
        states = pytree.tree_leaves([dict(optimizer.state) for optimizer in optimizers])
        for tensor in (*model.parameters(), *model.buffers(), *states):
            if mode is not None and isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _copied(tensor, mode)
        inputs = mapped(lambda tensor: _copied(tensor, mode), inputs_of(example))
        inside.enter_context(untouched_attributes(model))
        inside.enter_context(mode or nullcontext())
        twin, trainers = copy.deepcopy((model, tuple(optimizers)), memo)
        strip(twin)  # a user's hook would count or log what is only tried
        if not trains:
            set_eval(twin)
        elif not model.training:
            twin.train()
        inside.enter_context(torch.enable_grad())
        for trainer in trainers:
            trainer.zero_grad()
        made = Replica(twin, trainers, inputs, groups, steps if data else [], trains)
        made.narrow(widths)
        if trains:
            made.step()  # an optimizer makes its state in its first step, which is like no other
        yield made


def _copied(tensor: Tensor, mode: FakeTensorMode | None) -> Tensor:
    if mode is None:
        return tensor.detach().clone()
    if tensor.numel() == 1 and not tensor.requires_grad:
        number = tensor.item()
        with mode:  # a number that the step may ask for, such as an optimizer's count of steps
            return torch.tensor(number, dtype=tensor.dtype, device=tensor.device).reshape(tensor.shape)
    new = mode.from_tensor(tensor.detach())
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
