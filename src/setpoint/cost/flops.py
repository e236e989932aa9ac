"""FLOPs of one optimizer step, forward and backward, as a pure function of widths.

Matrix products and convolutions only, 2 FLOPs a multiply-add: the convention of
`torch.utils.flop_counter`. The backward pass costs one more such product for each operand that needs a
gradient. Attention is counted as its two products (a kernel that recomputes the scores does more);
the weight gradient of a grouped convolution is counted as what it does (the counter of PyTorch 2.13
charges it `groups` times).
"""

from __future__ import annotations

from setpoint.cost.cost import ProductCost, Term
from setpoint.groups.trace import Trace


def flops_cost(trace: Trace) -> ProductCost:
    """FLOPs of one optimizer step of the traced model, at the example's batch shape."""
    terms = tuple(Term(each.coefficient * (1 + each.num_gradients), each.sizes) for each in trace.contractions)
    return ProductCost("flops", terms)


def forward_flops(trace: Trace, share: float = 1.0) -> ProductCost:
    """FLOPs of one forward pass of the traced model; `share` is samples of the pass / samples of the example."""
    terms = tuple(Term(share * contraction.coefficient, contraction.sizes) for contraction in trace.contractions)
    return ProductCost("flops", terms)
