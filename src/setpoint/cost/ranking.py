"""What units are ranked by where a budget is on a cost.

A budget of FLOPs is kept in FLOPs. Units are ranked by what they save of *time*, as the roofline model has it: tensors
that the forward makes must be moved, forward and backward, while no product is worked out. Ranking by FLOPs alone would
keep channels of depthwise convolutions and of early layers, which cost few FLOPs and much time.

References:
    Williams, Waterman, Patterson: "Roofline: an insightful visual performance model for multicore architectures",
    CACM 2009.
"""

from __future__ import annotations

from setpoint.cost.cost import Cost, ProductCost, Term
from setpoint.groups.group import widths_of
from setpoint.groups.trace import Trace

FLOPS_PER_ELEMENT = 200.0
"""FLOPs in the time that one element of an activation takes to be moved, forward and backward.

Five passes of 4 bytes, times 10 FLOPs per byte: the balance of a processor core with AVX2. That of AVX-512 and of GPUs is
higher; a larger number would cut more of what is slow there, and more of what the loss needs.
"""


def ranking_of(cost: Cost) -> Cost:
    """The cost whose savings divide saliencies where a budget is on `cost`: itself unless it names another one."""
    found: Cost = getattr(cost, "ranking", cost)
    return found


def time_ranking(trace: Trace, flops: tuple[Term, ...]) -> ProductCost:
    """The ranking of a budget of FLOPs, `R(widths) = c * (FLOPs + FLOPS_PER_ELEMENT * elements of activations)`.

    The factor c is such that R is the FLOPs of the traced model at its present widths: a unit of R is the time that one
    FLOP takes on average.

    >>> import torch
    >>> from setpoint.groups.trace import trace
    >>> found = trace(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), (torch.zeros(16, 4),))
    >>> from setpoint.cost.flops import flops_cost
    >>> cost = flops_cost(found)
    >>> cost.total({"0": 8}), cost.ranking.total({"0": 8})  # 16 x 8 and 16 x 2 elements are made
    (4096.0, 4096.0)
    """
    moved = tuple(Term(FLOPS_PER_ELEMENT * each.coefficient, each.sizes) for each in trace.activations)
    widths = widths_of(trace.groups)
    spent, both = (sum(term.at(widths) for term in terms) for terms in (flops, flops + moved))
    scale = spent / both if both else 1.0
    return ProductCost("flops", tuple(Term(scale * each.coefficient, each.sizes) for each in flops + moved))
