"""The expected cost of a model whose units are there with a probability, through which gradients pass."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from setpoint.cost.cost import ProductCost


def expected_cost(cost: ProductCost, widths: Mapping[str, Tensor]) -> Tensor:
    """The cost at expected widths: `sum over terms of coefficient * prod over sizes of E[size]`.

    Each size is linear in the widths. Where units are drawn independently and no group is in two sizes of a product,
    this is the expectation of the cost; where one is, it leaves out the variance of its width.

    Args:
        cost: a sum of products of widths.
        widths: expected number of units of each group, 0-dim: the sum of their probabilities.
    """
    total = next(iter(widths.values())).new_zeros(())
    for term in cost.terms:
        product = total.new_tensor(term.coefficient)
        for size in term.sizes:
            product = product * sum(
                (count * widths[name] for name, count in size.parts), total.new_tensor(size.constant)
            )
        total = total + product
    return total
