"""The benchmark of a GPU: its path on a CPU, and the table of what it finds."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)
    spec.loader.exec_module(module)
    return module


def test_it_measures_and_tells(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: both cut networks keep half of the FLOPs, every turn is kept, and the table has a row for each network."""
    monkeypatch.setattr(gpu, "SMALL", {name: gpu.SMALL[name] for name in ("GPT", "BERT")})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--eager", "--rounds", "1", "--out", str(tmp_path / "g")])
    gpu.main()
    data = json.loads((tmp_path / "g").read_text(encoding="utf-8"))
    for found in data["networks"].values():
        flops = found["flops"]
        assert all(0.4 < flops[arm] / flops["dense"] <= 0.5 for arm in ("even", "Setpoint"))
        assert found["run"]["budget_met"] and found["run"]["steps"] == 12
        assert all(len(turns["eager"]) == 1 for turns in found["step_seconds"].values())
    from tables.gpu import gpu_table

    lines = gpu_table(tmp_path / "g").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| GPT", "| BERT"]
    if not torch.cuda.is_available():
        assert "not measured" in lines[-3] and lines[-1].startswith("CPU, seed 0; ")
    assert "No GPU" in gpu_table(tmp_path / "none.json")


def test_full_networks_are_the_ones_named(gpu: ModuleType) -> None:
    """Claim: without weights, each has the parameters that its paper gives, in millions."""
    for name, (least, most) in {"ResNet-50": (25, 26), "ViT-S": (21, 23), "GPT-2 124 M": (124, 125)}.items():
        with torch.device("meta"):
            assert least <= sum(each.numel() for each in gpu.FULL[name].build().parameters()) / 1e6 <= most
