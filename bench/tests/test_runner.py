"""The runners: same results however cells are run, honest counts, and folders that survive whatever ends a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import pytest
import torch
from torch import nn

import setpoint
from notes import Notes
from setpoint.errors import ReportError
from setpoint_bench import training
from setpoint_bench.family import ByFactor
from setpoint_bench.fingerprint import fingerprint
from setpoint_bench.images import ten_views
from setpoint_bench.method import Dense, Method, Setpoint, Small, method_named
from setpoint_bench.recipe import Recipe
from setpoint_bench.results import FILE, Result, append_result
from setpoint_bench.runner import finished, grid, run, run_interleaved
from setpoint_bench.simple_task import SimpleTask, dense_widths
from setpoint_bench.task import BenchError, Split
from setpoint_bench.tasks.digits import digits
from setpoint_bench.tensors import Tensors
from setpoint_bench.worker import LOG

TASK = digits(epochs=1, width=16)
TINY = digits(epochs=1, width=4)
STRUCTURED: tuple[Method, ...] = (Dense(), Small(), Setpoint())


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Result]]:
    """All methods trained side by side, and the folder they wrote."""
    out = tmp_path_factory.mktemp("together")
    results = run_interleaved(grid(TASK, STRUCTURED, [0.5], [0]), out, Notes())
    return out, {result.method: result for result in results}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The dense run of the tiny task."""
    (result,) = run_interleaved(grid(TINY, [Dense()], [0.5], [0]), tmp_path_factory.mktemp("tiny"), Notes())
    return result


@pytest.mark.parametrize(
    "method",
    [pytest.param(each, marks=[pytest.mark.slow] * (each.name != "setpoint")) for each in STRUCTURED],
    ids=lambda method: method.name,
)
def test_interleaving_changes_nothing(method: Method, together: tuple[Path, dict[str, Result]], tmp_path: Path) -> None:
    """A method trained alone ends with the very same value, widths and FLOPs as beside the others."""
    torch.manual_seed(123)
    (alone,) = run_interleaved(grid(TASK, [method], [0.5], [0]), tmp_path, Notes())
    beside = together[1][method.name]
    for name in ("value", "widths", "final_flops", "train_flops", "final_params", "steps"):
        assert getattr(alone, name) == getattr(beside, name)


def test_counts(together: tuple[Path, dict[str, Result]]) -> None:
    """Training FLOPs are steps x FLOPs per step where nothing is cut, and fewer than dense where something is."""
    dense, small, pruned = (together[1][name] for name in ("dense", "small", "setpoint"))
    assert dense.train_flops == dense.steps * dense.final_flops
    assert small.train_flops == small.steps * small.final_flops
    assert small.final_flops <= 0.5 * dense.final_flops
    assert pruned.final_flops < pruned.train_flops / pruned.steps < dense.final_flops
    assert 0 < pruned.overhead_seconds < pruned.seconds


def test_files(together: tuple[Path, dict[str, Result]]) -> None:
    """Each cell leaves a history in order; Setpoint also leaves a ledger and a model that loads."""
    out, results = together
    for result in results.values():
        rows = [json.loads(line) for line in (out / result.folder / training.HISTORY).read_text().splitlines()]
        assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
        assert [row["flops"] for row in rows] == sorted(row["flops"] for row in rows)
        assert {row["split"] for row in rows} == {"train", "validation", "test"}
        assert rows[-1]["accuracy"] == result.value
        assert rows[-1]["step"] == result.steps == TASK.steps
    folder = out / results["setpoint"].folder
    assert (folder / training.LEDGER).stat().st_size > 0
    model = setpoint.load(folder / training.MODEL, into=TASK.build(dense_widths(TASK)))
    assert TASK.evaluate(model, "test").accuracy == pytest.approx(results["setpoint"].value)


