"""The runner: same results however cells are interleaved, honest counts, and files that survive."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import setpoint
from setpoint.bench import training
from setpoint.bench.digits import digits
from setpoint.bench.method import METHODS, Dense, Method, Setpoint, Small, method_named
from setpoint.bench.own_random import OwnRandom
from setpoint.bench.results import FILE, Result
from setpoint.bench.runner import grid, run
from setpoint.bench.task import BenchError, dense_widths
from setpoint.bench.training import Cell, Progress

TASK = digits(epochs=3, width=16)


def ignore(cell: Cell, progress: Progress) -> None:
    """Report to nobody."""


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Result]]:
    """All methods trained side by side, and the folder they wrote."""
    out = tmp_path_factory.mktemp("together")
    results = run(grid(TASK, METHODS, [0.5], [0]), out, ignore)
    return out, {result.method: result for result in results}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_interleaving_changes_nothing(method: Method, together: tuple[Path, dict[str, Result]], tmp_path: Path) -> None:
    """A method trained alone ends with the very same value, widths and FLOPs as beside the others."""
    torch.manual_seed(123)
    (alone,) = run(grid(TASK, [method], [0.5], [0]), tmp_path, ignore)
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


def test_setpoint_lands_where_the_independent_counter_says(together: tuple[Path, dict[str, Result]]) -> None:
    """Setpoint lands within the budget, and its own FLOPs equal those of the independent counter."""
    dense, pruned = together[1]["dense"], together[1]["setpoint"]
    assert pruned.landed
    assert pruned.final_flops <= 0.5 * dense.final_flops
    assert pruned.claimed_flops == pruned.final_flops
    assert pruned.resizes > 0
    assert sum(pruned.widths.values()) < sum(pruned.dense_widths.values())


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


def test_interruption_keeps_what_is_finished(tmp_path: Path) -> None:
    """Ctrl-C in the second seed leaves the first seed's result."""

    def interrupt(cell: Cell, progress: Progress) -> None:
        if cell.seed == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(grid(digits(epochs=1, width=4), [Dense()], [0.5], [0, 1]), tmp_path, interrupt)
    assert len((tmp_path / FILE).read_text(encoding="utf-8").splitlines()) == 1


def test_least_advanced_goes_first(tmp_path: Path) -> None:
    """Cells take turns: no cell is ever more than one turn ahead of another of its seed."""
    task, done = digits(epochs=2, width=8), {"dense": 0, "small": 0}

    def watch(cell: Cell, progress: Progress) -> None:
        done[cell.method.name] = progress.step
        assert abs(done["dense"] - done["small"]) <= training.STEPS_PER_TURN

    run(grid(task, [Dense(), Small()], [0.5], [0]), tmp_path, watch)
    assert set(done.values()) == {task.steps}


def test_grid_trains_dense_once() -> None:
    """Each seed has one dense run and one run per budget of the others; names are unique."""
    cells = grid(TASK, METHODS, [0.5, 0.25], [0, 1])
    assert sum(isinstance(cell.method, Dense) for cell in cells) == 2
    assert sum(isinstance(cell.method, Setpoint) for cell in cells) == 4
    assert len({cell.name for cell in cells}) == len(cells) == 10


def test_unknown_method_lists_the_known() -> None:
    """An unknown method is an error that lists those there are."""
    with pytest.raises(BenchError, match="dense, small, setpoint"):
        method_named("magic")


def test_own_random_keeps_streams_apart() -> None:
    """Two states drawn from in turns give what each gives alone, and the global state stays."""
    torch.manual_seed(7)
    alone = [torch.rand(1) for _ in range(3)]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first, second, drawn = OwnRandom(7), OwnRandom(8), []
    for _ in range(3):
        with first.drawing():
            drawn.append(torch.rand(1))
        with second.drawing():
            nn.Linear(3, 3)
    assert torch.equal(torch.cat(drawn), torch.cat(alone))
    assert torch.equal(torch.get_rng_state(), before)
