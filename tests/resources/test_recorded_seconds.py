"""Slow steps that were recorded are not timed again."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn

from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import trace
from setpoint.resources import costing
from setpoint.resources.latency import LatencyCost
from setpoint.resources.lengths import narrowing_widths
from setpoint.resources.memory import MemoryCost
from setpoint.resources.replica import Replica, replica
from setpoint.resources.table import Table
from setpoint.spending import seconds as seconds_file


class Clocked:
    """A copy whose steps take a second and one for every unit, by a clock that only they turn."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        self.widths, self.now = dict(widths), 0.0

    def step(self) -> None:
        """Turn the clock."""
        self.now += 1.0 + sum(self.widths.values())

    def held(self) -> list[torch.Tensor]:
        """Nothing."""
        return []

    def narrow(self, groups: tuple[Group, ...], widths: Mapping[str, int]) -> tuple[Group, ...]:
        """Take these widths."""
        self.widths = dict(widths)
        return groups


def test_what_recording_takes_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: readings are the plain steps' seconds at every width, however long recording takes."""
    copy = Clocked({"a": 2})
    monkeypatch.setattr(seconds_file, "_now", lambda synchronize: copy.now)
    recorded = [({"a": width}, 1.0 + width + 7.5) for width in (8, 6, 2)]
    found = costing._plain(copy, (), recorded, {"a": 1})
    assert found == [({"a": width}, pytest.approx(1.0 + width)) for width in (8, 6, 2, 1)]
    faster = costing._plain(Clocked({"a": 2}), (), [({"a": 8}, 9.0), ({"a": 2}, 0.0)], {"a": 1})
    assert faster[0][1] == 9.0  # a clock that stands still takes nothing off


@pytest.mark.parametrize("slow", [True, False])
def test_slow_steps_are_timed_while_they_are_recorded(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a slow model is copied once, its five widths are timed there, and the cost fits; a fast one is timed."""
    monkeypatch.setattr(costing, "_SLOW_S", 0.0 if slow else 1e9)
    ticks = count()  # a reading that noise takes below 0 is left out, so the clock is ours
    monkeypatch.setattr(seconds_file, "_now", lambda synchronize: float(next(ticks)))
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    example = (torch.randn(32, 16),)
    optimizer, groups = torch.optim.AdamW(model.parameters()), trace(model, example).groups
    copies: list[bool] = []

    def make(widths: Mapping[str, int], *, data: bool) -> Any:
        copies.append(data)
        return replica(model, (optimizer,), example, groups, widths, data=data)

    seen: list[costing.Reading] = []
    table = Table(torch.device("cpu"))
    cost = LatencyCost(costing._tape(make, groups, seen, None), groups, table)
    fitted, joules = costing._calibrated(cost, table, make, groups, None, seen)
    assert copies == [True] * (1 if slow else 2) and joules == []
    least = costing._narrowing(groups)[-1]
    assert [dict(widths) for widths, _ in seen] == ([*narrowing_widths(groups, dense=False)[0], least] if slow else [])
    assert all(taken > 0 for _, taken in seen) and fitted.total(widths_of(groups)) > 0


def test_where_no_seconds_are_asked_for_no_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the step of a slow model is recorded at no more widths than the tape needs, and one more checks memory."""
    monkeypatch.setattr(costing, "_SLOW_S", 0.0)
    model, example = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 8)), (torch.randn(32, 16),)
    optimizer, groups, steps = torch.optim.AdamW(model.parameters()), trace(model, example).groups, list[int]()
    step = Replica.step

    def counted(copy: Replica) -> None:
        steps.append(1)
        step(copy)

    monkeypatch.setattr(Replica, "step", counted)

    def make(widths: Mapping[str, int], *, data: bool) -> Any:
        return replica(model, (optimizer,), example, groups, widths, data=data)

    vectors = narrowing_widths(groups, dense=False)[0]
    assert costing._tape(make, groups, None, None).operations
    assert len(steps) == 1 + len(vectors)  # the first makes the optimizer's state
    steps.clear()
    peaks = list[costing.Reading]()
    cost = MemoryCost(costing._tape(make, groups, None, peaks))
    assert len(steps) == 1 + len(vectors) + len(peaks) and len(peaks) == 1
    assert sum(peaks[0][0].values()) < sum(vectors[-1].values())
    assert [cost.total(widths) for widths, _ in peaks] == pytest.approx([peak for _, peak in peaks], rel=1e-3)
    assert costing._peak(make, groups) == peaks[0]  # a copy of its own


def test_an_optimizer_that_counts_is_recorded_on_one_copy() -> None:
    """Claim: the check of memory is no step between recorded ones, of which RAdam makes another kind after five."""
    model, example = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8)), (torch.randn(32, 16),)
    optimizer, groups, copies = torch.optim.RAdam(model.parameters()), trace(model, example).groups, list[bool]()

    def make(widths: Mapping[str, int], *, data: bool) -> Any:
        copies.append(data)
        return replica(model, (optimizer,), example, groups, widths, data=data)

    assert costing._tape(make, groups, None, []).operations
    assert copies == [True]
