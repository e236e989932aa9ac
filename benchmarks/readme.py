"""Writes the tables and pictures of README.md and docs/results.md from the committed result files.

    python benchmarks/readme.py            rewrite what stands between the markers
    python benchmarks/readme.py --check    fail if a page does not show what the result files say

A marker is `<!-- results:NAME -->` ... `<!-- end -->`; NAME is a folder of results/, or `overhead`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from setpoint.report.numbers import duration
from setpoint.report.picture import write_picture
from setpoint.report.results import read_results
from setpoint.report.summary import HEADINGS, row_texts, summary_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
MARKER = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = ("method", "metric", "FLOPs / step", "parameters", "training FLOPs", "training time", "overhead", "landed")


def methods_table(folder: Path) -> str:
    """Table of a results folder, with the lines that say what it was measured on."""
    results = read_results(folder)
    (task,) = {cell.task for cell in results.cells}
    rows = [dict(zip(_distinct(HEADINGS), row_texts(row), strict=True)) for row in summary_rows(results)]
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in rows:
        shown = dict(row)
        for column in ("FLOPs / step", "parameters", "training FLOPs", "training time"):
            shown[column] = f"{row[column]} ({row[f'of dense {column}']})"
        shown["metric"] = row["metric"] if row["method"] == "dense" else f"{row['metric']} ({row['to dense']})"
        lines.append(f"| {' | '.join(shown[column] for column in COLUMNS)} |")
    lines_of = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    last = {(cell["method"], cell["budget"], cell["seed"]): cell for cell in map(json.loads, lines_of)}
    raw = list(last.values())  # a run that was repeated counts once
    assert len({json.dumps(cell["environment"]) for cell in raw}) == 1, f"{folder}: runs of several environments"
    seeds = sorted({cell["seed"] for cell in raw})
    about = raw[0]["environment"]
    lines += [
        "",
        f"Task `{task}`, {max(cell['steps'] for cell in raw)} steps, seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}, budget "
        f"{next(cell['budget'] for cell in raw if cell['budget'])} of the dense FLOPs per step; "
        f"{about['cpu']}, {_threads(about)}, {about['dtype']}, torch {about['torch']}, "
        f"{raw[-1]['date'][:10]}. {_saved(raw)}In brackets: against dense.",
    ]
    return "\n".join(lines)


def _threads(environment: dict[str, object]) -> str:
    return f"{environment['threads']} thread{'s' * (environment['threads'] != 1)}"


def _saved(raw: list[dict[str, object]]) -> str:
    """Seconds saved per FLOPs saved by Setpoint, as shares of dense, when all ran with the same seeds."""

    def total(method: str, key: str) -> float:
        return sum(float(cell[key]) for cell in raw if cell["method"] == method)  # type: ignore[arg-type]

    def seeds(method: str) -> set[object]:
        return {cell["seed"] for cell in raw if cell["method"] == method}

    if not seeds("dense") or seeds("dense") != seeds("setpoint"):
        return ""
    dense = total("dense", "seconds"), total("dense", "train_flops")
    seconds = 1 - total("setpoint", "seconds") / dense[0]
    flops = 1 - total("setpoint", "train_flops") / dense[1]
    return f"Share of seconds saved / share of FLOPs saved over the whole run: {seconds / flops:.2f}. "


def _distinct(headings: tuple[str, ...]) -> list[str]:
    """Headings in which each "of dense" names its column."""
    return [f"of dense {headings[i - 1]}" if text == "of dense" else text for i, text in enumerate(headings)]


def overhead_table() -> str:
    """Setpoint's own cost, from results/overhead.json."""
    data = json.loads((RESULTS / "overhead.json").read_text(encoding="utf-8"))
    lines = ["| what | measured |", "|---|---|"]
    for name, row in data["sensing"].items():
        low, high = row["slowdown_quartiles"]
        often = "each step" if row["sensed_every"] == 1 else f"one step in {row['sensed_every']}"
        lines.append(
            f"| sensing in {often}, share of a dense `{name}` step ({duration(row['step_seconds'])}) | median "
            f"{row['sensing_share_median']:.2%}, mean {row['sensing_share_mean']:.2%} "
            f"(step with / without: {row['slowdown_median']:+.2%}, quartiles {low:+.2%} to {high:+.2%}) |"
        )
    resnet = data["resnet50"]
    lines += [
        f"| `find_groups(resnet50)`, best of {len(resnet['find_groups_seconds'])} | "
        f"{min(resnet['find_groups_seconds']):.2f} s |",
        f"| resize of ResNet-50 with AdamW state | {resnet['resize_seconds']:.2f} s, "
        f"{resnet['resize_in_steps']:.2f} of a training step at batch {resnet['batch']} |",
        f"| `import setpoint` beside `import torch` | {data['import']['added_seconds_median']:+.2f} s |",
        "",
        f"{data['environment']['cpu']}, {_threads(data['environment'])}, seed {data['seed']}, torch "
        f"{data['environment']['torch']}, {data['date'][:10]}.",
    ]
    return "\n".join(lines)


def filled(text: str) -> str:
    """The page with every marked part as the result files say."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        table = overhead_table() if name == "overhead" else methods_table(RESULTS / name)
        return f"{match[1]}{table}\n{match[3]}"

    return MARKER.sub(fill, text)


def main() -> None:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            stale.append(page.name)
            if not check:
                page.write_text(filled(text), encoding="utf-8")
    if check and stale:
        sys.exit(f"{', '.join(stale)} not as the result files say: run python benchmarks/readme.py")
    if not check:
        for folder in sorted(path.parent for path in RESULTS.glob("*/results.jsonl")):
            write_picture(folder, ROOT / "docs" / "pictures" / f"{folder.name}.svg")


if __name__ == "__main__":
    main()
