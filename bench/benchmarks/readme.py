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

from tables.costs import (
    again_table,
    attach_table,
    bench_quick_table,
    compiled_table,
    distributed_table,
    frameworks_table,
    growth_table,
    overhead_table,
    predictions_table,
    real_budgets_table,
    soak_table,
    widths_table,
)
from tables.discovery import coverage_table, discovery_table, models_cut_table, suites_table
from tables.fine_tuning import fine_tuning_goals_table, passes_table
from tables.gpu import gpu_table
from tables.law import (
    calibration_runs_table,
    earlier_cuts_line,
    errors_table,
    forms_table,
    images_table,
    larger_optimal_line,
    larger_pair_optimal_line,
    law_table,
    least_error_line,
    made_again_line,
    measured_table,
    optimal_line,
    pair_optimal_line,
    pair_table,
    rates_table,
    worth_line,
    write_law_picture,
)
from tables.lost import write_lost_picture
from tables.methods import (
    PRETRAINED,
    ahead_table,
    apart_table,
    bill_table,
    goals_table,
    headline_table,
    methods_table,
    pretrained_table,
    readme_table,
    seconds_table,
    snip_table,
    sparse_table,
    spent_table,
    task_links,
    task_pages,
    tuning_table,
    validation_table,
)
from tables.one_shot import one_shot_table
from tables.reference import reference_table
from tables.seconds_goals import seconds_goals_table
from tables.states import mamba2_table, moments_table, ssm_table, state_regrowth_table, states_table
from tables.variants import (
    ablation_table,
    calibration_table,
    even_table,
    feedback_table,
    price_table,
    quick_line,
    recipe_table,
    returns_table,
)

from setpoint_bench.report.moving_picture import write_moving_picture
from setpoint_bench.report.picture import write_picture

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
_DOCS = (
    "compress.md",
    "results.md",
    "results-in-short.md",
    "results-fine-tuning.md",
    "results-choices.md",
    "results-costs.md",
    "tasks.md",
    "coverage.md",
    "state-space.md",
    "budgets.md",
    "distributed.md",
    "how-it-works.md",
    "compile.md",
    "price.md",
    "even.md",
    "resume.md",
    "frameworks.md",
    "when-it-pays.md",
    "results-law.md",
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
DRAWN = ("run", "finetune", "cifar10-mini", "law", *(f"lost-{name}" for name in PRETRAINED))
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
            "discovery": lambda: discovery_table(RESULTS / "discovery.json"),
            "coverage": lambda: coverage_table(RESULTS / "coverage" / "torch_pruning.json"),
            "overhead": lambda: overhead_table(RESULTS / "overhead.json"),
            "state-regrowth": lambda: state_regrowth_table(RESULTS / "state-regrowth.json"),
            "mamba2": lambda: mamba2_table(RESULTS / "mamba2.json"),
            "ssm": lambda: ssm_table(RESULTS / "ssm.json"),
            "moments": lambda: moments_table(RESULTS / "moments.json"),
            "predictions": lambda: predictions_table(RESULTS / "latency.json", RESULTS / "memory.json"),
            "real-budgets": lambda: real_budgets_table(RESULTS / "real_budgets.json"),
            "distributed": lambda: distributed_table(RESULTS / "distributed.json"),
            "frameworks": lambda: frameworks_table(RESULTS / "frameworks.json"),
            "law": lambda: law_table(RESULTS / "law.json"),
            "law-measured": lambda: measured_table(RESULTS / "law-language.json"),
            "law-larger-calibration": lambda: calibration_runs_table(
                RESULTS / "law-language.json", "larger calibration", "larger_"
            ),
            "law-larger": lambda: measured_table(RESULTS / "law-language.json", "larger", "larger_"),
            "law-earlier-cuts": lambda: earlier_cuts_line(RESULTS / "law-language.json"),
            "law-errors": lambda: errors_table(RESULTS / "law-language.json"),
            "law-forms": lambda: forms_table(RESULTS / "law-language.json"),
            "law-made-again": lambda: made_again_line(RESULTS / "law-language.json"),
            "law-worth": lambda: worth_line(RESULTS / "law-language.json"),
            "law-least-error": lambda: least_error_line(RESULTS / "law-language.json"),
            "law-larger-optimal": lambda: larger_optimal_line(RESULTS / "law-language.json"),
            "law-larger-rates": lambda: rates_table(RESULTS / "law-language.json", "larger"),
            "law-pair": lambda: pair_table(RESULTS / "law-language.json"),
            "law-larger-pair-rates": lambda: rates_table(RESULTS / "law-language.json", "larger pair"),
            "law-pair-optimal": lambda: pair_optimal_line(RESULTS / "law-language.json"),
            "law-larger-pair-optimal": lambda: larger_pair_optimal_line(RESULTS / "law-language.json"),
            "law-larger-pair": lambda: pair_table(RESULTS / "law-language.json", "larger pair", "larger_"),
            "law-rates": lambda: rates_table(RESULTS / "law-language.json"),
            "law-images": lambda: images_table(RESULTS / "passes.json", RESULTS / "cifar10-mini"),
            "law-optimal": lambda: optimal_line(RESULTS / "law-language.json"),
            "gpu": lambda: gpu_table(RESULTS / "gpu.json"),
            "readme": lambda: readme_table(RESULTS),
            "bill": lambda: bill_table(RESULTS),
            "law-calibration": lambda: calibration_runs_table(RESULTS / "law-language.json"),
            "soak": lambda: soak_table(RESULTS / "soak.json"),
            "bench-quick": lambda: bench_quick_table(RESULTS / "bench-quick.json"),
            "compiled": lambda: compiled_table(RESULTS / "compiled.json"),
            "fine-tuning-goals": lambda: fine_tuning_goals_table(RESULTS),
            "fine-tuning-passes": lambda: passes_table(RESULTS / "passes.json", RESULTS, "resnet56", "resnet20"),
            "one-shot": lambda: one_shot_table(RESULTS / "one-shot.json"),
            "again": lambda: again_table(RESULTS / "again.json", RESULTS),
            "seconds-goals": lambda: seconds_goals_table(RESULTS),
            "growth": lambda: growth_table(RESULTS / "growth.json"),
            "widths": lambda: widths_table(RESULTS / "widths.json"),
            "attach": lambda: attach_table(RESULTS / "attach.json"),
            "states": lambda: states_table(RESULTS / "smnist-196"),
            "calibration": lambda: calibration_table(RESULTS / "calibration.json"),
            "ablation": lambda: ablation_table(RESULTS / "ablation.json"),
            "recipe": lambda: recipe_table(RESULTS / "ablation.json"),
            "recipe-seconds": lambda: quick_line(RESULTS / "widths.json"),
            "returns": lambda: returns_table(RESULTS / "returns.json"),
            "even": lambda: even_table(RESULTS / "even.json"),
            "price": lambda: price_table(RESULTS / "price.json"),
            "feedback": lambda: feedback_table(RESULTS / "ablation.json"),
            "tuning": lambda: tuning_table(RESULTS),
            "sparse": lambda: sparse_table(RESULTS / "cifar10-mini"),
            "snip": lambda: snip_table(RESULTS / "snip.json", RESULTS / "shakespeare-mini"),
            "goals": lambda: goals_table(RESULTS),
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
            elif name == "law":
                write_law_picture(RESULTS / "law-language.json", drawn)
            elif name.startswith("lost-"):
                write_lost_picture(RESULTS / name.removeprefix("lost-"), drawn)
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
