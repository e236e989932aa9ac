"""The independent counter, against formulas written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from setpoint_bench.counter import step_flops


def test_linear() -> None:
    """The first linear layer costs two products of 2*N*I*O (its input needs no gradient), the second three."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    assert step_flops(model, (torch.zeros(7, 3),)) == 2 * (2 * 7 * 3 * 5) + 3 * (2 * 7 * 5 * 2)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution(groups: int, stride: int) -> None:
    """A convolution costs 2*N*H*W*K*K*I/groups*O in each direction, whatever `groups` is."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 3, stride, padding=1, groups=groups))
    first = 2 * 5 * 6 * 6 * 4 * 4
    second = 2 * 5 * (6 // stride) ** 2 * 3 * 3 * (4 // groups) * 8
    assert step_flops(model, (torch.zeros(5, 4, 6, 6),)) == 2 * first + 3 * second


def test_transposed_convolution() -> None:
    """A transposed convolution uses its weights once per position of the input, in each direction."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2))
    first, second = 2 * 3 * 25 * 2 * 4, 2 * 3 * 25 * 2 * 2 * (4 * 6 // 2)
    assert step_flops(model, (torch.zeros(3, 2, 5, 5),)) == 2 * first + 3 * second


class Attention(nn.Module):
    """One fused projection and plain causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.view(2, 10, 4, 2).transpose(1, 2) for part in self.qkv(x).split(8, dim=2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_attention_counts_as_its_products() -> None:
    """Causal attention costs its two full products forward and four backward, masked entries included."""
    product = 2 * (2 * 4) * 10 * 10 * 2
    assert step_flops(Attention(), (torch.zeros(2, 10, 8),)) == 2 * (2 * 20 * 8 * 24) + 6 * product


def test_leaves_the_model_alone() -> None:
    """Counting touches neither weights, statistics, gradients, mode nor the global random state."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    step_flops(model, (torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(0)),))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_keyword_inputs() -> None:
    """Inputs by keyword count like inputs by position."""
    model = nn.Linear(3, 5)
    assert step_flops(model, {"input": torch.zeros(7, 3)}) == step_flops(model, (torch.zeros(7, 3),))
