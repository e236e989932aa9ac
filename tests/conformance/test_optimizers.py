from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import setpoint
from actuator.hand_made import group as hand_made
from actuator.hand_made import kept_only, masked_step, mlp, mlp_model, residual, some_keep, train_step
from setpoint.actuator.mask import mask
from setpoint.actuator.optimizer_check import check_optimizer, check_trains
from setpoint.actuator.shrink import shrink
from setpoint.actuator.tensors import named_tensors
from setpoint.errors import OptimizerError
from setpoint.weights.masking import mask_gradients, mask_weights

SETTINGS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
    "sgd-nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adam-amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw-amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "rmsprop-full": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.01, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam": (torch.optim.RAdam, {"lr": 0.01}),
    "adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "asgd": (torch.optim.ASGD, {"lr": 0.01, "t0": 2, "weight_decay": 0.1}),
}
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)

ROWS = [
    pytest.param(kind, {**settings, **form}, id="-".join([name, *form]))
    for name, (kind, settings) in SETTINGS.items()
    for form in ({}, {"foreach": True}, {"fused": True})
    if "fused" not in form or kind in FUSED
]


def moments(optimizer: Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What an optimizer remembers by entry of a parameter."""
    state = optimizer.state[parameter]
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim()}


@pytest.mark.parametrize(("kind", "settings"), ROWS)
def test_after_a_cut_the_optimizer_goes_on_as_on_the_masked_twin(
    kind: type[Optimizer], settings: dict[str, Any]
) -> None:
    """Claim: weights, statistics and state equal the masked twin's after 5 further steps, in fp64 to 1e-10. The check
    at attach lets every such optimizer through, draws no random number and leaves no state behind.
    """
    model, inputs, groups = residual()
    model, inputs = model.double(), (inputs[0].double(),)
    optimizer = kind(model.parameters(), **settings)
    before = torch.get_rng_state()
    check_optimizer(optimizer)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(optimizer.state.values()) or kind is torch.optim.Adagrad
    for _ in range(2):
        train_step(model, optimizer, inputs)
    twin = copy.deepcopy(model)
    twin_optimizer = kind(twin.parameters(), **settings)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    keep = some_keep(groups)
    shrink(model, optimizer, groups, keep)
    for _ in range(5):
        train_step(model, optimizer, inputs)
        masked_step(twin, twin_optimizer, inputs, groups, keep)
    whole = named_tensors(twin)
    for name, tensor in named_tensors(model).items():
        torch.testing.assert_close(tensor, kept_only(whole[name], name, groups, keep), rtol=0, atol=1e-10)
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        for key, value in moments(optimizer, one).items():
            want = kept_only(twin_optimizer.state[other][key], name, groups, keep)
            torch.testing.assert_close(value, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "settings"), ROWS)
def test_after_a_cut_the_optimizer_goes_on_as_on_a_fresh_small_model(
    kind: type[Optimizer], settings: dict[str, Any]
) -> None:
    """Claim: in fp32, 5 further steps are bit-equal to a fresh small model loaded with the sliced state."""
    model, inputs, groups = mlp()
    optimizer = kind(model.parameters(), **settings)
    for _ in range(2):
        train_step(model, optimizer, inputs)
    keep = some_keep(groups)
    fresh = mlp_model(*(int(keep[each.name].sum()) for each in groups))
    fresh.load_state_dict({key: kept_only(value, key, groups, keep) for key, value in model.state_dict().items()})
    fresh_optimizer = kind(fresh.parameters(), **settings)
    state = copy.deepcopy(optimizer.state_dict())
    for number, (name, _) in enumerate(model.named_parameters()):
        for key, value in state["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor) and value.dim():
                state["state"][number][key] = kept_only(value, name, groups, keep)
    fresh_optimizer.load_state_dict(state)
    shrink(model, optimizer, groups, keep)
    for _ in range(5):
        assert torch.equal(train_step(model, optimizer, inputs), train_step(fresh, fresh_optimizer, inputs))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), fresh.parameters(), strict=True))


MUONS = [
    pytest.param({"adjust_lr_fn": how, "weight_decay": decay}, id=f"{how}-{decay}")
    for how in (None, "original", "match_rms_adamw")
    for decay in (0.0, 0.1)
]


def shape_factor(settings: Mapping[str, Any], shape: Sequence[int]) -> float:
    """What Muon multiplies the learning rate of a matrix by: `sqrt(max(1, m / n))`, or `0.2 sqrt(max(m, n))`.

    The param group's "adjust_lr_fn" chooses; the shape has m rows and n columns. Rows and columns of zeros stay zero in
    Newton-Schulz iterations and add nothing to the norm: so a cut matrix and its masked twin give the same entries, if
    the twin has the factor of the cut shape.
    """
    rows, columns = shape
    if settings["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def muon_and_adamw(model: nn.Module, settings: dict[str, Any]) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """Muon for the hidden matrices, each in a group of its own, and AdamW for the rest."""
    hidden = [parameter for name, parameter in model.named_parameters() if name in ("0.weight", "2.weight")]
    rest = [parameter for name, parameter in model.named_parameters() if name not in ("0.weight", "2.weight")]
    muon = torch.optim.Muon([{"params": [each]} for each in hidden], lr=0.05, **settings)
    return muon, torch.optim.AdamW(rest, lr=0.01)


def step_both(
    model: nn.Module, both: tuple[Optimizer, ...], inputs: tuple[torch.Tensor, ...], mask: Callable[[], None]
) -> None:
    """One step of all optimizers; `mask` is called before it, between gradients and step, and after it."""
    mask()
    for each in both:
        each.zero_grad()
    model(*inputs).square().mean().backward()
    mask()
    for each in both:
        each.step()
    mask()


@pytest.mark.parametrize("settings", MUONS)
def test_muon_goes_on_as_on_the_masked_twin_of_its_new_shape(settings: dict[str, Any]) -> None:
    """Claim: weights and momenta follow the masked twin whose learning rate has the factor of the cut shape, to the
    bfloat16 that Muon computes in; without the factor they do not.
    """
    model, inputs, groups = mlp()
    both = muon_and_adamw(model, settings)
    for _ in range(2):
        step_both(model, both, inputs, lambda: None)
    keep = some_keep(groups)
    twins = []
    for fitted in (True, False):
        twin = copy.deepcopy(model)
        two = muon_and_adamw(twin, settings)
        for one, other in zip(two, both, strict=True):
            one.load_state_dict(copy.deepcopy(other.state_dict()))
        twins.append((twin, two, fitted))
    before = [parameter.shape for parameter in model.parameters() if parameter.dim() == 2][:2]
    shrink(model, both, groups, keep)
    after = [parameter.shape for parameter in model.parameters() if parameter.dim() == 2][:2]
    assert before != after
    for _ in range(4):
        step_both(model, both, inputs, lambda: None)
    for twin, two, fitted in twins:
        for group, old, new in zip(two[0].param_groups, before, after, strict=True):
            ratio = shape_factor(group, new) / shape_factor(group, old) if fitted else 1.0
            group["lr"] *= ratio
            group["weight_decay"] /= ratio
        for _ in range(4):
            step_both(twin, two, inputs, lambda twin=twin, two=two: mask(twin, two, groups, keep))
        whole = named_tensors(twin)
        off = max(
            float((tensor - kept_only(whole[name], name, groups, keep)).detach().abs().max())
            for name, tensor in named_tensors(model).items()
        )
        assert off < 5e-3 if fitted else off > 1e-2, (fitted, off)


@pytest.mark.parametrize("settings", MUONS)
def test_muon_goes_on_as_on_a_fresh_small_model(settings: dict[str, Any]) -> None:
    """Claim: after a cut Muon's steps are bit-equal to those on a small model that was never cut, loaded with its
    slices.
    """
    model, inputs, groups = mlp()
    both = muon_and_adamw(model, settings)
    for _ in range(2):
        step_both(model, both, inputs, lambda: None)
    keep = some_keep(groups)
    shrink(model, both, groups, keep)
    fresh = mlp_model(*(int(keep[each.name].sum()) for each in groups))
    fresh.load_state_dict(model.state_dict())
    others = muon_and_adamw(fresh, settings)
    for one, other in zip(others, both, strict=True):
        one.load_state_dict(copy.deepcopy(other.state_dict()))
    for _ in range(5):
        step_both(model, both, inputs, lambda: None)
        step_both(fresh, others, inputs, lambda: None)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), fresh.parameters(), strict=True))


def test_muon_in_a_run() -> None:
    """Claim: Muon and AdamW train one model under one loop, which lands, and units come back with their momenta."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    both = muon_and_adamw(model, {})
    inputs, targets = torch.randn(32, 8), torch.randint(3, (32,))
    controller = setpoint.PricedController(regrow=True)
    budget = setpoint.Budget.fraction(0.5, of="flops")
    loop = setpoint.attach(model, both, budget, example=(inputs,), total_steps=60, controller=controller)
    for _ in range(60):
        nn.functional.cross_entropy(model(inputs), targets).backward()
        for each in both:
            each.step()
            each.zero_grad()
    summary = loop.finish()
    assert summary.budget_met and summary.resizes > 0, summary
    for parameter in (model[0].weight, model[2].weight):
        assert both[0].state[parameter]["momentum_buffer"].shape == parameter.shape


class Without(nn.Module):
    """A linear layer without masked weights: its active ones are one vector, zeros stand in the others' places."""

    def __init__(self, weight: torch.Tensor, mask: torch.Tensor) -> None:
        super().__init__()
        self.active, self.mask = nn.Parameter(weight[mask].clone()), mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.zeros(self.mask.shape, dtype=x.dtype).masked_scatter(self.mask, self.active)
        return nn.functional.linear(x, weight)


@pytest.mark.parametrize(("kind", "settings"), ROWS)
def test_masked_weights_train_as_if_they_did_not_exist(kind: type[Optimizer], settings: dict[str, Any]) -> None:
    """Claim: after a mask, active weights and their moments are those of a layer without the masked ones, in fp64 to
    1e-10 over 5 further steps; the masked ones stay exactly zero.
    """
    torch.manual_seed(0)
    layer, mask = nn.Linear(6, 5, bias=False).double(), torch.rand(5, 6) < 0.5
    optimizer = kind(layer.parameters(), **settings)

    def steps(model: nn.Module, trained: Optimizer, seed: int) -> None:
        trained.zero_grad()
        x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        if model is layer and seed > 1:
            mask_gradients({"weight": layer.weight}, {"weight": mask})
        trained.step()

    steps(layer, optimizer, 0), steps(layer, optimizer, 1)
    mask_weights({"weight": layer.weight}, optimizer, {"weight": mask})
    twin = Without(layer.weight.detach(), mask)
    twin_optimizer = kind(twin.parameters(), **settings)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"] = {
        at: {k: v[mask] if isinstance(v, torch.Tensor) and v.shape == mask.shape else v for k, v in values.items()}
        for at, values in state["state"].items()
    }
    twin_optimizer.load_state_dict(state)
    for seed in range(2, 7):
        steps(layer, optimizer, seed), steps(twin, twin_optimizer, seed)
        assert not layer.weight.detach()[~mask].any()
    torch.testing.assert_close(layer.weight.detach()[mask], twin.active.detach(), rtol=0, atol=1e-10)
    for key, value in moments(optimizer, layer.weight).items():
        torch.testing.assert_close(value[mask], twin_optimizer.state[twin.active][key], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "settings"), ROWS)
