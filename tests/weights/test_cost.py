"""Theoretical FLOPs of single weights: against PyTorch's own counter, layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setpoint.groups.group import widths_of
from setpoint.groups.trace import trace
from setpoint.weights.find import active_params, find_weights, weight_flops
from setpoint_bench.weight_flops import weight_flops as counted


class Twice(nn.Module):
    """A layer that is called twice, and whose weight a second layer shares."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(self.one(x).relu()).relu())


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1, groups=4), nn.Flatten(),
        nn.LayerNorm(12), nn.Linear(12, 5),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "shape"),
    [(convolutional(), (2, 3, 7, 7)), (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8))],
)
def test_each_tensor_costs_what_the_counter_says(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Claim: the whole step, each weight's products, and any numbers of active weights cost what hooks on the layers
    counted by PyTorch say.
    """
    x, groups = torch.randn(shape), find_weights(model)
    ours, theirs = weight_flops(model, trace(model, (x,)), groups), counted(model, (x,))
    assert (ours.total, dict(ours.step), dict(ours.forward)) == (theirs.total, dict(theirs.step), dict(theirs.forward))
    widths = {name: 1 + 2 * size // 3 for name, size in widths_of(groups).items()}
    assert ours.cost().total(widths) == pytest.approx(theirs.at(widths))
    assert ours.dense_gradients(widths) == pytest.approx(theirs.dense_gradients(widths))
    masked = sum(group.num_units - widths[group.name] for group in groups)
    assert active_params(model, groups).total(widths) == sum(p.numel() for p in model.parameters()) - masked


def test_a_weight_with_several_uses_costs_all_of_them() -> None:
    """Claim: a layer called twice and a tied one make one group, which costs the products of all three calls."""
    model = Twice()
    (group,) = find_weights(model)
    flops = weight_flops(model, trace(model, (torch.randn(2, 16),)), (group,))
    assert group.name == "one.weight" and flops.step["one.weight"] == flops.total == 2 * 2 * 16 * 16 * (2 + 3 + 3)