@final
@dataclass(frozen=True, eq=False)
class Told(Tensors):
    """Data that tell what is asked of them."""

    asked: list[str] = field(default_factory=list)

    def split(self, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        """All of a split."""
        self.asked.append(split)
        return super().split(split)


def test_the_test_set_is_read_once(tmp_path: Path) -> None:
    """Whatever a method does, it reads the test set once; in tuning never."""
    points = torch.rand(100, 4, generator=torch.Generator().manual_seed(0))
    labels = (points.sum(1) > 2).long()
    data = Told(train=(points[:80], labels[:80]), test=(points[80:], labels[80:]))

    def build(factor: float) -> nn.Module:
        width = max(1, round(16 * factor))
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

    recipe = Recipe(steps=20, batch=16, num_validations=4)
    task = SimpleTask("told", ByFactor(build), data, recipe, device=torch.device("cpu"))
    fingerprint(task)  # reads all data, to tell one task from another, and is kept
    names = ("dense", "small", "setpoint", "cubic", "gmp", "filter-oneshot", "small-long")
    for split, each in (("test", 1), ("validation", 0)):
        cells = grid(task, [method_named(name) for name in names], [0.5], [0], split)
        data.asked.clear()
        run_interleaved(cells, tmp_path / split, Notes())
        assert data.asked.count("test") == each * len(cells)
        assert data.asked.count("validation") > len(cells)


@pytest.mark.slow
def test_a_process_each_changes_nothing(together: tuple[Path, dict[str, Result]], tmp_path: Path) -> None:
    """Cells in processes of their own, two at a time, end with the values of those that took turns in one."""
    notes = Notes()
    outcome = run(grid(TASK, STRUCTURED, [0.5], [0]), tmp_path, notes, workers=2)
    assert [result.method for result in outcome.results] == ["dense", "small", "setpoint"]
    assert outcome.failures == ()
    for result in outcome.results:
        beside = together[1][result.method]
        for name in ("value", "widths", "final_flops", "train_flops", "steps"):
            assert getattr(result, name) == getattr(beside, name)
        assert (result.clock, beside.clock) == ("shared", "interleaved")
        assert int(result.environment["threads"]) <= max(1, len(os.sched_getaffinity(0)) // 2)
        steps = [step for name, step in notes.turns if name == result.folder]
        assert steps == sorted(steps) and steps[-1] == TASK.steps
    assert not list(tmp_path.glob(f"*/{LOG}"))
    assert run(grid(TASK, STRUCTURED, [0.5], [0]), tmp_path, Notes()).results == outcome.results


@pytest.mark.slow
def test_a_killed_run_continues(tmp_path: Path) -> None:
    """After SIGKILL in the middle of the second cell the same command keeps the first and does the second."""
    command = [sys.executable, "-c", "from setpoint.cli import app; app()"]
    command += ["bench", "--task", "digits", "--methods", "dense", "--seeds", "0,1", "--epochs", "3"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [*command, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread
    )
    partial = tmp_path / "digits-dense-seed1" / f"{training.HISTORY}.partial"
    deadline = time.monotonic() + 300
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.kill()
    running.wait()
    path = tmp_path / FILE
    before = path.read_text(encoding="utf-8")
    assert [json.loads(line)["seed"] for line in before.splitlines()] == [0]
    path.write_text(before + before[: len(before) // 2], encoding="utf-8")  # as if the kill had hit the writing
    done = subprocess.run([*command, "--out", str(tmp_path), "--json"], capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr
    after = path.read_text(encoding="utf-8")
    assert after.startswith(before)
    assert [json.loads(line)["seed"] for line in after.splitlines()] == [0, 1]
    assert "1 of them are there already" in done.stderr and "other code" not in done.stderr
    assert len(json.loads(done.stdout)["methods"]["dense"]["runs"]) == 2


def test_what_goes_on_from_a_newer_run_is_run_again(tiny: Result, tmp_path: Path) -> None:
    """A run that went on from another one is finished while that one is there and as old: else both are made anew."""
    cells = grid(TINY, [method_named("magnitude-oneshot")], [0.5], [0])
    pruned = replace(tiny, method="magnitude-oneshot", budget=0.5, date="2026-11-02T00:00:00+00:00")
    append_result(tmp_path, pruned)
    assert not finished(cells, tmp_path)
    append_result(tmp_path, replace(tiny, date="2026-11-01T00:00:00+00:00"))
    assert [cell.method.name for cell in finished(cells, tmp_path)] == ["dense", "magnitude-oneshot"]
    append_result(tmp_path, replace(tiny, date="2026-11-03T00:00:00+00:00"))
    assert [cell.method.name for cell in finished(cells, tmp_path)] == ["dense"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"schema": 3}, "schema 3, this version of Setpoint continues folders of schema 1 and 2: name another folder"),
        ({"schema": 2, "task": "digits"}, "has a damaged line .*'method'"),
        ([1], "is damaged"),
    ],
)
def test_a_folder_of_another_version_is_refused(line: object, message: str, tmp_path: Path) -> None:
    """Results that this version did not write are neither continued nor overwritten."""
    text = json.dumps(line) + "\n"
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    with pytest.raises((BenchError, ReportError), match=message):
        run(grid(TINY, [Dense()], [0.5], [0]), tmp_path, Notes())
    assert (tmp_path / FILE).read_text(encoding="utf-8") == text


def changed(what: str) -> SimpleTask:
    """The tiny task with something else about it."""
    others = digits(epochs=1, width=8)
    changes: dict[str, dict[str, object]] = {
        "learning rate": {"recipe": replace(TINY.recipe, learning_rate=0.05)},
        "model": {"family": others.family},
        "data": {"data": replace(TINY.data, shift=0, mean=(8.0,))},  # type: ignore[type-var]
        "loss": {"training_criterion": None},
        "fresh weights": {"scratch_learning_rate": 2.0},
        "scoring": {"views": ten_views},
    }
    return replace(TINY, **changes[what])  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["learning rate", "model", "data", "loss", "fresh weights", "scoring"])
def test_a_changed_task_is_refused(what: str, tiny: Result, tmp_path: Path) -> None:
    """A folder does not mix runs of a task before and after a change; the same task, and rows that say nothing, go."""
    append_result(tmp_path, tiny)
    cells = grid(changed(what), [Dense()], [0.5], [0])
    with pytest.raises(BenchError, match="a task digits with another model, recipe or data.*name another folder"):
        finished(cells, tmp_path)
    assert len(finished(grid(digits(epochs=1, width=4), [Dense()], [0.5], [0]), tmp_path)) == 1
    append_result(tmp_path, replace(tiny, fingerprint=""))
    assert len(finished(cells, tmp_path)) == 1


def test_grid_trains_dense_once() -> None:
    """Each seed has one dense run and one run per budget of the others; names are unique."""
    cells = grid(TASK, STRUCTURED, [0.5, 0.25], [0, 1])
    assert sum(isinstance(cell.method, Dense) for cell in cells) == 2
    assert sum(isinstance(cell.method, Setpoint) for cell in cells) == 4
    assert len({cell.name for cell in cells}) == len(cells) == 10
