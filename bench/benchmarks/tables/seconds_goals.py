"""The goals in seconds as one table: what was asked, what is measured, and what an older version took in turn."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attach import BUDGETS

from setpoint.report.numbers import NOTHING, digits, duration, percent

ATTACHED = {"resnet18": ("ResNet-18", 3.0), "minilm": ("MiniLM-L6", 1.5)}
"""Goals of `attach` in training steps."""
FOUND = {"gpt2": ("GPT-2 124 M", 5.0), "llama-8b": ("the structure of Llama-8B", 10.0)}
"""Goals of `attach` in seconds."""
TABLES_S, DECISION_S, DECISION_UNITS = 10.0, 0.05, 98_688
FULL_TASKS = ("cifar10", "shakespeare", "resnet56", "banking77", "clothing")
"""Tasks whose widths the goal is about. It names ResNet-18, which no task trains; ResNet-56 stands for it."""
WIDTHS, RESIZE_STEPS, AGAIN = 1.02, 0.5, 2.0
LONG_RUN, LONG_SHARE, SHORT_SHARE = 2000, 0.01, 0.05


@dataclass(frozen=True)
class Goal:
    """A goal, and every measured value of this version and of the one before.

    Args:
        what: the goal in words.
        limit: the most that meets it.
        shown: writes a value.
        now: of this version.
        before: of an older version, measured in turn; may be empty.
        processors: on which it was measured.
        same: whether the values are of one thing. Then a range on both sides of the limit decides nothing.
    """

    what: str
    limit: float
    shown: Callable[[float], str]
    now: Sequence[float]
    before: Sequence[float] = ()
    processors: Sequence[str] = ()
    same: bool = True

    @property
    def line(self) -> str:
        """Its line of the table."""
        reached = "yes" if statistics.median(self.now) <= self.limit else "**no**"
        if self.same and min(self.now) <= self.limit < max(self.now):
            reached = "undecided"
        return (
            f"| {self.what} | {', '.join(dict.fromkeys(map(_short, self.processors)))} | {self.shown(self.limit)} "
            f"| {self._of(self.before)} | {self._of(self.now)} | {reached} |"
        )

    def _of(self, values: Sequence[float]) -> str:
        if not values:
            return NOTHING
        middle, low, high = (self.shown(value) for value in (statistics.median(values), min(values), max(values)))
        return middle if low == high else f"{middle} ({low} to {high})"


def seconds_goals_table(folder: Path) -> str:
    """Every goal in seconds, from the records of a folder."""
    lines = ["| what | processor | goal | before | now (range) | reached |", f"|---|---|{'---:|' * 3}---|"]
    parts = (_widths, _attaching, _own_work, _compiled, _growth)
    return "\n".join([*lines, *(goal.line for part in parts for goal in part(folder))])


def _record(folder: Path, name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return record


def _processors(record: Mapping[str, Any]) -> tuple[str, ...]:
    return (str(record["environment"]["cpu"]),)


def _short(processor: str) -> str:
    """The name without marks and frequency."""
    return processor.replace("(R)", "").partition(" @")[0].removesuffix(" Processor")


def _widths(folder: Path) -> Iterator[Goal]:
    what = f"seconds of a step: widths that were found, of even ones at equal FLOPs ({', '.join(FULL_TASKS)})"
    for each in _record(folder, "widths")["machines"]:
        ratios = [row["ratio"] for row in each["rows"] if row["task"] in FULL_TASKS]
        if ratios:  # a machine may have measured other tasks alone
            yield Goal(what, WIDTHS, digits, ratios, processors=_processors(each), same=False)


def _attaching(folder: Path) -> Iterator[Goal]:
    for each in _record(folder, "attach")["machines"]:
        for goal in _attaching_there(each["models"]):
            yield replace(goal, processors=_processors(each))


def _attaching_there(models: Mapping[str, Any]) -> Iterator[Goal]:
    for name, (what, limit) in ATTACHED.items():
        now, before = (
            [run["cold_s"] / run["step_s"] for run in models[name]["runs"].get(tree, ())] for tree in ("now", "before")
        )
        yield Goal(f"`attach` of {what}, new model, exporter loaded, in training steps", limit, digits, now, before)
        runs = [run for run in models[name]["runs"]["now"] if "loading_s" in run]
        if runs:
            included = [(run["cold_s"] + run["loading_s"]) / run["step_s"] for run in runs]
            yield Goal(f"`attach` of {what}, new model, all included, in training steps", limit, digits, included)
    for name, (what, limit) in FOUND.items():
        now, before = ([run["cold_s"] for run in models[name]["runs"].get(tree, ())] for tree in ("now", "before"))
        begun = "groups" if name == "llama-8b" else "`attach`"  # the structure alone: it has no weights to attach to
        yield Goal(f"{begun} of {what}, new model, exporter loaded", limit, duration, now, before)
    for resource in BUDGETS:
        for name, (what, _) in {**ATTACHED, **FOUND}.items():
            if resource in models[name]:
                runs = models[name][resource]["runs"]
                now, before = ([run["cold_s"] for run in runs.get(tree, ())] for tree in ("now", "before"))
                yield Goal(
                    f"`attach` of {what}, known model, budget of {resource} for the first time",
                    TABLES_S,
                    duration,
                    now,
                    before,
                )


def _own_work(folder: Path) -> Iterator[Goal]:
    record = _record(folder, "overhead")
    for name, found in record.get("whole_runs", {}).items():
        limit = LONG_SHARE if found["steps"] >= LONG_RUN else SHORT_SHARE
        for when, words in (("first", "new model"), ("known", "known model")):
            now, before = (
                [run[when]["own_seconds"] / run[when]["seconds"] for run in found["runs"].get(tree, ())]
                for tree in ("now", "before")
            )
            what = f"own work in a run of `{name}`, {found['steps']:,} steps, {words}"
            yield Goal(what, limit, percent, now, before, _processors(found))
    resize, what = record["resnet50"]["resize_in_steps"], "a cut of ResNet-50 with AdamW, in training steps"
    yield Goal(what, RESIZE_STEPS, digits, [resize], processors=_processors(record))


def _compiled(folder: Path) -> Iterator[Goal]:
    for task, measured in _record(folder, "compiled")["tasks"].items():
        runs = measured["runs"]
        for how in ("compiled", "compiled by block", "compiled after the last cut"):
            pruned = runs.get(f"{how}, pruned", ())
            if not pruned:
                continue
            if how != "compiled after the last cut":
                again = [run["recompile_seconds"] / run["first_compiled_seconds"] for run in pruned]
                what = f"compiling again in `{task}`, {how}, of the first time"
                yield Goal(what, AGAIN, digits, again, processors=_processors(measured))
            eager = runs["eager, pruned"]
            whole = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(pruned, eager, strict=True)]
            what = f"whole run of `{task}`, pruned: {how}, of eager"
            yield Goal(what, 1.0, digits, whole, processors=_processors(measured))


def _growth(folder: Path) -> Iterator[Goal]:
    for each in _record(folder, "growth")["machines"]:
        for row in each["models"]:
            if row["units"] == DECISION_UNITS:
                what = f"a decision over {row['units']:,} units, {row['layers']} layers"
                yield Goal(what, DECISION_S, duration, row["rounds"]["decision_s"], processors=_processors(each))