def test_of_a_masked_weight_nothing_is_remembered(kind: type[Optimizer], settings: dict[str, Any]) -> None:
    """Claim: after a mask and further steps the state of masked weights is, to the bit, that of weights of zero which
    had gradients of zero from the beginning, so one that comes in starts as they would.
    """
    torch.manual_seed(0)
    layer, mask = nn.Linear(6, 5, bias=False).double(), torch.rand(5, 6) < 0.5
    fresh = nn.Linear(6, 5, bias=False).double()
    nn.init.zeros_(fresh.weight)
    optimizer, other = kind(layer.parameters(), **settings), kind(fresh.parameters(), **settings)
    for number in range(6):
        optimizer.zero_grad()
        layer(torch.randn(8, 6, dtype=torch.float64)).square().mean().backward()
        if number == 3:
            mask_weights({"weight": layer.weight}, optimizer, {"weight": mask})
        elif number > 3:
            mask_gradients({"weight": layer.weight}, {"weight": mask})
        fresh.weight.grad = torch.zeros_like(fresh.weight)
        optimizer.step(), other.step()
    for key, value in moments(optimizer, layer.weight).items():
        assert torch.equal(value[~mask], other.state[fresh.weight][key][~mask]), key


class Scaled(torch.optim.SGD):
    """SGD whose step grows with the size of the tensor: every state has the right shape, the update has not."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter -= group["lr"] * parameter.numel() ** 0.5 * parameter.grad


class Noisy(torch.optim.SGD):
    """SGD with noise from the global generator."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter += torch.randn(parameter.shape)


