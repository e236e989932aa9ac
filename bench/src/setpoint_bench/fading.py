"""Fading: the units that are likely to go next are closed slowly, so that a cut takes what is nearly gone."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.controller.plan import Observation, Plan
from setpoint.controller.priced import PricedController, PricedState
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group
from setpoint.loop.hooks import StepHooks
from setpoint.loop.loop import Loop
from setpoint_bench.silenced import outgoing

_LEFT = 0.05
"""What is left of an outgoing weight at the next decision if the gradient does not hold it up."""


@final
class Fading:
    """Annealed gates: units that would go at the next decision lose their outgoing weights step by step until then.

    As a plan's reviser it picks them, by the readings of now; as a loop's companion it shrinks the weights.

    A gate g on a unit's outgoing weights falls from 1 to 1/20 as `g = 20 ** -(steps / steps between decisions)`. A
    unit that is not among those to go at the next decision keeps what has been left of it, and learns on.

    References:
        Gates that close as training goes on: Savarese, Silva, Maire, "Winning the lottery with continuous
        sparsification", NeurIPS 2020; shrinking what is about to be pruned: Wang et al., "Neural pruning via growing
        regularization", ICLR 2021.
    """

    flops = seconds = 0.0

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.fading: dict[str, Int[np.ndarray, " _units"]] = {}
        self.places: list[tuple[nn.Parameter, int, Tensor]] | None = None
        self.factor = 1.0

    def beside(self, loop: Loop) -> Fading:
        """This, acting on the training of a loop that has it as its plans' reviser."""
        self.loop = loop
        self.hooks = StepHooks((self.optimizer,), lambda _: None, self._after_step)
        return self

    def observe(self, loss: Tensor) -> None:
        """Of no interest here."""

    def remove(self) -> None:
        """Take the hooks away."""
        self.hooks.remove()

    def __call__(
        self,
        priced: PricedController,
        state: PricedState,
        plan: Plan,
        observation: Observation,
        cost: Cost,
        groups: tuple[Group, ...],
    ) -> Plan:
        """The plan as it is; what the next would drop besides is remembered, by its place after this one."""
        step, total = observation.step, observation.total_steps
        following = next((each for each in range(step + 1, total) if priced.due(each, total)), None)
        self.fading, self.places = {}, None
        if plan.landed or following is None or priced.reference.settled(step, total):
            return plan
        ahead = priced.decide(state, replace(observation, step=following), cost, groups)[1]
        for group in groups:
            everyone = np.ones(group.num_units, dtype=bool)
            stays, stays_then = (each.keep.get(group.name, everyone) for each in (plan, ahead))
            self.fading[group.name] = np.flatnonzero(~stays_then[stays])
        self.factor = _LEFT ** (1 / (following - step))
        return plan

    @torch.no_grad()
    def _after_step(self) -> None:
        if self.places is None:
            self.places = outgoing(self.model, self.loop.groups, self.fading)
        for weight, dim, entries in self.places:
            weight.index_copy_(dim, entries, weight.index_select(dim, entries) * self.factor)
