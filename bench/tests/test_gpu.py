"""The benchmark of a GPU: its path on a CPU, and the table of what it finds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from scripts import script


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("gpu", monkeypatch)


def test_it_measures_and_tells(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: both cut networks keep half of the FLOPs, every turn is kept, and the table has a row for the network."""
    monkeypatch.setattr(gpu, "SMALL", {"BERT": gpu.SMALL["BERT"]})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--eager", "--rounds", "1", "--out", str(tmp_path / "g")])
    gpu.main()
    data = json.loads((tmp_path / "g").read_text(encoding="utf-8"))
    (found,) = data["networks"].values()
    flops = found["flops"]
    assert all(0.4 < flops[arm] / flops["dense"] <= 0.5 for arm in ("even", "Setpoint"))
    assert found["run"]["budget_met"] and found["run"]["steps"] == 12
    assert all(len(turns["eager"]) == 1 for turns in found["step_seconds"].values())
    held = {arm: peak["held"] for arm, peak in found["peak_bytes"].items()}
    assert 0 < held["Setpoint"] < held["dense"] and 0 < held["even"] < held["dense"]
    from tables.records import gpu as gpu_block

    head, _, row, *_ = gpu_block(data).splitlines()
    assert "**Setpoint**" in head and row.startswith("| BERT | eager |")
