"""The benchmark of eight bits: a short run on digits, a run that finds its models trained, and the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts import script


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_it_measures_trains_once_and_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: dense, cut and quantization-aware model each have their floats and eight bits in the record."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("torchao")
    int8 = script("int8", monkeypatch)
    out = tmp_path / "int8.json"
    options = ["--models", str(tmp_path), "--out", str(out), "--tasks", "digits", "--steps", "10"]
    monkeypatch.setattr(sys, "argv", ["int8.py", *options])
    monkeypatch.setattr(int8, "CALIBRATION", 16)
    int8.main()
    monkeypatch.setattr(int8, "train", None)  # what is trained is not trained again
    int8.main()
    data = json.loads(out.read_text(encoding="utf-8"))
    rows = {(row["model"], row["way"]): row for row in data["tasks"]["digits"]["rows"]}
    assert list(rows) == [(model, way) for model in ("dense", "cut", "aware") for way in ("fp32", "static")]
    dense = rows["dense", "fp32"]
    for (model, way), row in rows.items():
        assert row["flops"] == dense["flops"] if model == "dense" else 0.4 < row["flops"] / dense["flops"] <= 0.5
        assert abs(row["accuracy"] - rows[model, "fp32"]["accuracy"]) < 0.05
        assert row["bytes"] < 0.3 * rows[model, "fp32"]["bytes"] or way == "fp32"
    from tables.records import int8 as block

    head, _, first, *_ = block(data).splitlines()
    assert "accuracy" in head and first.startswith("| `digits` | dense | fp32 | 100 % |")
