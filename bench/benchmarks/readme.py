"""Writes tables and pictures of README.md and docs/, and the pages of docs/tasks/, from the committed result files.

    python bench/benchmarks/readme.py            rewrite what stands between the markers, and the generated files
    python bench/benchmarks/readme.py --check    fail if a page does not show what the result files say

A marker is `<!-- results:NAME -->` ... `<!-- end -->`; NAME is one of those in `filled`, or a folder of results/.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tables.costs import attach_table, bench_quick_table, frameworks_table, growth_table, overhead_table, soak_table
from tables.discovery import coverage_table, models_cut_table, suites_table
from tables.gpu import gpu_table
from tables.methods import (
    ahead_table,
    apart_table,
    bill_table,
    headline_table,
    methods_table,
    pretrained_table,
    readme_table,
    seconds_table,
    spent_table,
    task_links,
    task_pages,
    tuning_table,
    validation_table,
)
from tables.reference import reference_table

from setpoint_bench.report.moving_picture import write_moving_picture
from setpoint_bench.report.picture import write_picture

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
_DOCS = (
    "results.md",
    "results-in-short.md",
    "results-fine-tuning.md",
    "results-costs.md",
    "tasks.md",
    "coverage.md",
    "resume.md",
    "frameworks.md",
    "gpu.md",
)
RINGS = ("use", "tune", "extend")
TASKS = ROOT / "docs" / "tasks"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in _DOCS),
    *(ROOT / "docs" / "api" / f"{ring}.md" for ring in RINGS),
)
MARKER = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
DRAWN = ("run", "finetune", "cifar10-mini")
PICTURES = {name: ROOT / "docs" / "pictures" / f"{name}.svg" for name in DRAWN}
MOVING = "Fine-tuning an image network to a quarter of its FLOPs"
PICTURED = (
    "dense",
    *(f"{method} 0.5" for method in ("small-long", "filter-first", "cubic", "torch-pruning-norm", "setpoint")),
)
"""Lines of a picture, as many as a legend has room for: of each kind of rival that cuts units the best one there."""


def filled(text: str) -> str:
    """The page with every marked part as the result files say."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        made: dict[str, Callable[[], str]] = {
            **{f"api-{ring}": partial(reference_table, ROOT / "docs" / "api" / f"{ring}.md") for ring in RINGS},
            "suites": lambda: suites_table(RESULTS / "coverage"),
            "coverage": lambda: coverage_table(RESULTS / "coverage" / "torch_pruning.json"),
            "overhead": lambda: overhead_table(RESULTS / "overhead.json"),
            "frameworks": lambda: frameworks_table(RESULTS / "frameworks.json"),
            "gpu": lambda: gpu_table(RESULTS / "gpu.json"),
            "readme": lambda: readme_table(RESULTS),
            "bill": lambda: bill_table(RESULTS),
            "soak": lambda: soak_table(RESULTS / "soak.json"),
            "bench-quick": lambda: bench_quick_table(RESULTS / "bench-quick.json"),
            "growth": lambda: growth_table(RESULTS / "growth.json"),
            "attach": lambda: attach_table(RESULTS / "attach.json"),
            "tuning": lambda: tuning_table(RESULTS),
            "validation": lambda: validation_table(RESULTS),
            "ahead": lambda: ahead_table(RESULTS),
            "ahead-validation": lambda: ahead_table(RESULTS, split="validation"),
            "seconds": lambda: seconds_table(RESULTS),
            "pretrained": lambda: pretrained_table(RESULTS),
            "models-cut": lambda: models_cut_table(RESULTS / "coverage" / "torch_pruning.json"),
            "headline": lambda: headline_table(RESULTS),
            "apart": lambda: apart_table(RESULTS),
            "spent": lambda: spent_table(RESULTS),
            "tasks": lambda: task_links(RESULTS),
        }
        table = made[name]() if name in made else methods_table(RESULTS / name)
        return f"{match[1]}{table}\n{match[3]}"

    return MARKER.sub(fill, text)


def main() -> None:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    pages = {page: filled(page.read_text(encoding="utf-8")) for page in PAGES}
    pages |= {TASKS / f"{name}.md": text for name, text in task_pages(RESULTS).items()}
    for page, fresh in pages.items():
        if not page.exists() or page.read_text(encoding="utf-8") != fresh:
            stale.append(page.name)
            if not check:
                page.write_text(fresh, encoding="utf-8")
    for page in set(TASKS.glob("*.md")) - pages.keys():
        stale.append(page.name)
        if not check:
            page.unlink()
    with TemporaryDirectory() as folder:
        for name, picture in PICTURES.items():
            drawn = Path(folder) / picture.name
            if name == "run":
                write_moving_picture(RESULTS / "finetune", drawn, "setpoint", 0.25, MOVING)
            else:
                write_picture(RESULTS / name, drawn, labels=PICTURED)
            if not picture.exists() or drawn.read_bytes() != picture.read_bytes():
                stale.append(picture.name)
                if not check:
                    picture.write_bytes(drawn.read_bytes())
    if check and stale:
        sys.exit(f"{', '.join(stale)} not as the result files say: run python bench/benchmarks/readme.py")


if __name__ == "__main__":
    main()
