"""Gating beside a loop: hard concrete gates on all units, trained with the weights until the loop cuts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.cost.cost import ProductCost
from setpoint.groups.group import Group
from setpoint.loop.hooks import StepHooks
from setpoint.loop.loop import Loop
from setpoint.spending.seconds import Stopwatch
from setpoint_bench.baselines.expected_cost import expected_cost
from setpoint_bench.baselines.gated_weights import GatedWeight, Held, gateable, gated_weights
from setpoint_bench.baselines.hard_concrete import FARTHEST, drawn, logit_of, probability_above, settled
from setpoint_bench.baselines.lagrangian import Lagrangian

_FLOPS_PER_WEIGHT = 4.0
"""The weight times its gate, the gradients of both, and the sum of the latter by unit."""


@final
class Gating:
    """Multiplies all weights that read a unit by the unit's gate; changes the model between forward pass and step.

    A gate on a unit's output is, for whatever reads the unit, a gate on the weights that read it:
    `W (z * h) = (W z) h`. So before each forward pass weights are multiplied in place by gates drawn anew, one draw for
    the whole batch, and before the optimizer's step they are put back, with their gradients by the chain rule:
    `dL/dw = z dL/d(wz)` and `dL/dz = sum over the unit's weights of w dL/d(wz)`. The model's code does not matter, and
    no module is replaced. Outside of training gates have their settled values, and weights are back after the forward
    pass.

    The gates' logits are trained on `loss + l1 (c - t) + l2 (c - t)^2` with c the expected FLOPs at the probabilities
    that units are there, as a share of dense, and t a target that falls in a straight line from what is expected at the
    start to the budget, and stays there. When the loop's controller is due, settled gates are multiplied into the
    weights for good, which changes nothing in what the gated model computes, and the loop cuts the units least likely
    to be there.

    Args:
        model: whose units are gated. One forward pass makes a step.
        optimizer: trains it.
        ramp: share of the gates' steps in which the target comes down.
        reach: how far logits and multipliers can go in all: their learning rate x the gates' steps, by Adam.
        start: probability with which a unit is there at the start.

    References:
        Louizos, Welling, Kingma: "Learning sparse neural networks through L0 regularization", ICLR 2018. Wang,
        Wohlwend, Lei: "Structured pruning of large language models", EMNLP 2020. Xia, Zhong, Chen: "Structured pruning
        learns compact and accurate models", ACL 2022.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, ramp: float, reach: float, start: float) -> None:
        self.model, self.ramp, self.reach, self.start_probability = model, ramp, reach, start
        self.watch = Stopwatch(synchronize=True)
        self.flops, self.step = 0.0, 0
        self.logits: dict[str, nn.Parameter] = {}
        self.gated: list[GatedWeight] = []
        self._held: list[Held] = []
        # On the optimizer before the loop's own: gates must be in the weights for good when the loop cuts.
        self._hooks = StepHooks((optimizer,), self._before_step, self._after_step)
        self._handles: list[Any] = []

    def start(self, loop: Loop) -> None:
        """Gate the units of this loop, from the coming forward pass on."""
        cost = loop.spending.costs["flops"]
        assert isinstance(cost, ProductCost), "FLOPs are sums of products"
        self.loop, self.cost = loop, cost
        self.dense = cost.total(loop.dense_widths)
        self.limit = loop.spending.limits["flops"] / self.dense
        self.steps = next(
            step for step in range(1, loop.total_steps + 1) if loop.controller.due(step, loop.total_steps)
        )
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        device = next(iter(weights.values())).device
        for group in loop.groups:
            self.logits[group.name] = nn.Parameter(
                torch.full((group.num_units,), logit_of(self.start_probability), device=device)
            )
        self.gated = gated_weights(loop.groups, weights)
        self.first = float(self.expected.detach())
        self.lagrangian = Lagrangian(self.reach / self.steps, device)
        self._optimizer = torch.optim.Adam(self.logits.values(), lr=self.reach / self.steps)
        self._handles = [
            self.model.register_forward_pre_hook(_Hook(self._ahead)),
            self.model.register_forward_hook(_Hook(self._behind), always_call=True),
        ]

    @property
    def seconds(self) -> float:
        """Seconds that gates have taken."""
        return self.watch.seconds

    def observe(self, loss: Tensor) -> None:
        """The loss reaches the gates by its gradients."""

    def remove(self) -> None:
        """Put the weights back and take the hooks away."""
        self._put_back()
        self._hooks.remove()
        self._stop()

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        """Groups all of whose outgoing weights can be gated."""
        return gateable(groups, model)

    def scores(self, groups: tuple[Group, ...]) -> Mapping[str, Float64[np.ndarray, " _units"]]:
        """Probability that each unit is there."""
        return {
            group.name: probability_above(self.logits[group.name]).detach().double().cpu().numpy() for group in groups
        }

    @property
    def expected(self) -> Tensor:
        """Expected FLOPs at the present probabilities, as a share of dense, 0-dim."""
        widths = {name: probability_above(logits).sum() for name, logits in self.logits.items()}
        return expected_cost(self.cost, widths) / self.dense

    @property
    def target(self) -> float:
        """What expected FLOPs are to be in the step under way, as a share of dense."""
        progress = min(1.0, (self.step + 1) / max(1.0, self.ramp * self.steps))
        return self.first + (self.limit - self.first) * progress

    def _ahead(self) -> None:
        """Before a forward pass: gates into the weights."""
        with self.watch:
            self._put_back()
            trains = self.model.training and torch.is_grad_enabled()
            with torch.set_grad_enabled(trains):
                gates = {
                    name: drawn(logits, torch.rand_like(logits)) if trains else settled(logits)
                    for name, logits in self.logits.items()
                }
                self._held = [each.hold(gates) for each in self.gated]
            for each in self._held:
                each.put_in()

    def _behind(self) -> None:
        """After a forward pass: weights back, unless a backward pass is to come."""
        if not (self.model.training and torch.is_grad_enabled()):
            self._put_back()

    def _put_back(self) -> None:
        for each in self._held:
            each.put_back()
        self._held = []

    def _before_step(self, grad_scale: Tensor | None) -> None:
        if not self._handles:
            return
        with self.watch:
            self.hand_on()
            torch.autograd.backward(self.lagrangian.penalty(self.expected, self.target))
            self._optimizer.step()
            self._optimizer.zero_grad()
            with torch.no_grad():
                for logits in self.logits.values():
                    logits.clamp_(-FARTHEST, FARTHEST)
            self.lagrangian.rise()
            self.flops += _FLOPS_PER_WEIGHT * sum(each.weight.numel() for each in self.gated)

    def hand_on(self) -> None:
        """Weights back, and the gradients of their products with gates on to weights and logits."""
        held = [each for each in self._held if each.weight.grad is not None]
        self._put_back()
        if held:
            torch.autograd.backward([each.product for each in held], [each.weight.grad for each in held])
        for each in held:
            each.weight.grad = each.own.grad

    def _after_step(self) -> None:
        if not self._handles:
            return
        self.step += 1
        if self.step == self.steps:
            with self.watch:
                self.fold()

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply settled gates into the weights for good, and gate no more."""
        self._put_back()
        gates = {name: settled(logits) for name, logits in self.logits.items()}
        for each in self.gated:
            each.hold(gates).put_in()
        self._stop()

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Hook:
    """A hook on a model's forward pass, which does nothing in a copy of the model."""

    def __init__(self, call: Any = None) -> None:
        self._call = call

    def __call__(self, *_: Any) -> None:
        if self._call is not None:
            self._call()

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook()
