"""The recorded step of a model is kept, and serves the next run of an equal model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import setpoint
from setpoint.cache import keep, recall
from setpoint.groups.group import widths_of
from setpoint.groups.trace import trace
from setpoint.resources import costing
from setpoint.resources.kept_tape import kept_tape, tape_key
from setpoint.resources.memory import MemoryCost
from setpoint.resources.tape import Tape


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SETPOINT_CACHE", "on")


class Both(nn.Module):
    """Convolutions with a norm and dropout, then attention over positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1))
        self.second, self.norm = nn.Conv1d(16, 16, 1), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x)).transpose(1, 2)
        q, k, v = (each.unflatten(-1, (2, 8)).transpose(1, 2) for each in self.qkv(self.norm(y)).chunk(3, -1))
        y = y + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: torch.Tensor = y + self.down(nn.functional.gelu(self.up(y)))
        return out


def recorded(model: nn.Module, optimizer: Optimizer, example: Any) -> tuple[str, Callable[[], Tape]]:
    """The key of a step, and what records it."""
    traced = trace(model, example)
    groups = tuple(group for group in traced.groups if group.lossless)
    make = partial(costing.replica, model, (optimizer,), example, groups)
    return tape_key(model, (optimizer,), groups, traced.key, "step"), partial(costing._tape, make, groups, [], None)


def never() -> Tape:
    """Nothing is recorded."""
    raise AssertionError("recorded again")


def facts(tape: Tape) -> list[Any]:
    """All that a tape says."""
    operations = [(each.target, each.leaves, each.spec, each.outputs) for each in tape.operations]
    return [operations, list(map(astuple, tape.storages)), tape.events]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_kept_tape_is_the_recorded_one(kind: type[Optimizer]) -> None:
    """Claim: every operation, size, storage and event comes back, and nothing is recorded for an equal model."""
    found: list[Tape] = []
    for make in (None, never):
        model, example = Both(), (torch.randn(2, 4, 8),)
        key, record = recorded(model, kind(model.parameters(), lr=1e-3), example)
        assert key
        found.append(kept_tape(key, make or record))
    assert found[0].operations and facts(found[0]) == facts(found[1])
    widths = widths_of(trace(model, example).groups)
    assert MemoryCost(found[0]).total(widths) == MemoryCost(found[1]).total(widths)


