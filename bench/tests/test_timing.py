"""Timing: stages as they were trained, and seconds that add up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fragile import Notes
from setpoint.errors import ReportError
from setpoint_bench.interleaved import run_interleaved
from setpoint_bench.method import Dense, Setpoint, method_named
from setpoint_bench.report.folder import read_results
from setpoint_bench.runner import finished, grid
from setpoint_bench.stages import Stage, filled, hollow, load_stages, save_stages
from setpoint_bench.tasks.digits import digits
from setpoint_bench.timing import measure, with_timed

TASK = digits(epochs=2, width=8)


def test_a_hollow_model_keeps_shapes_ties_and_buffers() -> None:
    """Without weights a model keeps its shapes, strides, tied weights and buffers; filled it trains again."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(3, 4, bias=False))
    model[3].weight = model[0].weight
    model[1].running_mean.fill_(7.0)
    empty = hollow(model)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())
    full = filled(empty, torch.device("cpu"))
    assert full[3].weight is full[0].weight
    assert torch.equal(full[1].running_mean, torch.full((4,), 7.0))
    full(torch.randn(5, 3)).sum().backward()
    assert [tuple(p.shape) for p in full.parameters()] == [tuple(p.shape) for p in model.parameters()]


def test_stages_of_code_that_has_moved_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose models are of a module that is gone, as before a move, holds no stages to time."""
    moved = ModuleType("moved_away")
    monkeypatch.setitem(sys.modules, "moved_away", moved)
    exec("from torch import nn\nclass Net(nn.Module): pass", moved.__dict__)
    save_stages(tmp_path, [Stage(3, moved.Net())])
    assert len(load_stages(tmp_path)) == 1
    monkeypatch.delitem(sys.modules, "moved_away")
    assert load_stages(tmp_path) == ()


def test_runs_are_timed_by_their_stages(tmp_path: Path) -> None:
    """Each run leaves its stages; its seconds are steps times step seconds, and the method's own beside them."""
    cells = grid(TASK, [Dense(), Setpoint(), method_named("static")], [0.5], [0])
    results = run_interleaved(cells, tmp_path, Notes())
    shares: list[float] = []
    timings = measure(finished(cells, tmp_path), tmp_path, shares.append, rounds=2)
    assert shares == sorted(shares) and shares[-1] == 1.0
    for result, timing in zip(results, timings, strict=True):
        stages = load_stages(tmp_path / result.folder)
        assert sum(timing.stage_steps) == result.steps == TASK.steps
        assert timing.stage_steps == tuple(stage.num_steps for stage in stages if stage.num_steps)
        assert len(timing.rounds) == 2 and min(timing.rounds) > 0
        plain = sum(steps * each for steps, each in zip(timing.stage_steps, timing.step_seconds, strict=True))
        assert timing.seconds == pytest.approx(plain + result.overhead_seconds)
    dense, pruned, _ = timings
    assert (dense.own_seconds, len(dense.stage_steps)) == (0.0, 1)
    assert pruned.own_seconds > 0 and len(pruned.stage_steps) > 1
    assert pruned.step_seconds[0] == dense.step_seconds[0]  # equal shapes are timed once
    read = {cell.method: cell.timing for cell in read_results(tmp_path).cells}
    assert read["setpoint"] and read["setpoint"].rounds == pruned.rounds
    assert len(dense.control) == 2 and set(dense.control) != {1.0}  # dense is timed twice in each round
    assert read["setpoint"].control == pruned.control == dense.control
    assert len((tmp_path / "timing.jsonl").read_text().splitlines()) == 3
    assert json.loads((tmp_path / "timing.jsonl").read_text().splitlines()[0])["environment"]["torch"]


def test_the_dense_model_counts_by_the_mean_of_its_two_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all others are divided by is measured twice in a round; the ratio of the two is the control."""
    cells = grid(TASK, [Dense()], [0.5], [0])
    run_interleaved(cells, tmp_path, Notes())
    turns = iter([1.0, 3.0, 8.0, 2.0])  # the second round goes backwards
    monkeypatch.setattr("setpoint_bench.timing._step_seconds", lambda _: next(turns))
    (found,) = measure(finished(cells, tmp_path), tmp_path, lambda _: None, rounds=2)
    assert found.control == (3.0, 4.0)
    assert found.rounds == (2.0 * TASK.steps, 5.0 * TASK.steps)


def test_what_was_timed_before_is_timed_again(tmp_path: Path) -> None:
    """Seconds of two measurements do not compare: the cells of the first join the second; others' tasks do not."""
    dense, small = (grid(TASK, [method_named(name)], [0.5], [0]) for name in ("dense", "small"))
    lines = [
        {"task": TASK.name, "method": "dense", "budget": None, "seed": 0, "seconds": 1.0, "schema": 2},
        {"task": "other", "method": "gmp", "budget": 0.5, "seed": 0, "seconds": 1.0, "schema": 2},
    ]
    path = tmp_path / "timing.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"task": "half')
    assert with_timed(small, tmp_path) == (*small, *dense)
    assert with_timed(dense, tmp_path) == dense
    path.write_text(json.dumps({**lines[0], "schema": 9}) + "\n")
    with pytest.raises(ReportError, match=r"timing.jsonl has schema 9: delete it"):
        with_timed(small, tmp_path)
