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
    return tape_key(model, (optimizer,), groups, traced.key, "step"), partial(costing._tape, make, groups, [])


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


def test_the_key_follows_what_decides_on_operations() -> None:
    """Claim: an optimizer's kind, a switch, and a number that becomes 0 change the key; a learning rate does not."""
    model, example = Both(), (torch.randn(2, 4, 8),)
    kinds: list[Callable[[Any], Optimizer]] = [
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        partial(torch.optim.SGD, lr=0.1, weight_decay=0.1),
        partial(torch.optim.Adam, lr=0.1),
        partial(torch.optim.Adam, lr=0.1, amsgrad=True),
    ]
    keys = [recorded(model, make(model.parameters()), example)[0] for make in kinds]
    assert all(keys) and len(set(keys)) == len(keys)
    assert recorded(model, torch.optim.SGD(model.parameters(), lr=0.7), example)[0] == keys[0]
    some = torch.optim.SGD(list(model.parameters())[1:], lr=0.1)
    assert recorded(model, some, example)[0] not in keys
    groups = trace(model, example).groups
    wider = tuple(replace(group, multiple_of=2 * group.multiple_of) for group in groups)
    optimizers = (kinds[0](model.parameters()),)
    assert len({tape_key(model, optimizers, each, "f", what) for each in (groups, wider) for what in "ab"}) == 4


def test_a_step_that_started_is_another() -> None:
    """Claim: an optimizer with momentum that has made a step has another key, since its first step makes buffers."""
    model, example = Both(), (torch.randn(2, 4, 8),)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = recorded(model, optimizer, example)[0]
    model(*example).sum().backward()
    optimizer.step()
    assert recorded(model, optimizer, example)[0] not in (before, "")


class Own(torch.optim.SGD):
    """An optimizer of the user's."""


def test_what_is_not_known_has_no_key() -> None:
    """Claim: no key for an optimizer of the user's, for one with a hook, and for a model without a fingerprint."""
    model, example = Both(), (torch.randn(2, 4, 8),)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    hooked = torch.optim.SGD(model.parameters(), lr=0.1)
    hooked.register_step_post_hook(lambda *_: None)
    assert [recorded(model, each, example)[0] for each in (Own(model.parameters(), lr=0.1), hooked)] == ["", ""]
    assert tape_key(model, (plain,), (), "", "step") == ""
    assert tape_key(model, (plain,), (), "some", "step")


@pytest.mark.parametrize("damage", ["operation", "kind", "place", "whole"])
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
