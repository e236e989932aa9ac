"""Which trainers Setpoint is at home in: runs the tests of tests/integrations on the real packages, and keeps a table.

    python bench/benchmarks/frameworks.py --out results/frameworks.json
    python bench/benchmarks/frameworks.py --reports a.xml b.xml     # of runs by parts, with pytest's --junitxml

A cell of the table is one question about one framework, and the tests that answer it, which all have to pass.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

from record import keep

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("budget met, optimizer live", "averages (EMA)", "resume bit for bit", "best model", "loads anywhere")
NONE = "–"
"""No test asks this of the framework."""

HUGGING, LIGHTNING, RECIPES = "test_transformers", "test_lightning", "test_recipes"
FOLDERS, YOLO = "test_pretrained_folders", "test_ultralytics"


@dataclass(frozen=True)
class Framework:
    """Its package ("" for a script), the lines added to its script, and by column the tests, by their beginnings."""

    package: str
    lines: int
    lands: str
    averages: str = NONE
    resumes: str = NONE
    best: str = NONE
    loads: str = NONE

    def columns(self) -> dict[str, str]:
        tests = (self.lands, self.averages, self.resumes, self.best, self.loads)
        return dict(zip(COLUMNS, tests, strict=True))


def _of_a_script(package: str, lines: int, row: str) -> Framework:
    """A script of tests/integrations/test_recipes.py, whose tests have a row for each."""
    tests = ("test_few_lines", "test_the_average", "test_it_goes_on", "test_the_best_model")
    lands, average, resumes, best = (f"{RECIPES}::{test}[{row}" for test in tests)
    return Framework(package, lines, lands, average, resumes, best, best)


FRAMEWORKS = {
    "Hugging Face Trainer": Framework(
        "transformers",
        1,
        f"{HUGGING}::test_trainer_resumes_bit_for_bit {HUGGING}::test_what_a_trainer_can_do "
        f"{HUGGING}::test_two_ranks {HUGGING}::test_a_teacher_is",
        resumes=f"{HUGGING}::test_trainer_resumes_bit_for_bit {HUGGING}::test_two_ranks",
        best=f"{HUGGING}::test_the_best_model_is_loaded",
        loads=f"{HUGGING}::test_folders_of_cut_models {HUGGING}::test_a_pipeline_in_another_process",
    ),
    "Accelerate": Framework("accelerate", 1, f"{HUGGING}::test_accelerate", resumes=f"{HUGGING}::test_accelerate"),
    "sentence-transformers": Framework(
        "sentence-transformers", 2, f"{FOLDERS}::test_sentence", loads=f"{FOLDERS}::test_sentence"
    ),
    "diffusers": Framework("diffusers", 2, *[f"{FOLDERS}::test_diffusers"] * 2, loads=f"{FOLDERS}::test_diffusers"),
    "Ultralytics": Framework(
        "ultralytics",
        1,
        f"{YOLO}::test_one_line {YOLO}::test_a_run",
        f"{YOLO}::test_one_line",
        best=f"{YOLO}::test_its_files",
        loads=f"{YOLO}::test_its_files",
    ),
    "PEFT (LoRA)": Framework("peft", 1, f"{HUGGING}::test_adapters", loads=f"{HUGGING}::test_adapters"),
    "Lightning": Framework(
        "lightning",
        1,
        f"{LIGHTNING}::test_one_callback {LIGHTNING}::test_manual_optimization {LIGHTNING}::test_parts_that",
        f"{LIGHTNING}::test_the_moving_average {LIGHTNING}::test_stochastic_weight {LIGHTNING}::test_averages_over",
        f"{LIGHTNING}::test_a_run_goes_on_bit_for_bit",
        best=f"{LIGHTNING}::test_the_best_model",
        loads=f"{LIGHTNING}::test_the_best_model",
    ),
    "Fabric": Framework("lightning", 2, f"{LIGHTNING}::test_fabric", resumes=f"{LIGHTNING}::test_fabric"),
    "timm": _of_a_script("timm", 3, "timm"),
    "torchvision's references": _of_a_script("torchvision", 2, "torchvision"),
    "nanoGPT": Framework("", 3, f"{RECIPES}::test_few_lines[nanogpt", resumes=f"{RECIPES}::test_it_goes_on[nanogpt"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--reports", type=Path, nargs="+", help="of tests that have been run")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        reports = given.reports or [Path(folder) / "report.xml"]
        if not given.reports:
            command = [sys.executable, "-m", "pytest", "-q", "tests/integrations", f"--junitxml={reports[0]}"]
            subprocess.run(command, cwd=ROOT, check=False)
        cases = {
            f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}": {each.tag for each in case}
            for report in reports
            for case in ET.parse(report).iter("testcase")
        }
    found = {}
    for name, framework in FRAMEWORKS.items():
        cells = {column: _cell(tests, cases) for column, tests in framework.columns().items()}
        found[name] = {"version": _version(framework.package), "lines": framework.lines, "cells": cells}
    keep({"frameworks": found}, given.out)


def _cell(tests: str, cases: dict[str, set[str]]) -> str:
    if tests == NONE:
        return NONE
    ran = {
        name: tags
        for beginning in tests.split()
        for name, tags in cases.items()
        if name.startswith(beginning.partition("[")[0]) and _row(beginning, name)
    }
    if all("skipped" in tags for tags in ran.values()):
        return "not run"
    failed = sorted(name for name, tags in ran.items() if tags & {"failure", "error"})
    if failed:
        return f"fails: {failed[0]}"
    passed = sum("skipped" not in tags for tags in ran.values())
    return f"{passed} test{'s' * (passed != 1)}"


def _row(beginning: str, name: str) -> bool:
    """Whether a test is of the row that the beginning names in brackets."""
    row = beginning.partition("[")[2].lower()
    return row in name.partition("[")[2].lower()


def _version(package: str) -> str:
    try:
        return version(package) if package else ""
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
