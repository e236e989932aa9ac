"""Blocks from the runs of `setpoint bench` in results/: methods beside each other, task by task."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from setpoint.report.numbers import NOTHING, percent
from setpoint_bench.report import folder
from setpoint_bench.report.columns import metric_text, share_text, signed
from setpoint_bench.report.folder import RESULTS as RESULTS_FILE
from setpoint_bench.report.markdown import task_text
from setpoint_bench.report.packed import file_of
from setpoint_bench.report.results import Cell, Results
from setpoint_bench.report.statistics import Difference, difference, mean, share_of
from setpoint_bench.report.summary import FAMILIES, SETPOINT, Row, clock_of, rounds_of, series, summary_rows
from tables.records import models_cut
from tables.renderer import RESULTS, block, marked, rows_made_on, table

HEADLINES = ("small", "small-long")
"""The rivals that every table of main numbers has."""
EQUAL_FLOPS = 0.02
"""Final FLOPs are called equal up to this share."""
LONGER = ("-long", "-taught", "-trained", "-alone")
"""How names of methods end that train for longer, or are taught by a dense run."""
PRETRAINED = {
    "resnet56": ("ResNet-56, CIFAR-10", "resnet20"),
    "banking77": ("MiniLM-L6, BANKING77", "banking77-three-layers"),
    "clothing": ("EfficientNet-Lite0, photographs of clothes", ""),
}
"""By results folder what a table calls the model, and the folder of the small pretrained model where there is one."""

# Many tables show the same runs: each folder is read once.
read_results = cache(folder.read_results)


@cache
def rows_of(name: str) -> tuple[Row, ...]:
    """The summary of a folder of results/."""
    return summary_rows(read_results(RESULTS / name))


def folders(root: Path = RESULTS) -> list[Path]:
    """The folders with results, by name."""
    return sorted(path for path in root.iterdir() if file_of(path, RESULTS_FILE).is_file())


# A page for each task.

TASK_PAGE = """# `{name}`

