"""FLOPs and parameters as functions of widths equal an independent count of the rebuilt model."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from groups.zoo import MODELS, DepthwiseCNN, images
from setpoint.actuator.shrink import shrink
from setpoint.cost.cost import flops_cost, params_cost
from setpoint.groups.group import random_keep, widths_of
from setpoint.groups.trace import trace


def count(model: nn.Module, example: tuple[torch.Tensor, ...]) -> int:
    """FLOPs of a forward and a backward pass, by PyTorch's own counter."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*example).sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "depthwise cnn"])
def test_flops_equal_the_counter_dense_and_cut(name: str) -> None:
    """At the dense widths and at random unequal ones, the function of widths equals the counter exactly."""
    build, example = MODELS[name]
    model, inputs = build(), example()
    traced = trace(model, inputs)
    cost = flops_cost(traced)
    assert cost.total(widths_of(traced.groups)) == count(copy.deepcopy(model), inputs)
    for seed in range(3):
        cut = copy.deepcopy(model)
        groups = shrink(cut, None, traced.groups, random_keep(traced.groups, seed))
        assert cost.total(widths_of(groups)) == count(cut, inputs)
        assert params_cost(model, traced.groups).total(widths_of(groups)) == sum(p.numel() for p in cut.parameters())


def test_grouped_convolutions_cost_what_they_do() -> None:
    """PyTorch's counter charges the weight gradient of a grouped convolution `groups` times; we charge it once."""
    model, inputs = DepthwiseCNN(), images()
    excess = 0
    for conv, pixels in ((model.depthwise, 64), (model.grouped, 36)):
        once = 2 * len(inputs[0]) * pixels * math.prod(conv.weight.shape)
        excess += once * (conv.groups - 1)
    traced = trace(model, inputs)
    assert flops_cost(traced).total(widths_of(traced.groups)) == count(model, inputs) - excess


def test_frozen_parameters_save_their_gradient() -> None:
    """A weight that needs no gradient is not charged for one, nor is what lies before all that do."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    x = (torch.randn(2, 4),)
    traced = trace(model, x)
    assert flops_cost(traced).total(widths_of(traced.groups)) == count(model, x)


class Recurrent(nn.Module):
    """A recurrent network behind a layer or alone; its first state is given by parameters ("h", "c"), or zero."""

    def __init__(self, cell: type[nn.RNNBase], *, front: bool, learnt: str, frozen: str) -> None:
        super().__init__()
        self.front = nn.Linear(6, 6) if front else nn.Identity()
        self.rnn = cell(6, 5, batch_first=True, bidirectional=True, num_layers=2)  # type: ignore[call-arg, arg-type]
        self.first = nn.ParameterList(nn.Parameter(torch.randn(4, 3, 5), requires_grad=name in learnt) for name in "hc")
        self.head = nn.Linear(10, 2)
        for name, parameter in self.named_parameters():
            if frozen and frozen in name:
                parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The head of the last step."""
        states = (self.first[0], self.first[1]) if isinstance(self.rnn, nn.LSTM) else self.first[0]
        return self.head(self.rnn(self.front(x), states)[0][:, -1])


NO_TF32 = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # flags() sets it, too


@NO_TF32
@pytest.mark.parametrize("cell", [nn.GRU, nn.RNN, nn.LSTM])
@pytest.mark.parametrize(
    ("front", "learnt", "frozen"),
    [
        (False, "", ""),
        (True, "", ""),
        (False, "h", "l0"),
        (False, "c", "reverse"),
        (True, "", "weight_hh"),
        (True, "c", "front"),
        (False, "", "rnn"),
        (True, "h", "l1"),
    ],
)
def test_recurrent_networks_cost_what_they_do(cell: type[nn.RNNBase], front: bool, learnt: str, frozen: str) -> None:
    """What is data is charged for no gradient, nor is a first state that is given; frozen weights save theirs."""
    model = Recurrent(cell, front=front, learnt=learnt, frozen=frozen)
    x = (torch.randn(3, 4, 6),)
    traced = trace(model, x)
    with torch.backends.mkldnn.flags(enabled=False):  # the counter knows no fused LSTM
        counted = count(model, x)
    assert flops_cost(traced).total(widths_of(traced.groups)) == counted


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.RNNCell])
def test_a_single_step_costs_what_it_does(cell: type[nn.RNNCellBase]) -> None:
    """A cell that is called by hand is charged for the gradients of what is computed, and of nothing that is given."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(6, 5)  # type: ignore[call-arg, arg-type]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = x.new_zeros(len(x), 5)
            for step in range(3):
                state = self.cell(x[:, step], state)
            return state

    x = (torch.randn(2, 3, 6),)
    model = Steps()
    traced = trace(model, x)
    assert flops_cost(traced).total(widths_of(traced.groups)) == count(model, x)


@pytest.mark.parametrize("mode", ["", "no_grad", "detach", "straight through", "nested", "both"])
def test_what_no_gradient_goes_through_is_not_charged_for_one(mode: str) -> None:
    """Layers behind `detach()` or under `no_grad` have no backward pass; those beside a straight-through value do."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
            self.head = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.features(x))

        def features(self, x: torch.Tensor) -> torch.Tensor:
            if mode == "no_grad":
                with torch.no_grad():
                    return self.trunk(x)
            if mode == "nested":
                with torch.no_grad():
                    y = self.trunk[0](x).relu()
                    with torch.enable_grad():
                        return self.trunk[2](y)
            y = self.trunk(x)
            if mode == "straight through":
                return y + (y.round() - y).detach()
            return y.detach() if mode == "detach" else y + self.trunk(2 * x).detach() if mode == "both" else y

    model, x = Two(), (torch.randn(5, 8),)
    traced = trace(model, x)
    assert flops_cost(traced).total(widths_of(traced.groups)) == count(model, x)


