"""What units are ranked by where a budget is on a cost.

A budget of FLOPs is kept in FLOPs. Units are ranked by what they save of FLOPs and of moved elements together. A tensor
that the forward makes is moved, forward and backward, and this takes time and no FLOPs (the roofline model). Ranking by
FLOPs alone would keep channels of depthwise convolutions and of early layers, which cost few FLOPs and much time.

References:
    Williams, Waterman, Patterson: "Roofline: an insightful visual performance model for multicore architectures",
    CACM 2009.
"""

from __future__ import annotations

from setpoint.cost.cost import Cost, ProductCost, Term
from setpoint.groups.group import widths_of
from setpoint.groups.trace import Trace

FLOPS_PER_ELEMENT = 50.0
"""FLOPs that count as much as one element of an activation, moved forward and backward.

Five passes of 4 bytes take the time of 200 FLOPs on a processor core with 10 FLOPs per byte, and of more on a GPU. But
the user asked for FLOPs: a quarter of it decides between units of about equal worth, and seldom against the loss. On
validation data larger numbers made EfficientNet faster still, and less accurate.
"""


def ranking_of(cost: Cost) -> Cost:
    """The cost whose savings divide saliencies where a budget is on `cost`: itself unless it names another one."""
    found: Cost = getattr(cost, "ranking", cost)
    return found


def moving_ranking(trace: Trace, flops: tuple[Term, ...]) -> ProductCost:
    """The ranking of a budget of FLOPs, `R(widths) = c * (FLOPs + FLOPS_PER_ELEMENT * elements of activations)`.

    The factor c is such that R is the FLOPs of the traced model at its present widths.

    >>> import torch
    >>> from setpoint.groups.trace import trace
    >>> found = trace(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), (torch.zeros(16, 4),))
    >>> from setpoint.cost.flops import flops_cost
    >>> cost = flops_cost(found)
    >>> cost.total({"0": 8}), cost.ranking.total({"0": 8})  # 16 x 8 and 16 x 2 elements are made
    (3584.0, 3584.0)
    """
    moved = tuple(Term(FLOPS_PER_ELEMENT * each.coefficient, each.sizes) for each in trace.activations)
    widths = widths_of(trace.groups)
    spent, both = (sum(term.at(widths) for term in terms) for terms in (flops, flops + moved))
    scale = spent / both if both else 1.0
    return ProductCost("flops", tuple(Term(scale * each.coefficient, each.sizes) for each in flops + moved))