`python bench/benchmarks/readme.py` generates this page from `results/{name}`. [Tasks](../tasks.md) describes the task.
[Results](../results.md#how-to-read-the-tables) says how to read the tables.

{tables}
"""


def task_pages() -> dict[str, str]:
    """By name, the page of every results folder, with its tables."""
    return {path.name: TASK_PAGE.format(name=path.name, tables=task_tables(path.name)) for path in folders()}


def task_tables(name: str) -> str:
    """Tables of a results folder with what they were measured on."""
    results, rows = read_results(RESULTS / name), rows_of(name)
    for task in results.tasks():
        # Seconds compare on one machine only, and what was learned with one version and precision only.
        timed = {json.dumps(cell.timing.environment) for cell in results.of(task) if cell.timing}
        assert len(timed) <= 1, f"{name}: timed on several machines"
        ran = {tuple(cell.environment.get(key) for key in ("torch", "dtype")) for cell in results.of(task)}
        assert len(ran) == 1, f"{name}: runs of several versions: {ran}"
    texts = (task_text(results.of(task), [row for row in rows if row.task == task]) for task in results.tasks())
    return "\n\n".join(texts)


@block("tasks")
def task_links() -> str:
    """A link to the page of every results folder."""
    return "\n".join(f"* [`{path.name}`](tasks/{path.name}.md)" for path in folders())


# Setpoint on every task at every budget.


def headlines() -> Iterator[tuple[Row, dict[str, Row], dict[str, str]]]:
    """Setpoint's rows, beside each the other methods of its task at its budget and dense, and the first cells."""
    for path in folders():
        rows = rows_of(path.name)
        for ours in (row for row in rows if row.method == SETPOINT):
            mine = [row for row in rows if row.task == ours.task and row.budget in (ours.budget, None)]
            yield ours, {row.method: row for row in mine}, {"task": ours.task, "FLOPs": percent(ours.budget)}


def _cut_after(ours: Row, others: Mapping[str, Row]) -> Row | None:
    """The best method that cuts units after training."""
    after = [row for row in others.values() if row.family == "post-training" and row.density is None]
    best = sorted(after, key=lambda row: row.value.mean, reverse=ours.metric == "accuracy")
    return best[0] if best else None


def _mean_text(row: Row | None) -> str:
    if row is None:
        return NOTHING
    return re.sub(r" ± [\d.]+", "", metric_text(row)) + " (one seed)" * (row.num_seeds == 1)


@block("headline")
def headline() -> str:
    """Setpoint beside dense, small, and the best that is cut after training."""
    return table(
        {
            **start,
            "dense": _mean_text(others.get("dense")),
            **{f"`{rival}`": _mean_text(others.get(rival)) for rival in HEADLINES},
            "cut after": _mean_text(_cut_after(ours, others)),
            "Setpoint": _mean_text(ours),
        }
        for ours, others, start in headlines()
    )


@block("apart")
def apart() -> str:
    """How far Setpoint is from the small models, by seed."""
    return table(
        {**start, **{f"to `{rival}`": marked(ours.differences.get(rival), ours.metric) for rival in HEADLINES}}
        for ours, _, start in headlines()
    )


@block("spent")
def spent() -> str:
    """What Setpoint's runs cost, as shares of dense, beside the best method that cuts after training."""
    rows = []
    for ours, others, start in headlines():
        rival = _cut_after(ours, others)
        costs = {"training FLOPs": percent(ours.train_flops_ratio), "training time": share_text(ours.seconds_share)}
        theirs = (
            {"cut after": f"`{rival.method}`", "its training FLOPs": percent(rival.train_flops_ratio)} if rival else {}
        )
        rows.append({**start, **costs, **theirs})
    return table(rows)


# Setpoint beside every method: one row a method, one column a task and budget.

Entry = Callable[[Sequence[Cell], Sequence[Cell]], str]


def _matrix(heading: str, entry: Entry) -> str:
    rows: dict[tuple[int, str], dict[str, str]] = {}
    columns: list[str] = []
    for path in folders():
        by_label = series(read_results(RESULTS / path.name).cells)
        for ours in (cells for cells in by_label.values() if cells[0].method == SETPOINT):
            budget = ours[0].budget
            column = f"{ours[0].task} {round(100 * (budget or 1.0))} %"
            columns.append(column)
            for theirs in by_label.values():
                first = theirs[0]
                if first.budget in (None, budget) and _sets_the_rate_alone(first.method) and theirs is not ours:
                    key = (FAMILIES.index(first.family), first.method)
                    rows.setdefault(key, {})[column] = entry(ours, theirs)
    used = [column for column in columns if any(row.get(column, NOTHING) != NOTHING for row in rows.values())]
    # Sorted by family alone: within one the methods keep the order of the results.
    ordered = sorted(rows, key=lambda key: key[0])
    cells = [{heading: f"`{key[1]}`", **{column: rows[key].get(column, NOTHING) for column in used}} for key in ordered]
    return table(line for line in cells if any(text != NOTHING for text in list(line.values())[1:]))


def _sets_the_rate_alone(method: str) -> bool:
    """Whether nothing but the learning rate is set in a method's name."""
    return all(setting.startswith("learning_rate=") for setting in method.split("@")[1:])


def _ahead(found: Difference | None, metric: str) -> str:
    """By how much, better is positive: bold where the 95 % interval excludes 0, in parentheses where there is none."""
    if found is None:
        return NOTHING
    text = signed(100 * found.mean, 2) if metric == "accuracy" else signed(-found.mean, 3)
    return f"**{text}**" if found.clear else text if found.low is not None else f"({text})"


def _cost_mark(ours: Sequence[Cell], theirs: Sequence[Cell]) -> str:
    """Where a rival at the same budget ends more than 2 % cheaper, or dearer: by the FLOPs that its budget is of."""
    if theirs[0].budget is None:
        return ""
    mine, other = (mean(cell.theoretical_flops or cell.final_flops for cell in cells) for cells in (ours, theirs))
    difference_of_costs = (other or 0.0) / (mine or 1.0) - 1
    return "" if abs(difference_of_costs) <= EQUAL_FLOPS else " ↓" if difference_of_costs < 0 else " ↑"


@block("ahead")
def ahead() -> str:
    """How far Setpoint is ahead of every method on test data, by seed."""

    def entry(ours: Sequence[Cell], theirs: Sequence[Cell]) -> str:
        return _ahead(difference(ours, theirs), ours[0].metric) + _cost_mark(ours, theirs)

    return _matrix("`setpoint` ahead of", entry)


@block("ahead-validation")
def ahead_on_validation() -> str:
    def entry(ours: Sequence[Cell], theirs: Sequence[Cell]) -> str:
        return _ahead(difference(ours, theirs, _last_validation), ours[0].metric) + _cost_mark(ours, theirs)

    return _matrix("`setpoint` ahead of", entry)


def _last_validation(cell: Cell) -> float | None:
    """The metric on the validation data at the end of a run."""
    points = [point for point in cell.history if point.split == "validation"]
    return None if not points else points[-1].accuracy if cell.metric == "accuracy" else points[-1].loss


@block("seconds")
def seconds() -> str:
    """Setpoint's training seconds over those of every method, where both were timed in turns."""

    def entry(ours: Sequence[Cell], theirs: Sequence[Cell]) -> str:
        if clock_of([*ours, *theirs]) != "timed":
            return NOTHING
        found = share_of(rounds_of(ours, "timed"), rounds_of(theirs, "timed"))
        if found is None:
            return NOTHING
        text = f"{found.value:.2f}"
        return f"**{text}**" if found.low > 1 or found.high < 1 else text

    return _matrix("seconds of `setpoint` / of", entry)


@block("validation")
def validation() -> str:
    """How far Setpoint lies from its rivals on the validation data at the end of each run, beside the test data."""
    rows = []
    for path in folders():
        by_label = series(read_results(RESULTS / path.name).cells)
        for ours in (cells for cells in by_label.values() if cells[0].method == SETPOINT):
            task, budget, metric = ours[0].task, ours[0].budget, ours[0].metric
            rivals = {cells[0].method: cells for cells in by_label.values() if cells[0].budget in (None, budget)}
            for split, of in (("validation", _last_validation), ("test", lambda cell: cell.value)):
                start = {"task": task, "FLOPs": percent(budget), "data": split}
                found = {rival: difference(ours, rivals.get(rival, ()), of) for rival in ("dense", *HEADLINES)}
                rows.append({**start, **{f"to `{rival}`": marked(each, metric) for rival, each in found.items()}})
    return table(rows, "Seeds and machines are those of the tables of each task.", left=3)


# Fine-tuned pretrained models.


def _of_equal_steps(name: str) -> list[Row]:
    """Rows of a results folder, but for masks, and for methods that train longer or are taught."""
    return [row for row in rows_of(name) if row.density is None and not row.method.partition("@")[0].endswith(LONGER)]


def _cells(name: str, method: str, budget: float | None) -> list[Cell]:
    return [cell for cell in read_results(RESULTS / name).cells if (cell.method, cell.budget) == (method, budget)]


def _dense(name: str) -> Row:
    return next(row for row in rows_of(name) if row.method == "dense")


def _best_of_families(rows: Sequence[Row]) -> dict[str, Row | None]:
    """The best row of Setpoint, of the open loops and of the cuts after training, in this order."""
    kinds = {"Setpoint": SETPOINT, "open loop": "open-loop", "cut after training": "post-training"}
    by_name = sorted(rows, key=lambda row: row.method)  # of equal means always the same
    return {
        kind: max(
            (row for row in by_name if row.family == family), key=lambda row: round(row.value.mean, 9), default=None
        )
        for kind, family in kinds.items()
    }


def _clearly_ahead(row: Row, rivals: Sequence[Row]) -> bool:
    """Whether each of them is behind the row by an interval that excludes 0; known of Setpoint's rows."""
    behind = [rival.differences.get(row.method) for rival in rivals]
    return bool(behind) and all(found is not None and found.high is not None and found.high < 0 for found in behind)


@block("readme")
def readme() -> str:
    """Fine-tuned pretrained models at two budgets, and below how many models are cut."""
    rows = []
    for name, (model, _) in PRETRAINED.items():
        for budget in (0.5, 0.25):
            ours, rival, seeds = _ours_and_rival(name, budget)
            rows.append(
                {
                    "fine-tuned model": model,
                    "FLOPs / step": percent(budget),
                    "Setpoint": ours,
                    "best open loop": rival,
                    "dense": _accuracy(_dense(name)),
                    "seeds": seeds,
                    "more steps": _beside_dense(name, budget),
                }
            )
    return table(rows, f"* {models_cut()}")


def _ours_and_rival(name: str, budget: float) -> tuple[str, str, str]:
    """Setpoint's accuracy, that of the best rival, and the seeds of both and of dense."""
    best = _best_of_families([row for row in _of_equal_steps(name) if row.budget == budget])
    mine, *rivals = [row for row in best.values() if row is not None]
    rival = max(rivals, key=lambda row: row.value.mean)
    ours = f"**{_accuracy(mine)}**" if _clearly_ahead(mine, [rival]) else _accuracy(mine)
    seeds = [str(row.num_seeds) for row in (mine, rival, _dense(name))]
    return ours, _accuracy(rival), seeds[0] if len(set(seeds)) == 1 else " / ".join(seeds)


def _accuracy(row: Row) -> str:
    return f"{100 * row.value.mean:.1f} %"


def _beside_dense(name: str, budget: float) -> str:
    """The mean of runs with the dense training FLOPs, and in brackets that of the dense runs with the same seeds."""
    ours = _cells(name, f"{SETPOINT}-long", budget)
    seeds = {cell.seed for cell in ours}
    dense = [cell for cell in _cells(name, "dense", None) if cell.seed in seeds]
    if not ours or not dense:
        return NOTHING
    longer, full = (f"{100 * statistics.fmean(cell.value for cell in cells):.1f} %" for cells in (ours, dense))
    return f"{longer} (dense {full})"


@block("pretrained")
def pretrained() -> str:
    """All that was measured of the pretrained models: one column a model, the best of a budget in bold."""
    columns = {words: _pretrained_column(name, small) for name, (words, small) in PRETRAINED.items()}
    whats = next(iter(columns.values()))
    return table(
        {"accuracy on test data": what, **{words: column[what] for words, column in columns.items()}} for what in whats
    )


def _pretrained_column(name: str, small: str) -> dict[str, str]:
    """The accuracies of one model, by what they are of."""
    rows, dense = _of_equal_steps(name), _dense(name)
    found = {"dense, fine-tuned": _with_seeds(dense)}
    for budget, words in ((0.5, "half of the FLOPs"), (0.25, "a quarter")):
        best = _best_of_families([row for row in rows if row.budget == budget])
        for kind, row in best.items():
            text = NOTHING if row is None else _with_seeds(row) + (f", `{row.method}`" if kind != "Setpoint" else "")
            rivals = [rival for rival in best.values() if rival is not None and rival is not row]
            found[f"{words}: {kind}"] = f"**{text}**" if row is not None and _clearly_ahead(row, rivals) else text
    found["small pretrained model"] = NOTHING
    if small:
        row = rows_of(small)[0]
        share = (row.final_flops or math.nan) / (dense.final_flops or math.nan)
        found["small pretrained model"] = f"{_with_seeds(row)}, {percent(share)} of the FLOPs"
    spent_by_ours = [percent(row.train_flops_ratio) for row in rows if row.method == SETPOINT]
    found["training FLOPs of Setpoint"] = " and ".join(sorted(spent_by_ours, reverse=True))
    return found


def _with_seeds(row: Row) -> str:
    return f"{percent(row.value.mean)} ({row.num_seeds})"


@block("bill")
def bill() -> str:
    """Fine-tuning for as many steps as the dense run's training FLOPs pay for, beside equal steps and dense."""
    rows = []
    for name, (model, _) in PRETRAINED.items():
        for here in _with_longer_runs(name):
            ours = here["setpoint-long"]
            runs = {method: _cells(name, row.method, row.budget) for method, row in here.items()}
            shown = {"`setpoint`": "setpoint", "`setpoint-long`": "setpoint-long", "`cubic-long`": "cubic-long"}
            rows.append(
                {
                    "model": model.partition(",")[0],
                    "FLOPs / step": percent(ours.budget),
                    "dense": _with_seeds(here["dense"]),
                    **{
                        words: _with_seeds(here[method]) if method in here else NOTHING
                        for words, method in shown.items()
                    },
                    "training FLOPs, of dense": percent(ours.train_flops_ratio),
                    **{
                        f"`setpoint-long` − `{method}`": marked(
                            difference(runs["setpoint-long"], runs.get(method, ())), ours.metric
                        )
                        for method in ("setpoint", "dense", "cubic-long")
                    },
                }
            )
    return table(rows)


def _with_longer_runs(name: str) -> Iterator[dict[str, Row]]:
    """By method, the rows of each budget at which Setpoint trained for longer; of several learning rates the best."""
    for budget in (0.5, 0.25):
        here = {"dense": _dense(name)}
        for row in sorted((row for row in rows_of(name) if row.budget == budget), key=lambda row: row.value.mean):
            here[row.method.partition("@")[0]] = row
        if "setpoint-long" in here:
            yield here


# The first cut.


@block("at-once")
def at_once() -> str:
    """One cut against gradual cuts, at equal training FLOPs and at equal steps, by seed."""
    rows = []
    for path in folders():
        for budget in (0.5, 0.25):
            here = {row.method: row for row in rows_of(path.name) if row.budget == budget}
            if "setpoint-at-once-long" not in here:
                continue
            shown = {
                "gradual": "setpoint",
                "at once, equal FLOPs": "setpoint-at-once-long",
                "at once, equal steps": "setpoint-at-once",
            }
            runs = {words: _cells(path.name, method, budget) for words, method in shown.items()}
            start = {"task": here["setpoint"].task, "FLOPs / step": percent(budget)}
            for words, method in shown.items():
                start[words] = f"{metric_text(here[method])} ({percent(here[method].train_flops_ratio)})"
                if words != "gradual":
                    found = difference(runs[words], runs["gradual"])
                    start[f"{words.removeprefix('at once, ')} − gradual"] = (
                        f"{marked(found, here[method].metric)} ({found.num if found else 0})"
                    )
            rows.append(start)
    return table(rows, left=2)


# From a trained model.


@block("best-small")
def best_small() -> str:
    """What each step of the recipe brings: one cut, the model trained before, the FLOPs of a dense run, a teacher."""
    shown = {
        "from pretrained, equal steps": "setpoint-at-once",
        "from trained, no teacher": "setpoint-from-trained-alone",
        "from trained, own teacher": "setpoint-from-trained",
    }
    rows = []
    for path in folders():
        for budget in (0.5, 0.25):
            here = {row.method: row for row in rows_of(path.name) if row.budget == budget}
            if "setpoint-from-trained" not in here:
                continue
            dense = _dense(path.name)
            runs = {method: _cells(path.name, method, budget) for method in shown.values()}
            taught, metric = runs["setpoint-from-trained"], dense.metric
            alone = difference(taught, runs["setpoint-from-trained-alone"])
            over = difference(taught, _cells(path.name, "dense", None))
            rows.append(
                {
                    "task": dense.task,
                    "FLOPs / step": percent(budget),
                    "dense": metric_text(dense),
                    **{
                        words: metric_text(here[method]) if method in here else NOTHING
                        for words, method in shown.items()
                    },
                    "teacher − none": f"{marked(alone, metric)} ({alone.num if alone else 0})",
                    "own teacher − dense": f"{marked(over, metric)} ({over.num if over else 0})",
                }
            )
    return table(rows, left=2)


# Learning rates.


@block("tuning")
def tuning() -> str:
    """The metric on validation data by learning rate, from the sweeps in results/tuning."""
    small = {small for _, small in PRETRAINED.values() if small}
    found: dict[tuple[str, str, float | None], dict[float, list[Cell]]] = {}
    for path in folders(RESULTS / "tuning"):
        for cell in read_results(path).cells:
            # A folder is named for its task or a variant of it, and may hold the small rival, too.
            task = cell.task if cell.task in small else path.name
            key = (task, cell.method.partition("@")[0], cell.budget)
            found.setdefault(key, {}).setdefault(_rate(cell), []).append(cell)
    cells = [cell for by_rate in found.values() for runs in by_rate.values() for cell in runs]
    seeds = ", ".join(map(str, sorted({cell.seed for cell in cells if cell.seed is not None})))
    rates, rows = sorted({_rate(cell) for cell in cells}), []
    for task, method, budget in sorted(found, key=lambda key: (*key[:2], -(key[2] or 1))):
        by_rate = found[task, method, budget]
        texts = {rate: metric_text(summary_rows(Results(tuple(runs)))[0]) for rate, runs in by_rate.items()}
        start = {"task": task, "method": f"`{method}`", "FLOPs": percent(budget or 1.0)}
        rows.append({**start, **{f"{rate:g} x": texts.get(rate, NOTHING) for rate in rates}})
    machines = rows_made_on([{**cell.environment, "date": cell.date} for cell in cells])
    return table(rows, f"Seed{'s' * (',' in seeds)} {seeds}; {machines}", left=2)


def _rate(cell: Cell) -> float:
    """The learning rate of a run of a sweep, relative to its method's."""
    found = re.search(r"@learning_rate=([\d.]+)", cell.method)
    return float(found[1]) if found else 1.0
