"""Timing: stages as they were trained, and seconds that add up."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fragile import Notes
from setpoint import find_groups, shrink
from setpoint.errors import ReportError
from setpoint_bench.interleaved import run_interleaved
from setpoint_bench.method import Dense, Setpoint, method_named
from setpoint_bench.report.folder import read_results
from setpoint_bench.runner import finished, grid
from setpoint_bench.stages import built, load_stages, save_stages, stage_of
from setpoint_bench.task import dense_widths
from setpoint_bench.tasks.digits import digits
from setpoint_bench.timing import measure, with_timed

TASK = digits(epochs=2, width=8)


@dataclass
class Payload:
    """What a pickle can do when it is opened: make a folder."""

    path: Path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_stage_is_built_again_from_its_sizes(tmp_path: Path) -> None:
    """A model that was cut in the middle of a run comes back with its shapes, strides and sizes, and trains."""
    model, widths = TASK.build(dense_widths(TASK)), dense_widths(TASK)
    groups = find_groups(model, TASK.example())
    keep = {group.name: np.arange(group.num_units) > 0 for group in groups}
    shrink(model, None, groups, keep)
    save_stages(tmp_path, [replace(stage_of(model, widths), num_steps=3)])
    (stage,) = load_stages(tmp_path)
    again = built(stage, TASK)
    own, theirs = ({**dict(each.named_parameters()), **dict(each.named_buffers())} for each in (model, again))
    assert {name: (t.shape, t.stride()) for name, t in own.items()} == {
        n: (t.shape, t.stride()) for n, t in theirs.items()
    }
    assert str(again) == str(model) and stage.num_steps == 3
    TASK.loss(again, *next(TASK.batches(seed=0))).backward()


def test_timing_runs_no_code_that_a_folder_holds(tmp_path: Path) -> None:
    """A pickle that somebody put into a shared folder, under the name that one had before, is not opened."""
    cells = grid(digits(epochs=1, width=8), [Dense()], [0.5], [0])
    (result,) = run_interleaved(cells, tmp_path, Notes())
    torch.save([(result.steps, Payload(tmp_path / "was_run"))], tmp_path / result.folder / "stages.pt")
    (timing,) = measure(finished(cells, tmp_path), tmp_path, lambda _: None, rounds=1)
    assert timing.stage_steps == (result.steps,)
    assert not (tmp_path / "was_run").exists()


def test_runs_are_timed_by_their_stages(tmp_path: Path) -> None:
    """Each run leaves its stages; its seconds are steps times step seconds, and the method's own beside them."""
    cells = grid(TASK, [Dense(), Setpoint(), method_named("gmp")], [0.5], [0])
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
