"""Gating: gates act as on the units' outputs, weights and gates get the gradients of that, and folding is exact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import setpoint
from setpoint_bench.baselines.gated_weights import gateable
from setpoint_bench.baselines.hard_concrete import drawn, settled
from setpoint_bench.baselines.scheduled import ScheduledController
from setpoint_bench.counter import step_flops
from setpoint_bench.gating import Gating
from setpoint_bench.networks import CharGPT
from setpoint_bench.score_sensor import ScoreSensor

STEPS = 400


class Convolutions(nn.Module):
    """Two convolutions, of which the second one is read flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16 * 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores."""
        scores: torch.Tensor = self.head(torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x))))).flatten(1))
        return scores


def gpt() -> nn.Module:
    """Two layers of four heads and 32 neurons."""
    widths = {f"layer{n}.{kind}": width for n in (1, 2) for kind, width in (("heads", 4), ("neurons", 32))}
    return CharGPT(widths, 11, 8, 16, 4, 0.0)


MODELS = {
    "convolutions": (Convolutions, lambda: (torch.randn(4, 3, 6, 6),)),
    "gpt": (gpt, lambda: (torch.randint(11, (4, 8)),)),
}
models = pytest.mark.parametrize("name", MODELS)


def gated(
    name: str, *, end: float = 0.5
) -> tuple[nn.Module, torch.optim.Optimizer, setpoint.Loop, Gating, tuple[torch.Tensor, ...]]:
    """A small model with gates, half open at the start."""
    make, inputs = MODELS[name]
    model, example = make(), inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gating = Gating(model, optimizer, ramp=0.5, reach=30.0, start=0.9)
    loop = setpoint.attach(
        model,
        optimizer,
        0.5,
        example=example,
        total_steps=STEPS,
        controller=ScheduledController(begin=end, end=end, num_cuts=1, ranking="all"),
        sensor=ScoreSensor(gating),
    )
    gating.start(loop)
    return model, optimizer, loop, gating, example


@models
def test_gradients_are_those_of_gated_weights(name: str) -> None:
    """Claim: loss, gradients of weights and of logits are autograd's for a model whose outgoing weights are w z."""
    model, _, _, gating, example = gated(name)
    twin = copy.deepcopy(model)
    torch.manual_seed(5)
    gates = {key: drawn(logits, torch.rand_like(logits)) for key, logits in gating.logits.items()}
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    weights = dict(twin.named_parameters())
    products = {}
    for each in gating.gated:
        product = weights[names[id(each.weight)]]
        for group, dim, index in each.readers:
            gate = torch.cat([gates[group], torch.ones(1)])[index]
            product = product * gate.view([-1 if other == dim else 1 for other in range(product.dim())])
        products[names[id(each.weight)]] = product
    expected = torch.func.functional_call(twin, products, example).square().mean()
    torch.autograd.backward(expected)
    logits = {key: each.grad for key, each in gating.logits.items()}
    for each in gating.logits.values():
        each.grad = None

    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    torch.manual_seed(5)
    loss = model(*example).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.autograd.backward(loss)
    gating.hand_on()
    for key, each in gating.logits.items():
        torch.testing.assert_close(each.grad, logits[key], rtol=1e-3, atol=1e-6)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key])
        torch.testing.assert_close(parameter.grad, weights[key].grad, rtol=1e-3, atol=1e-6)


@models
def test_folded_is_gated(name: str) -> None:
    """Claim: the model with settled gates multiplied into its weights computes what the gated one does."""
    model, optimizer, loop, gating, example = gated(name)
    with torch.no_grad():
        for logits in gating.logits.values():
            logits.copy_(torch.randn_like(logits) * 3)
    model.eval()
    with torch.no_grad():
        before = model(*example)
        gating.fold()
        assert torch.equal(model(*example), before)
    assert not torch.equal(before, torch.zeros_like(before))


def test_a_closed_unit_is_an_absent_one() -> None:
    """Claim: cutting units whose settled gate is 0 from the folded model changes nothing that it computes."""
    model, optimizer, loop, gating, example = gated("convolutions")
    with torch.no_grad():
        for logits in gating.logits.values():
            logits.copy_(torch.where(torch.arange(len(logits)) % 3 == 0, -9.0, 1.0))
    keep = {name: (settled(logits) > 0).numpy() for name, logits in gating.logits.items()}
    model.eval()
    with torch.no_grad():
        gating.fold()
        before = model(*example)
        groups = loop.groups
        gating.remove()
        loop.detach()
        setpoint.shrink(model, optimizer, groups, keep)
        torch.testing.assert_close(model(*example), before)


@models
def test_reaches_the_budget(name: str) -> None:
    """Claim: at the cut expected FLOPs are near the budget, the cut model is within it, and weights stay put."""
    model, optimizer, loop, gating, example = gated(name)
    dense = step_flops(model, example)
    identity = [id(parameter) for parameter in model.parameters()]
    while not loop.budget_met:
        expected = float(gating.expected.detach())
        torch.autograd.backward(model(*example).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert loop.step == gating.steps == STEPS // 2
    assert expected == pytest.approx(0.5, abs=0.05)
    assert 0.4 * dense <= step_flops(model, example) <= 0.5 * dense
    assert [id(parameter) for parameter in model.parameters()] == identity
    gating.remove()
    loop.finish()
    assert gating.flops > 0


def test_validation_leaves_weights_alone() -> None:
    """Claim: outside of training gates draw nothing, and weights are back after the forward pass, also if it fails."""
    model, _, _, gating, example = gated("convolutions")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(*example), model(*example))
    with pytest.raises(RuntimeError), torch.no_grad():
        model(torch.randn(1, 7))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_copy_has_no_gates() -> None:
    """Claim: a copy of the model draws nothing, so that its FLOPs can be counted."""
    model, _, _, gating, example = gated("convolutions")
    state = torch.get_rng_state()
    copy.deepcopy(model)(*example)
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_weights_have_no_gates() -> None:
    """Claim: a group that a weight of two names reads is left alone, since the gate would act in both places."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.other = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 4)
            self.other.weight = self.last.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(self.first(x))
            answer: torch.Tensor = self.last(hidden) + self.other(hidden)
            return answer

    model = Tied()
    groups = setpoint.find_groups(model, (torch.randn(2, 4),))
    assert groups and gateable(groups, model) == ()
