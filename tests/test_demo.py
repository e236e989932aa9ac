"""The demo: the wheel alone shows a budget being met, and writes down what it measured."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import setpoint
from setpoint.cli import app
from setpoint.cost.parse import fraction
from setpoint.demo.demo import demo
from setpoint.demo.network import PRETRAINED, Network
from setpoint.demo.signs import NEW, OLD, draw
from setpoint.report.ledger_page import read_ledger
from setpoint.report.numbers import duration

ROOT = Path(__file__).resolve().parents[1]
FILES = ["report.html", "run.jsonl", "small.safetensors"]

ALONE = """
import importlib.metadata, sys
sys.modules.update(dict.fromkeys({blocked!r}))  # None: not found
importlib.metadata.entry_points = lambda **_: importlib.metadata.EntryPoints(())
from setpoint.cli import app
app({arguments!r})
"""
BLOCKED = {
    "setpoint_bench",
    "sklearn",
    "scipy",
    "PIL",
    "pandas",
    "torchvision",
    "timm",
    "transformers",
    "datasets",
}
"""What the wheel does not require, and a machine with the benchmark has."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a short demo prints for machines, where only the wheel and what it requires is installed."""
    out = tmp_path_factory.mktemp("demo") / "new"
    arguments = ["demo", "--steps", "20", "--budget", "25% flops", "--json", "--out", str(out)]
    code = ALONE.format(blocked=BLOCKED, arguments=arguments)
    places = {"cwd": out.parent}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **places)
    assert done.returncode == 0, done.stderr
    assert [each.name for each in out.parent.iterdir()] == ["new"]
    assert sorted(each.name for each in out.iterdir()) == FILES
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_wheel_alone_suffices(found: dict[str, Any]) -> None:
    """Claim: without the benchmark and without extras, `--json` prints one object, and the budget is met."""
    assert found["budget_met"] and found["budget"] == 0.25 and found["steps"] == 20
    flops, trained = found["flops_per_step"], found["train_flops"]
    assert flops["setpoint"] <= 0.25 * flops["dense"] and found["units"]["setpoint"] < found["units"]["dense"]
    assert trained["dense"] == 20 * flops["dense"] and flops["setpoint"] * 20 < trained["setpoint"]
    assert set(found["accuracy"]) == {"dense", "setpoint"} and min(found["train_seconds"].values()) > 0
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert not BLOCKED & {re.split(r"\W", each)[0] for each in required}


def test_the_page_stands_alone(found: dict[str, Any]) -> None:
    """Claim: the page is one file below 1 MB without a script or an address, the budget before all other pictures."""
    page = Path(found["report"]).read_text(encoding="utf-8")
    assert len(page) < 1_000_000 and "<script" not in page and "http" not in page and "Hankel" not in page
    pictures = re.findall("<figure><h4>(.*?)</h4>", page)
    assert pictures == [
        "Spent against reference: FLOPs per step",
        "Accuracy",
        "Architecture before and after",
        "Width of each group",
        "What was dropped when, and why",
        "Price of FLOPs",
    ]
    assert "<title>Setpoint: demo</title>" in page and "Setpoint <span>demo</span>" in page and "run.jsonl" not in page
    assert 'download="run-widths.csv"' in page and f"{100 * found['accuracy']['setpoint']:.1f} %" in page


def test_the_report_keeps_the_page(found: dict[str, Any], tmp_path: Path) -> None:
    """Claim: `report` of the demo's folder names its page and leaves it; with --out it writes one of the run alone."""
    folder, page = Path(found["ledger"]).parent, Path(found["report"])
    before = page.read_bytes()
    answer = json.loads(CliRunner().invoke(app, ["report", str(folder), "--json"]).stdout)
    assert answer["report"] == str(page) and page.read_bytes() == before
    assert sorted(each.name for each in folder.iterdir()) == FILES
    CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path)])
    assert "<h4>Accuracy</h4>" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_is_written_is_the_small_network(found: dict[str, Any]) -> None:
    """Claim: the file loads into the dense network, and has the widths of the ledger's end."""
    small = setpoint.load(found["model"], into=Network(len(NEW)))
    last = read_ledger(Path(found["ledger"])).entries[-1]
    assert sum(last.widths.values()) == found["units"]["setpoint"]
    assert last.widths["block1.conv1"] == small.block1.conv1.out_channels < 24


def test_a_terminal_sees_it_happen(tmp_path: Path) -> None:
    """Claim: a terminal sees bars from before the first step on, three lines at the end, and no JSON."""
    screen = Console(force_terminal=True, width=100, height=40, file=io.StringIO(), color_system=None)
    found = demo(screen, tmp_path, 0.5, 1, 20)
    assert isinstance(screen.file, io.StringIO)
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())
    assert seen.index("drawing the images") < seen.index("step 20 of 20")
    assert "of 24 channels" in seen and "━" in seen and "s left" in seen and "{" not in seen
    lines = [line.split()[0] for line in seen.splitlines()[-3:]]
    assert lines == ["accuracy", "network", "training"]
    whole, last = (
        [duration(each[who]) for who in ("setpoint", "dense")]
        for each in (found["train_seconds"], found["step_seconds"])
    )
    told = f"{whole[0]}, dense {whole[1]}, own work included; a step at the end {last[0]}, dense {last[1]}"
    assert seen.splitlines()[-1].endswith(f" of dense training FLOPs and {told}")
    assert found["budget_met"] and sorted(each.name for each in tmp_path.iterdir()) == FILES


@pytest.mark.parametrize("budget", ["banana", "0", "2.0", "nan", "0.5,0.25", "50% params", "50% flops per run"])
def test_a_budget_that_is_none_is_refused(budget: str, tmp_path: Path) -> None:
    """Claim: before any work a sentence says what a budget is; nothing is written."""
    result = CliRunner().invoke(app, ["demo", "--budget", budget, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and result.stdout == "" and not (tmp_path / "out").exists()
    said = "--budget takes a fraction of the dense FLOPs per step, above 0 and at most 1, such as 0.5 or 50%"
    assert result.stderr.startswith(f"error: {said}: got {budget!r}") and len(result.stderr.splitlines()) == 1


def test_a_budget_out_of_reach_is_refused(tmp_path: Path) -> None:
    """Claim: what no cut reaches is refused before a step, in words that --budget takes, and leaves no folder."""
    result = CliRunner().invoke(app, ["demo", "--budget", "0.001", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and result.stdout == "" and list(tmp_path.iterdir()) == []
    asked = re.search(r"Ask for at least '(.*?)'$", result.stderr.strip())
    assert asked is not None and 0.001 < fraction(asked[1], "--budget") < 0.1


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """Claim: a file in the folder's place is refused and kept."""
    (tmp_path / "out").write_text("mine")
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "is a file: name a folder" in result.stderr and result.stdout == ""
    assert (tmp_path / "out").read_text() == "mine"


def test_the_network_in_the_wheel_reads_the_old_letters() -> None:
    """Claim: the weights in the wheel are trained, and take less than 1 MB."""
    network = setpoint.load(PRETRAINED, into=Network(len(OLD))).float().eval()
    pictures, labels = draw(OLD, 2, seed=3)
    with torch.no_grad():
        right = (network(pictures).argmax(1) == labels).float().mean()
    assert float(right) > 0.8 and PRETRAINED.stat().st_size < 1_000_000


def test_the_same_seed_draws_the_same_images() -> None:
    """Claim: images depend on the seed and the letter alone; old and new letters have none in common."""
    first, again, other = (draw([5, 6], 3, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not set(OLD) & set(NEW)
