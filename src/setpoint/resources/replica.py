"""A replica: a copy of model and optimizers at widths of its own, on which training steps and passes can be tried."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
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
from setpoint.groups.model_copy import computed, strip, untouched_attributes


class Replica:
    """A copy in training, or one that only answers, at the widths of its groups. It changes by `narrow`.

    Args:
        steps: the widths of each step that it makes are added here.
        trains: whether a step is one of training, else a forward pass without autograd.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: tuple[Optimizer, ...],
        inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
        groups: tuple[Group, ...],
        steps: list[dict[str, int]],
        trains: bool,
    ) -> None:
        self.model, self.optimizers, self.inputs = model, optimizers, inputs
        self.groups, self._steps, self._trains = groups, steps, trains

    def step(self) -> None:
        """Forward, backward and optimizer step on a loss of its own, the mean square of the outputs; or a pass.

        The forward runs under the autocast that is active; the rest does not, as in training.
        """
        self._steps.append(widths_of(self.groups))
        args, kwargs = self.inputs
        if not self._trains:
            forward_pass(self.model, args, kwargs, active_autocast(self.model))
            return
        outputs = [out for out in tensors_of(self.model(*args, **kwargs)) if out.requires_grad]
        with torch.autocast(device_type_of(self.model), enabled=False):
            loss = sum(_real(out).square().mean() for out in outputs)
            if isinstance(loss, Tensor):
                loss.backward()  # type: ignore[no-untyped-call]
            del outputs, loss  # or they would hold memory while the optimizers step
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
    """Weights, buffers, optimizer state and inputs."""
    state = [dict(optimizer.state) for optimizer in optimizers]
    leaves = [*named_tensors(model).values(), *pytree.tree_leaves((state, inputs))]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def device_type_of(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def active_autocast(model: nn.Module) -> torch.dtype | None:
    """The type of numbers that autocast casts to now; None where it is off."""
    kind = device_type_of(model)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def forward_pass(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], autocast: torch.dtype | None
) -> None:
    # Without a cache: weights that autocast keeps from here would have no gradient in a step of training.
    casting = torch.autocast(device_type_of(model), dtype=autocast, enabled=autocast is not None, cache_enabled=False)
    with torch.no_grad(), casting:
        model(*args, **kwargs)


def _real(out: Tensor) -> Tensor:
    return torch.view_as_real(out) if out.is_complex() else out.float()


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

    Args:
        steps: the widths of each step that the copy makes are added here, if it has data.
        data: whether its tensors have memory; without, a step computes nothing.
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
        if trains and not model.training:
            twin.train()
        for module in twin.modules() if not trains else ():
            module.training = False  # not by `eval`, which a model may override to fold weights together
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
