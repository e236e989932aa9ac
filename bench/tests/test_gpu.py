"""The benchmark of a GPU: its path on a CPU, and the table of what it finds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from scripts import script


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    return script("gpu", monkeypatch)


def test_it_measures_and_tells(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: both cut networks keep half of the FLOPs, every turn is kept, and the table has a row for each network."""
    monkeypatch.setattr(gpu, "SMALL", {name: gpu.SMALL[name] for name in ("GPT", "BERT", "residual network")})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--eager", "--rounds", "1", "--out", str(tmp_path / "g")])
    gpu.main()
    data = json.loads((tmp_path / "g").read_text(encoding="utf-8"))
    for found in data["networks"].values():
        flops = found["flops"]
        assert all(0.4 < flops[arm] / flops["dense"] <= 0.5 for arm in ("even", "Setpoint", gpu.FINE))
        assert found["run"]["budget_met"] and found["run"]["steps"] == 12
        assert all(len(turns["eager"]) == 1 for turns in found["step_seconds"].values())
        held = {arm: each["held"] for arm, each in found["peak_bytes"].items()}
        assert 0 < held["Setpoint"] < held["dense"] and 0 < held["even"] < held["dense"]
    from tables.gpu import gpu_table

    lines = gpu_table(tmp_path / "g").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| GPT", "| BERT", "| residual network"]
    if not torch.cuda.is_available():
        assert "not measured" in lines[-3] and lines[-1].startswith("CPU, seed 0; ")
    assert "No GPU" in gpu_table(tmp_path / "none.json")


def test_what_is_held_is_weights_and_states(gpu: ModuleType) -> None:
    """Claim: a network holds its weights, AdamW's moments and steps, its buffers and its inputs, once each."""
    model, inputs = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8)), torch.randn(2, 4)
    optimizer = gpu._optimizer_of(model)
    model(inputs).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    weights, buffers = 32 + 8 + 8, 4 * (8 + 8) + 8
    held = gpu._held(model, optimizer, (inputs,))
    assert held == 4 * (3 * weights + 3) + buffers + inputs.nbytes
    assert gpu._peak(lambda: None, held, torch.device("cpu")) == {"held": held, "step": None, "whole": None}


def test_the_table_has_the_whole_peak_and_its_parts(gpu: ModuleType, tmp_path: Path) -> None:
    """Claim: weights and optimizer state count in the peak, and what they save stands beside what a step saves.

    The network that was cut in a CPU's blocks has a column of its own, of eager steps.
    """
    sizes = {"dense": (600, 400), "even": (300, 300), "Setpoint": (270, 320), gpu.FINE: (270, 320)}
    network = {
        "step_seconds": {arm: {"eager": [0.1], "compiled": [0.1]} for arm in sizes} | {gpu.FINE: {"eager": [0.12]}},
        "step_joules": dict.fromkeys(sizes),
        "peak_bytes": {arm: {"held": a, "step": b, "whole": a + b} for arm, (a, b) in sizes.items()},
        "flops": dict.fromkeys(sizes, 1.0),
        "run": {"steps": 12, "seconds": 10.0, "overhead_seconds": 1.0},
    }
    about = {"cpu": "none", "threads": 1, "torch": "2.13", "cores": 1}
    data = {"hardware": "a GPU", "seed": 0, "date": "2026-01-01", "environment": about, "networks": {"net": network}}
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({**data, "semi_structured": {"why_not": "no cores"}}), encoding="utf-8")
    from tables.gpu import gpu_table

    head, _, eager, compiled, *_ = ([cell.strip() for cell in line.split("|")] for line in gpu_table(file).splitlines())
    names = ("peak memory", "weights and states", "memory that a step adds")
    assert [eager[head.index(name)] for name in names] == ["59.0 %", "45.0 %", "80.0 %"]
    assert {compiled[head.index(name)] for name in names} == {"–"}
    fine = head.index("in the blocks of a CPU")
    assert eager[fine].startswith("120 %") and compiled[fine] == "–"


def test_full_networks_are_the_ones_named(gpu: ModuleType) -> None:
    """Claim: without weights, each has the parameters that its paper gives, in millions."""
    for name, (least, most) in {"ResNet-50": (25, 26), "ViT-S": (21, 23), "GPT-2 124 M": (124, 125)}.items():
        with torch.device("meta"):
            assert least <= sum(each.numel() for each in gpu.FULL[name].build().parameters()) / 1e6 <= most


def test_what_fails_leaves_the_rest(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a network without memory gets a row that says so; what was measured before a failure is in the file."""

    def measured(subject: object, *rest: object, **settings: object) -> dict[str, object]:
        if subject is gpu.SMALL["GPT"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "measure", measured)
    monkeypatch.setattr(gpu, "SMALL", {name: gpu.SMALL[name] for name in ("GPT", "BERT")})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--out", str(tmp_path / "g")])
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    from tables.gpu import gpu_table

    text = gpu_table(tmp_path / "g")
    assert "| GPT | not measured: CUDA out of memory. Tried to allocate 2 GiB. |" in text and "was stopped" in text


def test_no_time_leaves_compiled_networks_and_turns_out(gpu: ModuleType) -> None:
    """Claim: with no seconds a network takes two turns, eager."""
    found = gpu.measure(gpu.SMALL["BERT"], torch.device("cpu"), 4, compiled=True, seconds=0.0)
    assert all(list(each) == ["eager"] and len(each["eager"]) == 2 for each in found["step_seconds"].values())
