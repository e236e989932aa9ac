"""Seconds of Setpoint's own work: how they are measured, and what tables say of one measurement and of several."""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from scripts import script

ABOUT = {"environment": {"cpu": "none", "threads": 1, "torch": "2.13"}, "date": "2026-01-01", "seed": 0}


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    return script("growth", monkeypatch)


def test_each_kind_of_work_is_a_median(growth: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: discovery and the cut are measured three times, the cut on all units; a decision is fifteen times."""
    small = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)), (torch.randn(2, 4),)
    monkeypatch.setattr(growth, "llama", lambda layers, width: small)
    cut, threads, clock = [], torch.get_num_threads(), iter(range(100))

    def seconds(function: Callable[[], object]) -> float:
        function()
        return float(next(clock))

    monkeypatch.setattr(growth, "seconds", seconds)  # the script's own collects garbage each time, which is slow here
    shrink = growth.setpoint.shrink
    monkeypatch.setattr(
        growth.setpoint, "shrink", lambda model, *args: cut.append(_size(model)) or shrink(model, *args)
    )
    try:
        found = growth.measure(1, 64)
    finally:
        torch.set_num_threads(threads)
    made = {kind: len(each) for kind, each in found["rounds"].items()}
    assert made == {"discovery_s": 3, "decision_s": 15, "cut_s": 3}
    assert all(found[kind] == statistics.median(each) for kind, each in found["rounds"].items())
    assert cut == [found["params"]] * 3


def _size(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def test_garbage_is_collected_before_a_call_and_not_held_back_in_it(growth: ModuleType) -> None:
    """Claim: a call finds no garbage of earlier work, and Python's collection is on in it."""
    seen: list[tuple[bool, bool]] = []
    gone: list[Any] = [_Ring()]
    name = id(gone.pop())
    growth.seconds(lambda: seen.append((gc.isenabled(), any(id(each) == name for each in _rings()))))
    assert seen == [(True, False)]


class _Ring:
    """Holds itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.own = self


def _rings() -> list[_Ring]:
    return [each for each in gc.get_objects() if type(each) is _Ring]


@pytest.mark.parametrize("repeated", [True, False])
def test_no_line_goes_through_cuts_that_were_measured_once(growth: ModuleType, tmp_path: Path, repeated: bool) -> None:
    """Claim: the table has the line through the cuts where each is a median, and else says that each is one call."""
    kinds = ("discovery_s", "decision_s", *(["cut_s"] if repeated else []))
    rows = [
        {
            "layers": layers, "width": 512, "params": 1000, "groups": 2, "units": 100,
            "discovery_s": layers / 10, "decision_s": layers / 1e4, "cut_s": layers / 500,
            "rounds": {kind: [0.0] * 3 for kind in kinds},
        }
        for layers in (12, 24)
    ]  # fmt: skip
    file = tmp_path / "growth.json"
    file.write_text(json.dumps({"machines": [{**ABOUT, "models": rows}]}), encoding="utf-8")
    from tables.costs import growth_table

    said = growth_table(file).splitlines()[-1]
    assert "discovery 100 ms a layer" in said
    assert ("cut 2 ms a layer" in said) == repeated
    assert ("Each cut was measured once" in said) != repeated


def test_one_pair_has_no_range(growth: ModuleType, tmp_path: Path) -> None:
    """Claim: a range stands behind a median of several pairs, and not behind one measurement."""
    found = {"seconds_median": 6.45, "seconds_range": [6.45, 6.45], "steps_median": 43.8, "steps_range": [43.8, 43.8]}
    spread = {**found, "steps_range": [40.0, 47.6]}
    row = {
        "date": "2026-01-01",
        "pairs": 2,
        "cold": spread,
        "latency": {"date": "2026-01-01", "pairs": 1, "cold": found},
    }
    file = tmp_path / "attach.json"
    file.write_text(
        json.dumps({**ABOUT, "what": "seconds", "machines": [{**ABOUT, "models": {"net": row}}]}), encoding="utf-8"
    )
    from tables.costs import attach_table

    several, one = (line for line in attach_table(file).splitlines() if "`net`" in line)
    assert "6.45 s, 43.8 steps (40.0 to 47.6) |" in several
    assert "6.45 s, 43.8 steps |" in one


def test_a_record_takes_the_place_of_its_own_processors_alone(growth: ModuleType, tmp_path: Path) -> None:
    """Claim: what other processors have measured stays, and so does all else in the file; no folder need be there."""
    import record

    file = tmp_path / "new" / "folder" / "growth.json"
    other = {**ABOUT, "environment": {**ABOUT["environment"], "cpu": "another"}, "models": []}
    record.write({"machines": [other], "by_seconds": 1}, file)
    for number in 1, 2:
        record.keep_machine({"models": [number]}, file, shown={})
    held = record.held_in(file)
    assert held["by_seconds"] == 1 and held["machines"][0] == other
    assert [each["models"] for each in held["machines"]] == [[], [2]]


def test_a_goal_is_judged_by_the_median_unless_runs_lie_on_both_sides(growth: ModuleType) -> None:
    """Claim: runs of one thing on both sides of the limit decide nothing; those of several things have a median."""
    from tables.seconds_goals import Goal

    def reached(now: list[float], same: bool = True) -> str:
        return Goal("it", 1.0, str, now, same=same).line.split("|")[-2].strip()

    assert [reached([0.8, 1.0]), reached([1.1, 1.2]), reached([0.8, 0.9, 1.1])] == ["yes", "**no**", "undecided"]
    assert [reached([0.8, 0.9, 1.1], same=False), reached([0.9, 1.1, 1.2], same=False)] == ["yes", "**no**"]
