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
FRAMEWORKS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "Hugging Face Trainer": (
        "transformers",
        1,
        (
            f"{HUGGING}::test_trainer_resumes_bit_for_bit {HUGGING}::test_what_a_trainer_can_do "
            f"{HUGGING}::test_two_ranks {HUGGING}::test_a_teacher_is",
            NONE,
            f"{HUGGING}::test_trainer_resumes_bit_for_bit {HUGGING}::test_two_ranks",
            f"{HUGGING}::test_the_best_model_is_loaded",
            f"{HUGGING}::test_folders_of_cut_models {HUGGING}::test_a_pipeline_in_another_process",
        ),
    ),
    "Accelerate": (
        "accelerate",
        1,
        (f"{HUGGING}::test_accelerate", NONE, f"{HUGGING}::test_accelerate", NONE, NONE),
    ),
    "sentence-transformers": (
        "sentence-transformers",
        2,
        (f"{FOLDERS}::test_sentence", NONE, NONE, NONE, f"{FOLDERS}::test_sentence"),
    ),
    "diffusers": (
        "diffusers",
        2,
        (f"{FOLDERS}::test_diffusers", f"{FOLDERS}::test_diffusers", NONE, NONE, f"{FOLDERS}::test_diffusers"),
    ),
    "Ultralytics": (
        "ultralytics",
        1,
        (f"{YOLO}::test_one_line {YOLO}::test_a_run", f"{YOLO}::test_one_line", NONE, f"{YOLO}::test_its_files",
         f"{YOLO}::test_its_files"),
    ),
    "PEFT (LoRA)": (
        "peft",
        1,
        (f"{HUGGING}::test_adapters", NONE, NONE, NONE, f"{HUGGING}::test_adapters"),
    ),
    "Lightning": (
        "lightning",
        1,
        (
            f"{LIGHTNING}::test_one_callback {LIGHTNING}::test_manual_optimization {LIGHTNING}::test_parts_that",
            f"{LIGHTNING}::test_the_moving_average {LIGHTNING}::test_stochastic_weight {LIGHTNING}::test_averages_over",
            f"{LIGHTNING}::test_a_run_goes_on_bit_for_bit",
            f"{LIGHTNING}::test_the_best_model",
            f"{LIGHTNING}::test_the_best_model",
        ),
    ),
    "Fabric": (
        "lightning",
        2,
        (f"{LIGHTNING}::test_fabric", NONE, f"{LIGHTNING}::test_fabric", NONE, NONE),
    ),
    "timm": ("timm", 3, tuple(f"{RECIPES}::{each}[timm" for each in (
        "test_few_lines", "test_the_average", "test_it_goes_on", "test_the_best_model", "test_the_best_model",
    ))),
    "torchvision's references": ("torchvision", 2, tuple(f"{RECIPES}::{each}[torchvision" for each in (
        "test_few_lines", "test_the_average", "test_it_goes_on", "test_the_best_model", "test_the_best_model",
    ))),
    "nanoGPT": (
        "", 3, (f"{RECIPES}::test_few_lines[nanogpt", NONE, f"{RECIPES}::test_it_goes_on[nanogpt", NONE, NONE)
    ),
}  # fmt: skip
"""By framework: its package ("" for a script), lines added to it, and by column the tests, by their beginnings."""


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
    for name, (package, lines, columns) in FRAMEWORKS.items():
        cells = {column: _cell(tests, cases) for column, tests in zip(COLUMNS, columns, strict=True)}
        found[name] = {"version": _version(package), "lines": lines, "cells": cells}
    keep({"frameworks": found}, given.out)


def _cell(tests: str, cases: dict[str, set[str]]) -> str:
    if tests == NONE:
        return NONE
    ran = {
        name: tags
        for beginning in tests.split()
        for name, tags in cases.items()
        if name.startswith(_plain(beginning)) and _row(beginning, name)
    }
    if all("skipped" in tags for tags in ran.values()):
        return "not run"
    failed = sorted(name for name, tags in ran.items() if tags & {"failure", "error"})
    if failed:
        return f"fails: {failed[0]}"
    passed = sum("skipped" not in tags for tags in ran.values())
    return f"{passed} test{'s' * (passed != 1)}"


def _plain(beginning: str) -> str:
    return beginning.partition("[")[0]


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
