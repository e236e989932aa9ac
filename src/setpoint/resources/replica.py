"""Trials of the model: steps and passes of a copy at widths of its own, and timed passes of the model itself."""

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
from setpoint.cost.cost import Cost
from setpoint.groups.example import Example, inputs_of, mapped, tensors_of
from setpoint.groups.group import Group, widths_of
from setpoint.groups.untouched import computed, preserved_rng_state, strip, untouched_attributes, without_users_hooks
from setpoint.spending.meter import Stopwatch

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]

_LEAST_PASSES, _MOST_PASSES, _ENOUGH_S = 5, 30, 0.2


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
        if not self.trains:
            _forward_pass(self.model, self.inputs, _active_autocast(self.model))
            return
        args, kwargs = self.inputs
        outputs = [out for out in tensors_of(self.model(*args, **kwargs)) if out.requires_grad]
        with torch.autocast(_device_type_of(self.model), enabled=False):
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


def _device_type_of(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def _active_autocast(model: nn.Module) -> torch.dtype | None:
    """What autocast casts to now; None where it is off."""
    kind = _device_type_of(model)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _forward_pass(model: nn.Module, inputs: Inputs, autocast: torch.dtype | None) -> None:
    args, kwargs = inputs
    # Without a cache: weights that autocast keeps from here would have no gradient in a step of training.
    casting = torch.autocast(_device_type_of(model), dtype=autocast, enabled=autocast is not None, cache_enabled=False)
    with torch.no_grad(), casting:
        model(*args, **kwargs)


def _answering(model: nn.Module) -> None:
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
            _answering(twin)
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


class Inference:
    """Forward passes of the model itself on an example, of so many FLOPs, under the autocast that is active now."""

    def __init__(self, model: nn.Module, example: Example, flops: Cost) -> None:
        self.flops = flops
        self._model, self._inputs, self._autocast = model, inputs_of(example), _active_autocast(model)

    def timed(self) -> tuple[list[float], int]:
        """Seconds of several passes in eval mode, without a first that is not counted; and the number of all.

        All of the model and of chance is as before, and the user's hooks are not called.
        """
        watch, times = Stopwatch(synchronize=True), list[float]()
        with ExitStack() as after:
            for untouched in (preserved_rng_state, _untouched_buffers, untouched_attributes, without_users_hooks):
                after.enter_context(untouched(self._model))
            _answering(self._model)
            _forward_pass(self._model, self._inputs, self._autocast)
            while len(times) < _MOST_PASSES and (len(times) < _LEAST_PASSES or watch.seconds < _ENOUGH_S):
                with watch:
                    _forward_pass(self._model, self._inputs, self._autocast)
                times.append(watch.last_seconds)
        return [seconds for seconds in times if seconds > 0], 1 + len(times)  # a coarse clock may stand still


@contextmanager
def _untouched_buffers(model: nn.Module) -> Iterator[None]:
    named = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    kept = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    try:
        yield
    finally:
        for buffers, before in named:
            buffers.clear()
            buffers.update(before)
        with torch.no_grad():
            for buffer, version, value in kept:
                if buffer._version != version:
                    buffer.copy_(value)
