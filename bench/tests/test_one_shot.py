"""The benchmark of models cut at once: the fluctuation score, its bias, and the tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from scripts import script
from setpoint_bench.family import ByFactor
from setpoint_bench.recipe import Recipe
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.tensors import Tensors


@pytest.fixture
def one_shot(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    return script("one_shot", monkeypatch)


def _task() -> SimpleTask:
    points = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
    classes = (points.sum(1) > 0).long()
    data = Tensors(train=(points, classes), test=(points[:64], classes[:64]))
    return SimpleTask("line", ByFactor(lambda factor: _net()), data, Recipe(steps=20, batch=64, learning_rate=0.05))


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


def test_means_and_variances_are_those_of_all_that_is_given(one_shot: ModuleType) -> None:
    """Claim: by channel they are those over batches, rows and pixels together, of linear layers and convolutions."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(36, 2))
    batches = [(torch.randn(5, 3, 3, 3), None), (torch.randn(7, 3, 3, 3) + 1, None)]
    seen = one_shot.seen_by_layers(model, ["0", "2"], batches)
    images = torch.cat([x for x, _ in batches]).double()
    torch.testing.assert_close(seen["0"].mean, images.mean((0, 2, 3)))
    torch.testing.assert_close(seen["0"].variance, images.var((0, 2, 3), correction=0))
    flat = model[0](images.float()).flatten(1).double().detach()
    torch.testing.assert_close(seen["2"].variance, flat.var(0, correction=0), atol=1e-6, rtol=1e-5)


def test_units_that_do_not_vary_go_first_and_a_bias_takes_over(one_shot: ModuleType) -> None:
    """Claim: where half of the units are constant these go, and the outputs stay as they were."""
    task = _task()
    torch.manual_seed(0)
    model = _net()
    with torch.no_grad():
        model[0].weight[::2] = 0.0
        model[0].bias[::2] = 1.0
    batches = [next(task.batches(0))]
    before = model(batches[0][0]).detach()
    one_shot.by_fluctuation(task, model, 0.5, batches)
    assert model[0].out_features == 8
    torch.testing.assert_close(model(batches[0][0]), before)


def test_rows_that_are_there_are_not_measured_again(
    one_shot: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: each method meets each budget, the record holds every row once, and a second call measures nothing."""
    monkeypatch.setattr(one_shot, "task_of", lambda name, data: _task())
    arguments = ["one_shot.py", "--tasks", "finetune", "--seeds", "0", "--runs", str(tmp_path), "--out"]
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "record.json")])
    one_shot.main()
    rows = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["rows"]
    cut = {(row["method"], row["budget"]): row for row in rows if row["budget"]}
    assert len(cut) == len(one_shot.METHODS) * len(one_shot.BUDGETS) == len(rows) - 1
    assert all(row["flops"] <= budget for (_, budget), row in cut.items())
    monkeypatch.setattr(one_shot, "METHODS", dict.fromkeys(one_shot.METHODS))  # any call would fail
    one_shot.main()


def test_the_table_names_the_best_other(one_shot: ModuleType, tmp_path: Path) -> None:
    """Claim: losses are better where lower, and our own even cut is one of the others."""
    from tables.one_shot import one_shot_table

    def row(method: str, budget: float | None, value: float) -> dict[str, Any]:
        about = {"task": "llama", "metric": "loss", "seed": 0, "recovered": value}
        return {**about, "method": method, "budget": budget, "value": value}

    rows = [row("dense", None, 1.0), row("compress", 0.5, 1.2), row("compress, even", 0.5, 1.1)]
    rows += [row("fluctuation", 0.5, 1.5), row("torch-pruning-taylor", 0.5, 1.6)]
    about = {"cpu": "C", "threads": 1, "torch": "2"}
    record = {"recovery": 0.1, "rows": rows, "environment": about, "date": "2026-01-01"}
    (tmp_path / "r.json").write_text(json.dumps(record), encoding="utf-8")
    shown = one_shot_table(tmp_path / "r.json")
    expected = "| 50.0 % | 1 (1) | 1.2 (1) | 1.1 (1) | 1.5 (1) | 1.6 (1) | −0.1000 (n = 1) (`compress, even`) |"
    assert shown.count(f"| small Llama, Shakespeare {expected}") == 2
