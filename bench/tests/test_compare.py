"""The comparison with Torch-Pruning: what is recorded of a model, what the page says of it, and what counts as cut."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of benchmarks/ import each other by their bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


class Gated(nn.Module):
    """Two branches of one width, tied to each other, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(16, 3)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.relu(self.a(x)) * torch.sigmoid(self.b(x)))
        return out


def build() -> tuple[nn.Module, Any]:
    return Gated(), (torch.randn(5, 4),)


def test_setpoint_meets_every_demand() -> None:
    """On a gated layer with tied weights each column of Setpoint is true, at every stage a JSON object."""
    import contenders
    import libraries

    stages: list[str] = []
    outcome = contenders.judge(libraries.Setpoint, build, lambda now: stages.append(json.dumps(now, allow_nan=False)))
    held = {key: outcome[key] for key in ("passed", "tied", "frozen", "optimizer", "exact")}
    assert held == dict.fromkeys(held, True), outcome
    assert outcome["stage"] == "done" and outcome["removed_share"] > 0.3
    assert json.loads(stages[-1]) == outcome


@pytest.mark.filterwarnings("ignore")
def test_torch_pruning_is_measured_from_the_model() -> None:
    """Its cut of the same layer is exact; it makes new parameters, so ties, freezing and the optimizer are lost."""
    pytest.importorskip("torch_pruning")
    import libraries

    outcome = libraries.best("torch_pruning", build)
    assert outcome["passed"] and outcome["exact"], outcome
    assert not outcome["tied"] and not outcome["frozen"] and not outcome["optimizer"]


def test_a_wrong_cut_is_not_exact() -> None:
    """A contender whose mask names other entries than its cut is told so."""
    import contenders
    import libraries

    class Wrong(libraries.Setpoint):
        def mask(self, twin: nn.Module) -> None:
            """Nothing at all."""

    outcome = contenders.judge(Wrong, build)
    assert outcome["passed"] and outcome["exact"] is False


def test_the_table_counts_what_the_file_says() -> None:
    """A row per suite and library, the stages that stopped them, and Setpoint's failures."""
    import contenders
    from tables import records

    good = asdict(
        contenders.Outcome(
            stage="done", passed=True, seconds=1.0, params=9, removed_share=0.5, frozen=True, optimizer=True, exact=True
        )
    )
    late = asdict(contenders.Outcome(stage="time", reason="no answer within 120 s, at `discovery`"))
    old = asdict(contenders.Outcome(stage="discovery", reason="stem: conv2d: met by data of fixed size"))
    models = [
        {"suite": "plain", "model": "a", "setpoint": good, "torch_pruning": late},
        {"suite": "plain", "model": "b", "setpoint": late, "torch_pruning": late},
        {"suite": "timm", "model": "c", "setpoint": old, "torch_pruning": late},
    ]
    environment = {"cpu": "a processor", "threads": 1}
    data = {"models": models, "environment": environment, "versions": {"torch": "2"}, "workers": 2}
    data |= {"limit_seconds": 120.0, "memory_gib": 9.0, "seed": 0, "date": "2026-01-01T00:00:00+00:00"}
    lines = records.coverage(data).splitlines()
    assert "| plain | Setpoint | 1 / 2 | 1 s | 1 / 1 | – | 1 / 1 | 1 / 1 |" in lines
    assert "| plain | Torch-Pruning | 0 / 2 | – | 0 / 0 | – | – | – |" in lines
    assert "| no answer within the processor time | 1 | 3 |" in lines
    assert "* timm `c`: `discovery: stem: conv2d: met by data of fixed size`" in lines
    assert "* plain `b`: `time: no answer within 120 s, at 'discovery'`" in lines