class Checkpointed(nn.Module):
    """Two blocks behind a layer, of which the second is a checkpoint: it may hold others, or be a function."""

    def __init__(self, kind: str, reentrant: bool) -> None:
        super().__init__()
        self.kind, self.go = kind, partial(checkpoint, use_reentrant=reentrant)
        self.front, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        parts = (nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 16))
        self.blocks = nn.ModuleList(nn.Sequential(*copy.deepcopy(parts)) for _ in range(2))

    def product(self, block: int, layer: int, x: torch.Tensor) -> torch.Tensor:
        """A layer of a block as a product of the model's own forward."""
        return nn.functional.linear(x, self.blocks[block][layer].weight)  # type: ignore[index]

    def function(self, block: int, x: torch.Tensor) -> torch.Tensor:
        """A block without calls of modules."""
        return self.product(block, 4, self.product(block, 2, self.product(block, 0, x).tanh()).tanh())

    def nested(self, x: torch.Tensor) -> torch.Tensor:
        """The second block, whose checkpoint holds a checkpoint in which there is one more."""
        inner, outer = self.blocks[1][:2], self.blocks[1][3:]  # type: ignore[index]
        middle = self.blocks[1][2]  # type: ignore[index]
        hidden: torch.Tensor = self.go(lambda y: middle(self.go(inner, y)), x)
        return outer(hidden).sigmoid()  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The head of both blocks."""
        x, first, second = self.front(x), self.blocks[0], self.blocks[1]
        settings: dict[str, Any] = {}
        if self.kind == "selective":
            saved = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
            settings = {"context_fn": saved}
        if self.kind == "function":
            first, second = partial(self.function, 0), partial(self.function, 1)  # type: ignore[assignment]
        x = first(x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.kind != "no gradient"):
            y = self.go(self.nested if self.kind == "nested" else second, x, **settings)
        return self.head(nn.functional.dropout(x + y if self.kind != "last" else y, 0.1))  # type: ignore[no-any-return]


KINDS = ("plain", "last", "nested", "function", "no gradient")


@pytest.mark.parametrize(
    ("kind", "reentrant"), [("selective", False), *((kind, how) for kind in KINDS for how in (True, False))]
)
def test_what_backward_computes_again_is_counted(kind: str, reentrant: bool) -> None:
    """Checkpoints of both kinds, one inside another too, cost their backward pass and what it computes again.

    PyTorch ends a recomputation as soon as it has what the backward pass reads: mostly before a last product.
    """
    model, x = Checkpointed(kind, reentrant), (torch.randn(5, 8),)
    traced = trace(model, x)
    assert len(traced.groups) >= 6 and bool(traced.no_backward) is (kind == "no gradient")
    for seed in range(3):
        cut = copy.deepcopy(model)
        groups = shrink(cut, None, traced.groups, random_keep(traced.groups, seed))
        assert flops_cost(traced).total(widths_of(groups)) == count(cut, x)


def test_a_recomputation_that_cannot_be_counted_is_warned_of() -> None:
    """A step that fails on a copy leaves the backward pass counted, and says by how much a step may take more."""

    class Once(Checkpointed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling() and self.training:
                raise RuntimeError("no second look")
            return super().forward(x)

    model, x = Once("plain", True), (torch.randn(5, 8),)
    with pytest.warns(UserWarning, match="could not be counted .*no second look.*by one forward pass at most"):
        trace(model, x)