class Factored(torch.optim.SGD):
    """SGD with a square state that on square parameters has their shape by accident."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["left"] = torch.eye(parameter.shape[0])


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (torch.optim.Adafactor, {}, "Adafactor keeps state"),
        (torch.optim.LBFGS, {}, "LBFGS keeps state"),
        (Scaled, {"lr": 0.0}, "Scaled cannot follow a cut"),
        (Noisy, {"lr": 0.1}, "Noisy cannot follow a cut"),
        (Factored, {"lr": 0.1}, "Factored keeps state"),
    ],
)
def test_optimizers_that_cannot_follow_are_refused(kind: type[Optimizer], settings: dict[str, Any], words: str) -> None:
    """Claim: whoever looks at the shape is refused, with what to use instead; no random number is drawn."""
    before = torch.get_rng_state()
    with pytest.raises(OptimizerError, match=words) as caught:
        check_optimizer(kind([nn.Parameter(torch.ones(3, 3))], **settings))
    assert "AdamW" in str(caught.value)
    assert torch.equal(before, torch.get_rng_state())


def test_sparse_adam_follows_a_cut_of_an_embedding() -> None:
    """Claim: SparseAdam's moments are cut with a sparse embedding, which then trains like its masked twin."""
    features = hand_made("features", 4, "0.weight:1:produce 1.weight:1:consume", "0:embedding_dim 1:in_features")
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2)).double()
    inputs, keep = (torch.tensor([0, 3, 3]),), {"features": np.array([True, False, True, True])}
    optimizer = torch.optim.SparseAdam([model[0].weight], lr=0.1)
    train_step(model, optimizer, inputs)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SparseAdam([twin[0].weight], lr=0.1)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    shrink(model, optimizer, (features,), keep)
    for each in (twin[0].weight, *moments(twin_optimizer, twin[0].weight).values()):
        each.data[:, 1] = 0
    twin[1].weight.data[:, 1] = 0
    for _ in range(3):
        train_step(model, optimizer, inputs)
        train_step(twin, twin_optimizer, inputs)
    torch.testing.assert_close(model[0].weight, twin[0].weight[:, [0, 2, 3]], rtol=0, atol=1e-10)


def test_an_optimizer_of_another_model_is_refused() -> None:
    """Claim: an optimizer with none of the model's parameters raises OptimizerError; one with some passes."""
    model = mlp_model()
    check_trains([torch.optim.SGD(list(model.parameters())[:1], lr=0.1)], model)
    with pytest.raises(OptimizerError, match="none of this model's parameters"):
        check_trains([torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)], model)
