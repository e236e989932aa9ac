"""What Setpoint sends on any number of ranks: counted, and as the page's formula says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import BENCHMARKS, script

RESULT = Path(__file__).parents[2] / "results" / "scale.json"


@pytest.mark.parametrize(("host", "ranks"), [("DistributedDataParallel", 2), ("fully_shard", 2), ("fully_shard", 16)])
@pytest.mark.filterwarnings("ignore")
def test_the_formula_tells_what_is_counted(monkeypatch: pytest.MonkeyPatch, host: str, ranks: int) -> None:
    """Claim: bytes of sensing, of a decision, of its moments and of its cut are those of the formula, to the byte."""
    scale = script("scale", monkeypatch)
    for gradual in (True, False):
        rows = scale.simulated(host, ranks, gradual=gradual)
        assert any(row["cut"] for row in rows)
        assert [row["bytes"] for row in rows] == pytest.approx([row["foretold"] for row in rows], abs=1e-6)


def test_the_table_is_what_the_formula_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the committed table is the formula's; sensing and deciding take less than 0.1 % of a step's bytes."""
    scale, found = script("scale", monkeypatch), json.loads(RESULT.read_text(encoding="utf-8"))
    assert list(scale.large()) == found["large"]
    assert all(row["sensing"] + row["deciding"] < 1e-3 * row["step"] for row in found["large"])


@pytest.mark.slow
def test_gloo_sends_what_the_simulation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: two processes that really send count the same messages and bytes as one that stands for both."""
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, "-W", "ignore", *ranks, str(BENCHMARKS / "scale.py"), "--real"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    real = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))["counted"]
    assert real == [row for row in json.loads(RESULT.read_text(encoding="utf-8"))["counted"] if row["ranks"] == 2]
