"""The league: rivals with the same steps, teacher and search of rates, cell by cell; it continues where it stopped.

    python bench/benchmarks/league.py clothing-mobilenet
    python bench/benchmarks/league.py banking77 --lengths 1,4 --starts pretrained,trained --no-teacher

Results lie in OUT/xLENGTH, as `setpoint bench` writes them. Each run has a process and a thread of its own. For each
budget all methods run with the first seed, Setpoint and its likely best rivals first, then all with the next. With the
first seed a method runs at each rate; the one with the highest score on validation data at its end, written to
OUT/rates.json, is that of all its seeds, and of longer runs. The teacher and the trained start are the dense run of the
same length and seed at the task's own rate.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

from record import held_in, write

from setpoint_bench.catalogue import task_named
from setpoint_bench.method import CHANGES, method_named
from setpoint_bench.progress import ProgressBars
from setpoint_bench.results import HISTORY, exact, held
from setpoint_bench.runner import finished, run, with_needed
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import BenchError
from setpoint_bench.training import Cell

METHODS = (
    "setpoint-at-once",
    "fitted-first",
    "taylor-first",
    "cubic-taylor-global",
    "setpoint-gradual",
    "dense",
    "neighbour",
    "cubic-taylor",
    "setpoint-first",
    "taylor-first-even",
    "cubic-global",
    "cubic",
    "norm-first",
    "filter-first",
    "fasterai-first",
    "fasterai-first-global",
    "fastnas-first",
    "kirigami-first",
)
"""The order in which they run: the default of `attach`, its likely best rivals, and the others."""
ALIASES = {"setpoint": "setpoint-at-once"}
STARTS = ("pretrained", *(word for word in CHANGES if word != "taught"))
RATES, FAILURES = "rates.json", "failures.json"


@dataclass(frozen=True)
class Entry:
    """One method of the league with its start, its teacher and its cost, at a budget, a seed and a length."""

    length: int
    budget: float
    seed: int
    method: str  # with its words, without a rate


def entries(
    methods: Sequence[str],
    *,
    lengths: Sequence[int],
    budgets: Sequence[float],
    seeds: Sequence[int],
    starts: Sequence[str] = ("pretrained",),
    costs: Sequence[str] = ("steps",),
    teacher: bool = True,
) -> list[Entry]:
    """What there is to run, in order; models that are not cut have one start, one cost, and no budget of their own."""
    found: dict[Entry, None] = {}
    for length, budget, seed, start, cost, name in product(lengths, budgets, seeds, starts, costs, methods):
        method = method_named(name)
        if not method.sized and (start, cost, budget) != (starts[0], costs[0], budgets[0]):
            continue
        words = ["taught"] * teacher + [start] * (method.sized and start != "pretrained")
        words += ["long"] * (method.sized and cost == "flops")
        found[Entry(length, budget, seed, "+".join([name, *words]))] = None
    return list(found)


def at_rate(method: str, rate: float) -> str:
    return method if rate == 1 else f"{method}@learning_rate={exact(rate)}"


class League:
    """The folder of a task's league, and the rates that are found there.

    Args:
        task: at its usual length.
        out: folder of the results.
        rates: to choose from.
        first: the seed that they are chosen with.
    """

    def __init__(self, task: SimpleTask, out: Path, rates: Sequence[float], first: int) -> None:
        self.task, self.out, self.rates, self.first = task, out, rates, first
        out.mkdir(parents=True, exist_ok=True)
        self.failed: set[tuple[int, float, str]] = set()

    def cell(self, entry: Entry, rate: float) -> Cell:
        method = method_named(at_rate(entry.method, rate))
        budget = entry.budget if method.sized else None
        return Cell(self.task.with_steps(entry.length * self.task.steps), method, budget, entry.seed)

    def folder(self, entry: Entry) -> Path:
        return self.out / f"x{entry.length}"

    def chosen(self, entry: Entry) -> float | None:
        """The rate that was found for this method at this budget, at whatever length; None where none was."""
        known = (row for row in self._known() if self._same(row, entry) and row["of"] == [*self.rates])
        return next((float(row["chosen"]) for row in known), None)

    def choose(self, entry: Entry) -> float | None:
        """The best rate, once all have run with the first seed; it is written down. None where no run has ended."""
        scores: dict[float, list[float]] = {}
        for rate in self.rates:
            cell = self.cell(entry, rate)
            history = self.folder(entry) / cell.name / HISTORY
            rows = [json.loads(line) for line in history.read_text("utf-8").splitlines()] if history.exists() else []
            last = next((row for row in reversed(rows) if row["split"] == "validation"), None)
            if last is not None and math.isfinite(last["loss"]):
                scores[rate] = [last.get("accuracy") or 0.0, -last["loss"]]
        if not scores:
            return None
        best = max(scores, key=lambda rate: scores[rate])
        row = {"method": entry.method, "budget": self.cell(entry, 1).budget, "length": entry.length, "seed": entry.seed}
        told = {exact(rate): {"accuracy": right, "loss": -loss} for rate, (right, loss) in scores.items()}
        row |= {"of": [*self.rates], "validation": told, "chosen": best}
        kept = [each for each in self._known() if not self._same(each, entry)]
        write([*kept, row], self.out / RATES)  # type: ignore[arg-type]
        return best

    def _known(self) -> list[dict[str, Any]]:
        return list(held_in(self.out / RATES))  # type: ignore[arg-type]

    def _same(self, row: dict[str, Any], entry: Entry) -> bool:
        return bool((row["method"], row["budget"]) == (entry.method, self.cell(entry, 1).budget))

    def runs(self, entry: Entry) -> Iterator[Cell]:
        """The cells of an entry, one after another: at its rate, or at each where that is to be found."""
        rate = self.chosen(entry)
        if rate is None:
            first = Entry(entry.length, entry.budget, self.first, entry.method)
            for each in self.rates:
                yield self.cell(first, each)
            rate = self.choose(first)
        if rate is not None:
            yield self.cell(entry, rate)

    def play(self, planned: Sequence[Entry]) -> None:
        """Run what is not there yet, and say after each entry what is left."""
        began, ran = time.monotonic(), 0
        for number, entry in enumerate(planned, start=1):
            key = entry.length, entry.budget, entry.method
            if key in self.failed:
                continue
            out = self.folder(entry)
            with held(out):
                for cell in self.runs(entry):
                    cells = with_needed(cell)
                    if all(each in finished(cells, out) for each in cells):
                        continue
                    ran += 1
                    with ProgressBars(cells) as bars:
                        outcome = run(cells, out, bars)
                    for failure in outcome.failures:
                        self.failed.add(key)
                        write({**held_in(self.out / FAILURES), failure.cell: failure.error}, self.out / FAILURES)
            left = len(planned) - number
            hours = (time.monotonic() - began) / 3600
            pace = f", about {hours / number * left:.1f} hours at this pace" if ran else ""
            told = f"{self.task.name} x{entry.length} budget {entry.budget:g} seed {entry.seed} {entry.method}"
            print(f"{told}: {number} of {len(planned)}, {left} left{pace}", file=sys.stderr, flush=True)


def _list(kind: type) -> Any:
    return lambda text: [kind(each) for each in text.split(",")]


def main() -> None:
    """Read the command line and play."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--lengths", type=_list(int), default=[1], help="times the task's usual steps")
    parser.add_argument("--starts", type=_list(str), default=["pretrained"], help=f"of {', '.join(STARTS)}")
    parser.add_argument("--costs", type=_list(str), default=["steps"], help="equal steps, flops (those of dense)")
    parser.add_argument("--teacher", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seeds", type=_list(int), default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", type=_list(str), default=list(METHODS))
    parser.add_argument("--budgets", type=_list(float), default=[0.5, 0.25])
    parser.add_argument("--rates", type=_list(float), default=[0.5, 1.0, 2.0], help="of the task's; one: no search")
    parser.add_argument("--steps", type=int, help="of length 1, in place of the task's own")
    parser.add_argument("--out", type=Path, help="by default runs/league/TASK")
    given = parser.parse_args()
    for what, values, known in (("starts", given.starts, STARTS), ("costs", given.costs, ("steps", "flops"))):
        if unknown := set(values) - {*known}:
            parser.error(f"--{what} takes {', '.join(known)}, got {', '.join(unknown)}")
    try:
        task = task_named(given.task, steps=given.steps)
        methods = [ALIASES.get(name, name) for name in given.methods if name != "neighbour" or task.neighbour]
        planned = entries(
            methods,
            lengths=given.lengths,
            budgets=given.budgets,
            seeds=given.seeds,
            starts=given.starts,
            costs=given.costs,
            teacher=given.teacher,
        )
        League(task, given.out or Path("runs/league") / given.task, given.rates, given.seeds[0]).play(planned)
    except BenchError as error:
        sys.exit(f"league: {error}")


if __name__ == "__main__":
    main()
