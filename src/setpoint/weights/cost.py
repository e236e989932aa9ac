"""Theoretical cost of single weights: what a step would take if a masked weight cost nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from setpoint.cost.cost import ProductCost, Term
from setpoint.groups.group import Group, Size, widths_of
from setpoint.groups.trace import Trace
from setpoint.weights.find import owners


@dataclass(frozen=True, eq=False)
class WeightFlops:
    """FLOPs of one dense training step, by weight tensor."""

    total: float  # of the whole step
    step: Mapping[str, float]  # by weight, of its products forward and backward
    forward: Mapping[str, float]  # by weight, of its forward product; the gradient of the weight costs as much
    sizes: Mapping[str, int]  # by weight, its number of elements

    def cost(self) -> ProductCost:
        """Theoretical FLOPs of a step, as a function of the numbers of active weights.

        `fixed + sum over tensors of step * active / size`, as the literature has it: all three products of a weight use
        active weights only.

        References:
            Evci, Gale, Menick, Castro, Elsen: "Rigging the Lottery: Making All Tickets Winners", ICML 2020, appendix.
        """
        fixed = Term(self.total - sum(self.step.values()), ())
        each = (Term(flops / self.sizes[name], (_active(name),)) for name, flops in self.step.items())
        return ProductCost("flops", (fixed, *each))

    def at(self, widths: Mapping[str, int]) -> float:
        """Theoretical FLOPs of a step with so many active weights."""
        fixed = self.total - sum(self.step.values())
        return fixed + sum(self.step[name] * widths[name] / self.sizes[name] for name in self.step)

    def dense_gradients(self, widths: Mapping[str, int]) -> float:
        """FLOPs on top of a step that also computes the gradients of weights that are not active."""
        return sum(flops * (1.0 - widths[name] / self.sizes[name]) for name, flops in self.forward.items())


def weight_flops(model: nn.Module, found: Trace, groups: tuple[Group, ...]) -> WeightFlops:
    """Count the products with each weight tensor, at dense widths; what else is done with a weight is fixed."""
    sizes, owner = widths_of(groups), owners(model)
    dense = widths_of(found.groups)
    total, step, forward = 0.0, dict.fromkeys(sizes, 0.0), dict.fromkeys(sizes, 0.0)
    for each in found.contractions:
        flops = each.coefficient * math.prod(size.at(dense) for size in each.sizes)
        total += flops * (1 + each.num_gradients)
        if (name := owner.get(each.module)) in sizes:
            forward[name] += flops
            step[name] += flops * (1 + each.num_gradients)
    return WeightFlops(total, step, forward, sizes)


def active_params(model: nn.Module, groups: tuple[Group, ...]) -> ProductCost:
    """Parameters that are not masked, as a function of the numbers of active weights."""
    fixed = sum(parameter.numel() for parameter in model.parameters()) - sum(widths_of(groups).values())
    terms = (Term(1.0, (_active(group.name),)) for group in groups)
    return ProductCost("params", (Term(float(fixed), ()), *terms))


def _active(name: str) -> Size:
    return Size(0, ((name, 1),))
