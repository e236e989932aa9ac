"""The goals of fine-tuning as one table: what was asked of a cut pretrained model, and what each of three came to."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from setpoint.report.numbers import NOTHING, percent
from setpoint_bench.report.folder import Cell, read_lines, read_results
from setpoint_bench.report.packed import file_of
from setpoint_bench.report.statistics import Difference, difference, paired
from setpoint_bench.report.summary import SETPOINT
from setpoint_bench.results import FILE
from tables.methods import PRETRAINED
from tables.words import marked, rows_made_on

NEAR_DENSE = 0.003
MEAN_LEAD = 0.01
CLEAR_ON = 2
MOST_FLOPS = {0.5: 0.7, 0.25: 0.5}
RIVALS = ("open-loop", "post-training")


def fine_tuning_goals_table(root: Path) -> str:
    """A row for each goal, a column for each model, and whether it is reached on all of them."""
    models = [_Model(root / folder, root / small if small else None) for folder, (_, small) in PRETRAINED.items()]
    heads = [words.partition(",")[0] for words, _ in PRETRAINED.values()]
    lines = [f"| goal | {' | '.join(heads)} | reached |", f"|---|{'---:|' * len(heads)}---|"]
    for method, words in ((SETPOINT, "half"), (f"{SETPOINT}-long", "half, with the dense run's training FLOPs")):
        near = [model.to_dense(method) for model in models]
        lines.append(_line(f"{words}: within 0.3 points of the dense model", near, _above(near, -NEAR_DENSE)))
    half = [model.lead(0.5) for model in models]
    lines.append(
        _line("half: not clearly behind any rival", half, [not (found.clear and found.mean < 0) for found, _ in half])
    )
    quarter = [model.lead(0.25) for model in models]
    lines.append(_line("a quarter: ahead of every rival", quarter, _above(quarter, 0.0)))
    clear = sum(found.clear and found.mean > 0 for found, _ in quarter)
    lead = _mean_of([found for found, _ in quarter])
    empty = " | ".join([""] * len(models))
    of_all = f"{clear} of {len(models)}, {_yes(clear >= CLEAR_ON)}"
    lines += [
        f"| a quarter: clearly so on {CLEAR_ON} of {len(models)} | {empty} | {of_all} |",
        f"| a quarter: by 1 point in the mean | {empty} "
        f"| {marked(lead, 'accuracy')}: {_verdict(_is(lead, MEAN_LEAD))} |",
    ]
    for budget, words in ((0.5, "half"), (0.25, "a quarter")):
        small = [model.to_small(budget) for model in models]
        words = f"{words}: ahead of the small pretrained model (its FLOPs)"
        lines.append(_line(words, small, _above(small, 0.0)))
    for budget, most in MOST_FLOPS.items():
        shares = [model.training_flops(budget) for model in models]
        words = f"{percent(budget)} of the FLOPs: training FLOPs at most {percent(most)} of dense"
        met = _yes(all(share <= most for share in shares))
        lines.append(f"| {words} | {' | '.join(map(percent, shares))} | {met} |")
    return "\n".join(lines)


class _Model:
    """The runs of one pretrained model, and of the small one where there is one."""

    def __init__(self, folder: Path, small: Path | None) -> None:
        self.cells = [cell for cell in read_results(folder).cells if cell.split == "test"]
        self.small = [] if small is None else list(read_results(small).cells)

    def of(self, method: str, budget: float | None) -> list[Cell]:
        return [cell for cell in self.cells if (cell.method, cell.budget) == (method, budget)]

    def to_dense(self, method: str) -> tuple[Difference | None, str]:
        return difference(self.of(method, 0.5), self.of("dense", None)), ""

    def lead(self, budget: float) -> tuple[Difference, str]:
        """Over the rival of the best mean among those of three seeds, with its name."""
        here = [cell for cell in self.cells if cell.budget == budget and cell.family in RIVALS]
        rivals = {cell.method for cell in here if not cell.method.partition("@")[0].endswith(("-long", "-taught"))}
        names = sorted(name for name in rivals if len(self.of(name, budget)) >= 3)  # of equal means always the same
        best = max(names, key=lambda name: round(statistics.fmean(cell.value for cell in self.of(name, budget)), 9))
        return _known(self.of(SETPOINT, budget), self.of(best, budget)), f" (`{best}`)"

    def to_small(self, budget: float) -> tuple[Difference | None, str]:
        if not self.small:
            return None, ""
        dense = self.of("dense", None)[0].final_flops or 1.0
        share = (self.small[0].final_flops or 0.0) / dense
        return difference(self.of(SETPOINT, budget), self.small), f" ({percent(share)})"

    def training_flops(self, budget: float) -> float:
        ours, dense = (
            statistics.fmean(cell.train_flops or 0.0 for cell in cells)
            for cells in (self.of(SETPOINT, budget), self.of("dense", None))
        )
        return ours / dense


def _known(ours: Sequence[Cell], theirs: Sequence[Cell]) -> Difference:
    found = difference(ours, theirs)
    assert found is not None, "both were run"
    return found


def _mean_of(found: Sequence[Difference]) -> Difference:
    """The mean of independent differences, with an interval where all have one."""
    mean = statistics.fmean(each.mean for each in found)
    halves = [(each.high - each.low) / 2 for each in found if each.low is not None and each.high is not None]
    if len(halves) < len(found):
        return Difference(mean, min(each.num for each in found))
    half = math.hypot(*halves) / len(halves)
    return Difference(mean, min(each.num for each in found), None, mean - half, mean + half)


def _is(found: Difference, least: float) -> bool | None:
    """Whether a difference is at least so much; None where its interval contains that value, or there is none."""
    if found.low is None or found.high is None or found.low < least <= found.high:
        return None
    return found.low >= least


def _above(found: Sequence[tuple[Difference | None, str]], least: float) -> list[bool | None]:
    return [None if each is None else _is(each, least) for each, _ in found]


def _verdict(reached: bool | None) -> str:
    return "undecided" if reached is None else _yes(reached)


def _line(words: str, found: Sequence[tuple[Difference | None, str]], reached: Sequence[bool | None]) -> str:
    """Reached if on all, not reached if not on one, else undecided."""
    cells = [NOTHING if each is None else f"{marked(each, 'accuracy')}{name}" for each, name in found]
    of_all = False if False in reached else None if None in reached else True
    open_ones = f", {reached.count(None)} undecided" if None in reached else ""
    counted = f"{reached.count(True)} of {len(reached)}{open_ones}"
    return f"| {words} | {' | '.join(cells)} | {_verdict(of_all)} ({counted}) |"


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"


Row = dict[str, Any]


def passes_table(file: Path, root: Path, model: str, small: str) -> str:
    """A cut model beside the dense one and the small pretrained one, at the task's own passes and at more."""
    every = json.loads(file.read_text(encoding="utf-8"))["rows"]
    longer = [row for row in every if row["task"] in (model, small)]
    once = [
        {**row, "passes": 1}
        for task in (model, small)
        for row in read_lines(file_of(root / task, FILE), FILE, [])
        if row["split"] == "test"
    ]
    lines = [
        "| passes | method | FLOPs / step | accuracy | − dense, points | − `" + small + "`, points | seeds |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for passes in sorted({row["passes"] for row in longer} | {1}):
        here = [row for row in [*once, *longer] if row["passes"] == passes]
        dense = _of(here, model, "dense", None)
        little = _of(here, small, "dense", None)
        for task, method, budget in (
            (model, "dense", None),
            (model, SETPOINT, 0.5),
            (model, "cubic", 0.5),
            (model, SETPOINT, 0.322),
            (model, SETPOINT, 0.25),
            (model, "cubic", 0.25),
            (small, "dense", None),
        ):
            found = _of(here, task, method, budget)
            if found:
                share = next(iter(found.values()))["final_flops"] / next(iter(dense.values()))["final_flops"]
                name = f"`{method}`" if task == model else f"`{small}`"
                mean = statistics.fmean(row["value"] for row in found.values())
                apart = (NOTHING if found == other else _apart(found, other) for other in (dense, little))
                cells = f"{percent(share)} | {100 * mean:.2f} % | {' | '.join(apart)} | {len(found)}"
                lines.append(f"| {passes:g} x | {name} | {cells} |")
    return "\n".join([*lines, "", rows_made_on([{**row["environment"], "date": row["date"]} for row in longer])])


def _of(rows: Sequence[Row], task: str, method: str, budget: float | None) -> dict[int, Row]:
    """By seed, the run of a method."""
    return {row["seed"]: row for row in rows if (row["task"], row["method"], row["budget"]) == (task, method, budget)}


def _apart(ours: dict[int, Row], theirs: dict[int, Row]) -> str:
    """The paired difference in points; nothing where no seed is common."""
    pairs = [row["value"] - theirs[seed]["value"] for seed, row in ours.items() if seed in theirs]
    return marked(paired(pairs), "accuracy") if pairs else NOTHING
