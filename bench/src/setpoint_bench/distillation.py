"""Distillation beside a loop: from the first cut on, the model also learns from what it was before."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.loop.hooks import StepHooks
from setpoint.loop.loop import Loop
from setpoint_bench.counter import forward_flops
from setpoint_bench.task import Task, dense_widths

_MEMORY = 0.99
_TEMPERATURE = 2.0
_EVERY = 4
"""The teacher answers in one of so many steps: its passes are dense ones."""


@final
class Distillation:
    """The teacher is an exponential moving average of the dense weights, and stays as it is from the first cut on.

    With scores z of the model and z' of the teacher, T = 2, and `KL` the mean over all targets, the loss of every
    fourth step becomes `(1 - w) loss + w T^2 KL(softmax(z' / T) || softmax(z / T))`: its gradient is given to the
    scores in the backward pass. The teacher's passes are counted.

    Args:
        loop: attached to the model.
        model: the model; it returns scores whose last dim is that of the classes.
        optimizer: trains it.
        task: whose model it is.
        weight: w, in (0, 1).

    References:
        Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015; a moving average as the teacher:
        Tarvainen and Valpola, "Mean teachers are better role models", NIPS 2017.
    """

    seconds = 0.0

    def __init__(self, loop: Loop, model: nn.Module, optimizer: Optimizer, task: Task, weight: float) -> None:
        self.loop, self.model, self.weight = loop, model, weight
        self.dense, self.steps, self.flops = dict(loop.widths), 0, 0.0
        with torch.random.fork_rng(devices=[]):
            self.teacher = task.build(dense_widths(task)).eval().requires_grad_(False)
        self.teacher.load_state_dict(model.state_dict())
        self.pass_flops = float(forward_flops(self.teacher, task.example()))
        self.handle = model.register_forward_hook(lambda *seen: self._teach(*seen))  # a copy of it has no copy of us
        self.hooks = StepHooks((optimizer,), lambda _: None, self._after_step)

    def observe(self, loss: Tensor) -> None:
        """Of no interest here."""

    def remove(self) -> None:
        """Take the hooks away."""
        self.hooks.remove()
        self.handle.remove()

    @torch.no_grad()
    def _after_step(self) -> None:
        self.steps += 1
        if self.loop.widths != self.dense:
            return
        for mean, now in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(now, 1 - _MEMORY)
        for mine, its in zip(self.teacher.buffers(), self.model.buffers(), strict=True):
            mine.copy_(its)

    def _teach(self, model: nn.Module, args: tuple[Any, ...], scores: Tensor) -> None:
        if model is not self.model or not scores.requires_grad:
            return
        if self.loop.widths == self.dense or self.steps % _EVERY:
            return
        with torch.no_grad():
            wanted = torch.softmax(self.teacher(*args).float() / _TEMPERATURE, -1)
        self.flops += self.pass_flops
        got = torch.softmax(scores.detach().float() / _TEMPERATURE, -1)
        pull = self.weight * _TEMPERATURE * (got - wanted) / (scores.numel() / scores.shape[-1])

        def pulled(gradient: Tensor) -> Tensor:
            return (1 - self.weight) * gradient + pull.to(gradient.dtype)

        scores.register_hook(pulled)  # type: ignore[no-untyped-call]