SETTINGS: dict[type[Optimizer], list[dict[str, Any]]] = {
    torch.optim.SGD: [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 0.1},
        {"foreach": True},
    ],
    torch.optim.Adam: [{}, {"amsgrad": True}, {"weight_decay": 0.1}, {"foreach": True}, {"fused": True}],
    torch.optim.AdamW: [{}, {"weight_decay": 0.0}, {"maximize": True}],
    torch.optim.NAdam: [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    torch.optim.Adamax: [{}, {"weight_decay": 0.1}],
    torch.optim.Adagrad: [{}, {"lr_decay": 0.1}],
    torch.optim.Adadelta: [{}, {"foreach": True}],
    torch.optim.RMSprop: [{}, {"centered": True}, {"momentum": 0.9}],
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_equal_keys_mean_equal_steps(kind: type[Optimizer]) -> None:
    """Claim: of all settings, rates and numbers of steps, those with one key make the same step but for its floats."""
    found: dict[str, list[Any]] = {}
    for settings in SETTINGS[kind]:
        for rate, steps in ((0.1, 0), (0.1, 1), (0.02, 30)):
            model, example = small()
            optimizer = kind(model.parameters(), lr=rate, **settings)
            for _ in range(steps):
                model(*example).square().sum().backward()
                optimizer.step()
            optimizer.zero_grad()
            key, record = recorded(model, optimizer, example)
            assert key
            step = facts(record())
            step[0] = [[target, [_plain(leaf) for leaf in leaves], *rest] for target, leaves, *rest in step[0]]
            assert found.setdefault(key, step) == step, (settings, steps)
    assert len(found) >= len(SETTINGS[kind])  # each setting has its own


def _plain(leaf: Any) -> Any:
    return "float" if isinstance(leaf, float) else leaf


def small() -> tuple[nn.Module, Any]:
    """Two layers, and an example."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(4, 4),)


def test_the_key_follows_groups_and_what_is_trained() -> None:
    """Claim: other blocks, another kind of step, and fewer trained parameters are other keys."""
    model, example = small()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    groups = trace(model, example).groups
    wider = tuple(replace(group, multiple_of=2 * group.multiple_of) for group in groups)
    assert len({tape_key(model, (plain,), each, "f", what) for each in (groups, wider) for what in "ab"}) == 4
    some = torch.optim.SGD(list(model.parameters())[1:], lr=0.1)
    assert recorded(model, some, example)[0] not in (recorded(model, plain, example)[0], "")


class Own(torch.optim.SGD):
    """An optimizer of the user's."""


def strangers() -> dict[str, tuple[nn.Module, Optimizer]]:
    """Optimizers of which shapes and switches do not say everything."""
    model, _ = small()
    weights, found = list(model.parameters()), dict[str, Optimizer]()
    found["own class"] = Own(weights, lr=0.1)
    found["counts its steps"] = torch.optim.RAdam(weights, lr=0.1)
    found["hook"] = torch.optim.SGD(weights, lr=0.1)
    found["hook"].register_step_post_hook(lambda *_: None)
    found["other parameters"] = torch.optim.SGD([*weights, nn.Parameter(torch.zeros(7))], lr=0.1)
    found["odd state"] = torch.optim.SGD(weights, lr=0.1)
    found["odd state"].state["note"] = 3  # type: ignore[index]
    found["odd setting"] = torch.optim.SGD(weights, lr=0.1)
    found["odd setting"].param_groups[0]["more"] = object()
    return {name: (model, each) for name, each in found.items()}


@pytest.mark.parametrize("name", strangers())
def test_what_is_not_known_has_no_key(name: str) -> None:
    """Claim: such an optimizer has no key, and is no error; nor has a model without a fingerprint."""
    model, optimizer = strangers()[name]
    assert tape_key(model, (optimizer,), (), "some", "step") == ""
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    assert tape_key(model, (plain,), (), "some", "step") and tape_key(model, (plain,), (), "", "step") == ""


def test_a_setting_with_a_number_as_its_name_is_no_error() -> None:
    """Claim: settings are told apart by their names as text."""
    model, _ = small()
    plain, odd = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    odd.param_groups[0][7] = 1  # type: ignore[index]
    keys = {tape_key(model, (each,), (), "some", "step") for each in (plain, odd)}
    assert len(keys) == 2 and "" not in keys


def test_a_hook_on_all_optimizers_has_no_key() -> None:
    """Claim: while one is set nothing is kept."""
    model, _ = small()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = register_optimizer_step_pre_hook(lambda *_: None)
    try:
        assert tape_key(model, (plain,), (), "some", "step") == ""
    finally:
        hook.remove()
    assert tape_key(model, (plain,), (), "some", "step")


def test_modes_of_pytorch_make_another_key() -> None:
    """Claim: anomaly mode and autocast without its cache are other keys; hooks on saved tensors have none."""
    model, example = small()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)

    def key() -> str:
        return recorded(model, plain, example)[0]

    keys = [key()]
    with torch.autograd.set_detect_anomaly(True):
        keys.append(key())
    for cached in (True, False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            keys.append(key())
    assert len(set(keys)) == 4 and all(keys)
    with torch.autograd.graph.save_on_cpu():
        assert key() == ""


@pytest.mark.parametrize("damage", ["operation", "kind", "place", "event", "length", "whole"])
def test_damaged_facts_are_recorded_again(damage: str) -> None:
    """Claim: an operation that is not registered, a wrong kind or place, and anything else lead to a new record."""
    model, example = Both(), (torch.randn(2, 4, 8),)
    key, record = recorded(model, torch.optim.SGD(model.parameters(), lr=0.1), example)
    first = kept_tape(key, record)
    held = recall(key)
    if damage == "operation":
        held["targets"][0] = "aten.nothing.default"
    elif damage == "kind":
        held["operands"][0][3] = "nn"
    elif damage == "place":
        held["operations"][0][0] = 10_000
    elif damage == "event":
        held["events"][0][0] = -1
    elif damage == "length":
        held["storages"][0] = [float("inf"), []]
    keep(key, ["nothing"] if damage == "whole" else held)
    assert facts(kept_tape(key, record)) == facts(first)
    assert facts(kept_tape(key, never)) == facts(first)  # and that one is kept


def test_a_tape_with_a_foreign_argument_is_not_kept() -> None:
    """Claim: what cannot be written is used as it is, and recorded the next time."""
    model, example = Both(), (torch.randn(2, 4, 8),)
    key, record = recorded(model, torch.optim.SGD(model.parameters(), lr=0.1), example)
    plain = record()
    strange = replace(plain.operations[0], leaves=(*plain.operations[0].leaves, object()))
    odd = replace(plain, operations=(strange, *plain.operations[1:]))
    assert kept_tape(key, lambda: odd) is odd and recall(key) is None


def test_a_second_run_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a run with a budget of memory whose model was seen before records no step, and predicts the same."""
    costs = []
    for _ in range(2):
        model, example = Both(), (torch.randn(2, 4, 8),)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loop = setpoint.attach(model, optimizer, "90% memory", example=example, total_steps=10)
        costs.append(loop.spending.costs["memory"].total(loop.widths))
        loop.detach()
        monkeypatch.setattr(costing, "_tape", lambda make, groups, seen: never())
    assert costs[0] == costs[1]
