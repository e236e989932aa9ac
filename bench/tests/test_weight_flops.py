"""Theoretical FLOPs: those of every weight tensor add up, and masks count as the literature counts them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from setpoint_bench.counter import step_flops
from setpoint_bench.networks import CharGPT, ResidualNet
from setpoint_bench.weight_flops import weight_flops

RESIDUAL = {f"stage{s}{b}": 8 * s for s in (1, 2) for b in ("", ".block1", ".block2")}


def test_a_layer_in_closed_form() -> None:
    """A hidden layer has three products of 2 x batch x in x out; the first, whose input needs no gradient, two."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 7))
    flops = weight_flops(model, (torch.zeros(11, 3),))
    assert flops.step == {"0.weight": 2 * 2 * 11 * 15, "2.weight": 3 * 2 * 11 * 35}
    assert flops.forward == {"0.weight": 2 * 11 * 15, "2.weight": 2 * 11 * 35}
    assert flops.fixed() == 0.0
    half = {"0.weight": 15, "2.weight": 7}
    assert flops.at(half) == 2 * 2 * 11 * 15 + 3 * 2 * 11 * 7
    assert flops.dense_gradients(half) == 2 * 11 * 28


def test_a_convolutional_net_adds_up() -> None:
    """All products of a CNN belong to some weight: together they are the counter's whole step."""
    model = ResidualNet(RESIDUAL, (2, 2), channels=1, classes=10)
    example = (torch.randn(4, 1, 8, 8),)
    flops = weight_flops(model, example)
    assert flops.total == step_flops(model, example)
    assert flops.fixed() == 0.0
    assert flops.at({name: 0 for name in flops.sizes}) == 0.0
    assert flops.at(flops.sizes) == pytest.approx(flops.total)


def test_attention_and_tied_weights_are_fixed() -> None:
    """What a mask cannot save is attention's own products and the head that is tied to the embedding."""
    widths = {"layer1.heads": 2, "layer1.neurons": 32}
    model, (batch, time) = CharGPT(widths, 20, 16, 8, 4), (3, 16)
    flops = weight_flops(model, (torch.zeros(batch, time, dtype=torch.long),))
    assert "lm_head.weight" not in flops.sizes and "wte.weight" not in flops.sizes
    attention = 3 * 2 * (2 * batch * 2 * time * time * 4)
    head = 3 * 2 * batch * time * 8 * 20
    assert flops.fixed() == attention + head
