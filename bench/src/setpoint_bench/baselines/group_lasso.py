"""Group lasso with periodic reconfiguration (PruneTrain): a penalty shrinks whole units until they can be removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from setpoint.controller.plan import Observation, Plan
from setpoint.controller.reason import problem_with
from setpoint.controller.selection import even_cost, even_density
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group, Slice
from setpoint.messages import counted
from setpoint.sensor.units import UnitSum
from setpoint_bench.baselines.even import even_plan, nothing_dropped


@final
@dataclass(frozen=True)
class ReconfiguringController:
    """At every reconfiguration, units that the lasso has brought near zero go, and the smallest as a ramp demands.

    "Near zero" is below `threshold` times the largest norm of the group. The paper trains long and ends wherever
    its penalty leads; in short runs hardly a unit comes near zero. So that it can be held against others at a
    budget, no more goes here once the limit is met, and each reconfiguration drops at least as many of the
    smallest units, all groups alike, as bring the density down in a straight line to the one that meets the limit.

    Args:
        num_reconfigurations: how many there are, evenly spread up to `end`.
        end: fraction of the run by which the limit is met.
        threshold: largest norm of a unit that counts as zero, relative to the largest of its group.

    Raises:
        ValueError: for a setting out of range.

    References:
        Lym, Choukse, Zangeneh, Wen, Sanghavi, Erez: "PruneTrain: fast neural network training by dynamic sparse
        model reconfiguration", SC 2019.

    >>> [step for step in range(101) if ReconfiguringController(num_reconfigurations=4, end=0.6).due(step, 100)]
    [15, 30, 45, 60]
    """

    num_reconfigurations: int = 10
    end: float = 0.7
    threshold: float = 0.05

    def __post_init__(self) -> None:
        if self.num_reconfigurations < 1 or not 0 < self.end <= 1 or not 0 <= self.threshold <= 1:
            raise ValueError(
                f"reconfiguring needs at least one reconfiguration, 0 < end <= 1 and 0 <= threshold <= 1, got {self!r}"
            )

    def init(self, groups: tuple[Group, ...]) -> None:
        """State before the first decision."""

    def due(self, step: int, total_steps: int) -> bool:
        """Evenly from the start to `end`."""
        last = self._last(total_steps)
        number = self.num_reconfigurations
        return step > 0 and step in {round(last * each / number) for each in range(1, number + 1)}

    def decide(self, state: None, observation: Observation, cost: Cost, groups: tuple[Group, ...]) -> tuple[None, Plan]:
        """Drop what is near zero, and what is smallest as far as the ramp wants it.

        Args:
            state: from `init`.
            observation: with a reading of norms.
            cost: predicts spending; names the resource.
            groups: the groups that may be cut, as they are now.
        """
        problem = problem_with(observation.reading, None, groups)
        if problem:
            return state, nothing_dropped(observation, cost, groups, problem)
        assert observation.reading is not None
        norms = observation.reading.saliency
        limit = observation.limit[cost.resource]
        progress = min(1.0, observation.step / self._last(observation.planned_steps))
        final = even_density(cost, observation.widths, observation.dense_widths, groups, limit)
        ramp = limit
        if progress < 1:
            ramp = even_cost(cost, observation.widths, observation.dense_widths, groups, 1.0 - progress * (1.0 - final))
        near_zero = {
            group.name: int((norms[group.name] < self.threshold * norms[group.name].max()).sum())
            for group in groups
            if group.num_units
        }
        reason = f"reconfiguration: {counted(sum(near_zero.values()), 'unit')} near zero"
        return state, even_plan(observation, cost, groups, max(limit, ramp), reason, near_zero)

    def _last(self, total_steps: int) -> int:
        return max(1, round(self.end * total_steps))


@torch.no_grad()
def lasso_norms(model: nn.Module, groups: tuple[Group, ...]) -> Tensor:
    """Sum over groups, and over the weights that write or read their units, of the L2 norms of the units' parts.

    `sum over (group, weight) of sum over units u of sqrt(sum of w^2 over the entries of u)`.

    Args:
        model: the model.
        groups: its groups, as they are now.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    norms = [_norms(parameters[place.tensor], place, group).sum() for group, place in _places(parameters, groups)]
    return torch.stack(norms).sum()


@torch.no_grad()
def add_lasso_gradient(model: nn.Module, groups: tuple[Group, ...], strength: Tensor) -> None:
    """Add the gradient of `strength * lasso_norms`, which is `strength * w / norm of its unit`, to the gradients.

    Args:
        model: the model, gradients ready.
        groups: its groups, as they are now.
        strength: weight of the penalty in the loss (lambda).
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group, place in _places(parameters, groups):
        weight = parameters[place.tensor]
        if weight.grad is not None:
            scale = strength / _norms(weight, place, group).clamp_min(1e-12)
            weight.grad += weight * _by_entry(scale, place, weight)


@torch.no_grad()
def shrink_by_lasso(
    model: nn.Module, groups: tuple[Group, ...], strength: Tensor, learning_rates: Mapping[int, float]
) -> None:
    """Shrink the norm of each unit's part by `learning rate * strength`, to zero at most.

    The proximal step of the penalty (Parikh and Boyd, "Proximal algorithms", 2014, section 6.5.4), beside the
    optimizer as decoupled weight decay is.

    Args:
        model: the model, whose weights have just been moved.
        groups: its groups, as they are now.
        strength: weight of the penalty in the loss (lambda).
        learning_rates: of each parameter, by its `id`; one that has none stays.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group, place in _places(parameters, groups):
        weight = parameters[place.tensor]
        if id(weight) in learning_rates:
            step = learning_rates[id(weight)] * strength
            scale = (step / _norms(weight, place, group).clamp_min(1e-12)).clamp_max(1.0)
            weight.sub_(weight * _by_entry(scale, place, weight))


def _places(parameters: Mapping[str, nn.Parameter], groups: tuple[Group, ...]) -> list[tuple[Group, Slice]]:
    """Where the lasso acts: weights of two dims or more that write or read a group's units."""
    return [
        (group, place)
        for group in groups
        for place in group.slices
        if place.role != "carry" and place.dim is not None and place.tensor in parameters
        if parameters[place.tensor].dim() > 1 and group.num_units
    ]


def _by_entry(scale: Tensor, place: Slice, weight: Tensor) -> Tensor:
    """One number a unit as a factor of the weight, 0 where no unit's entries are."""
    assert place.dim is not None
    shape = [1] * weight.dim()
    shape[place.dim] = -1
    index = torch.from_numpy(place.index).to(weight.device)
    return torch.cat([scale, scale.new_zeros(1)])[index].view(shape).to(weight.dtype)


def _norms(weight: Tensor, place: Slice, group: Group) -> Tensor:
    sums = UnitSum.of(place, group.num_units, weight.device)
    return sums.add_up(sums.select(weight.detach()).float().square()).sqrt()


def lasso_strength(loss: Tensor, norms: Tensor, ratio: float) -> Tensor:
    """The weight at which the penalty is `ratio` of the whole loss: `ratio / (1 - ratio) * loss / norms`.

    Args:
        loss: the task's own loss at the first step.
        norms: `lasso_norms` at the first step.
        ratio: penalty / (loss + penalty), in [0, 1).

    >>> float(lasso_strength(torch.tensor(3.0), torch.tensor(100.0), 0.25))
    0.0099...
    """
    return ratio / (1.0 - ratio) * loss / norms
